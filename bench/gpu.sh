#!/usr/bin/env bash
# What to do with a GPU that is there for fifteen minutes, in three commands; their limits add up to 780 s:
#
#     bash bench/gpu.sh survival   80 s: what works, each check in a process of its own
#     bash bench/gpu.sh measure   300 s: profiles, steps against others, rates of layers, tests, memcheck
#     bash bench/gpu.sh train     400 s: AT and AT-AWP side by side on all of CIFAR-10 (JPEG), which ARCHIVE names
#
# Before: build the library for the GPU where there is time, and bring it along with the tree, with its build.json:
#     AWP_CUDA_ARCHS=90a python setup.py build_ext --inplace
# If `survival` says so, go on with AWP_BACKEND=triton in front. After: put the folders into one result,
#     python -m bench.gpu_result OUT [OUT ...] --result bench/results/GPU-DATE.json
#
# OUT: folder for results (./gpu-out), at most 8 files a command, written as they come. ARCHIVE: of train/<class>/ and
# test/<class>/, or a folder. STEP_MS: "17 19", of a step of AT and of AT-AWP, which `train` else measures in 20 s.
# STAGES: some of a command's stages. WHEELS: a folder of wheels that are missing there. STEP_OPTIONS: for
# bench/step/step.py. PYTHON: the interpreter (python3). COMMIT: what is measured, where there is no git checkout.
# DEVICE=cpu rehearses all of it on small models, in five times the limits; REHEARSE=1 adds a stage that crashes and one
# that hangs. A failing stage does not stop the rest; it shows in the table at the end and in the exit code.
set -euo pipefail

export DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python3} OUT=${OUT:-gpu-out} ARCHIVE=${ARCHIVE:-} REHEARSE=${REHEARSE:-}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
[ -z "$ARCHIVE" ] || ARCHIVE=$(realpath "$ARCHIVE")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${WORK:-}" ]; then
  WORK=$(mktemp -d)
  trap 'rm -rf "$WORK"' EXIT
fi
# the sources are found even where neither pip nor setup.py can install
export WORK PYTHONUNBUFFERED=1 MPLCONFIGDIR="$WORK/matplotlib"
export PYTHONPATH="$PWD/kernels:$PWD/engine:$WORK/site${PYTHONPATH:+:$PYTHONPATH}"

if [ "$DEVICE" = cpu ]; then
  large="--model preact-resnet-digits --batch-size 8 --repeats 1"
  small="--model preact-resnet-digits --batch-size 16 --repeats 1"
  profiled="preact-resnet-digits" batch=16 slower=5
else
  large="--model wrn-34-10 --batch-size 128 --repeats 2"
  small="--model preact-resnet-18 --batch-size 128 --repeats 3"
  profiled="wrn-34-10 preact-resnet-18" batch=128 slower=1
fi

# ---- survival

# "90a" and later carry what that chip alone has
device_architecture() {
  [ "$DEVICE" = cpu ] ||
    "$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a >= 9))'
}

build() {
  local arch
  arch=$(device_architecture)
  # 1: of other sources, or for another chip
  if "$PYTHON" csrc/sources.py "$arch" &&
    "$PYTHON" -c 'from awp_kernels import _backend as b; exit(b._library_problem)'; then return; fi
  export PATH="$PATH:/usr/local/cuda/bin"
  [ -z "$arch" ] || command -v nvcc || { echo "nvcc was not found on PATH: it is part of the CUDA toolkit"; return 1; }
  # by CMake alone: setup.py needs a newer setuptools than some machines have
  cmake -S . -B "$WORK/build" "-DAWP_CUDA_ARCHS=$arch" \
    "-DAWP_TORCH_DIR=$("$PYTHON" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')"
  cmake --build "$WORK/build" --parallel
  cp "$WORK/build/libawp_kernels.so" kernels/awp_kernels/
  "$PYTHON" csrc/sources.py --write "$arch"
}

first_contact() {
  "$PYTHON" -m bench.first_contact --device "$DEVICE" --seconds "$((LIMIT - 8))" --json "$OUT/first-contact.json" \
    ${REHEARSE:+--rehearse}
}

# ---- measure

profiles() {
  local model
  for model in $profiled; do
    "$PYTHON" -m bench.step.where --model "$model" --batch-size $batch --device "$DEVICE" --json "$OUT/where-$model.json" \
      --table "$OUT/where.txt"
  done
}

# step NAME OPTIONS: the engine, the public loop and plain mixed precision, taking turns
step() {
  # shellcheck disable=SC2086  # one option a word
  "$PYTHON" -m bench.step.step --device "$DEVICE" --method at-awp --against both $2 ${STEP_OPTIONS:-} --json "$OUT/$1.json"
}

step_large() { step step-1-large "$large"; }
step_small() { step step-2-small "$small"; }

rates() { "$PYTHON" -m bench.ops.rates --device "$DEVICE" --json "$OUT/rates.json"; }

# the table of samples by CUDA C++, and steps in graphs; Triton's half compiles for minutes
tests() {
  local marker=gpu chosen="(cuda-${AWP_BACKEND:-cuda} or graphs) and not 2_to_31" processes=12
  if [ "$DEVICE" = cpu ]; then marker="not gpu" chosen="cpu-cpp and scalar" processes=0; fi
  # pyproject's options leave the GPU out
  env -u AWP_BACKEND "$PYTHON" -m pytest -o addopts= --strict-markers -p no:cacheprovider -q -m "$marker" \
    --timeout=50 --durations=5 -n $processes --maxschedchunk 1 -k "$chosen" \
    tests/step/test_graphs.py tests/kernels/test_operations.py tests/kernels/test_sgd_step.py
}

# some of the fuzzer's cases; bench/ops/compute_sanitizer.sh by itself takes more, and three more tools
memcheck() {
  if ! command -v compute-sanitizer >/dev/null || [ "$DEVICE" = cpu ]; then
    echo "compute-sanitizer is not there, or there is nothing for it to check: the cases run without"
    "$PYTHON" tests/soak/fuzz.py --device "$DEVICE" --cases 20
    return
  fi
  TOOLS=memcheck BACKENDS=${AWP_BACKEND:-cuda} CASES=20 SECONDS_EACH=$((LIMIT - 6)) bash bench/ops/compute_sanitizer.sh
}

# ---- train

real_run() {
  local options=()
  [ -n "$ARCHIVE" ] || { echo "ARCHIVE: expected the archive or folder to train on, got nothing"; return 2; }
  # shellcheck disable=SC2206  # two numbers
  if [ -n "${STEP_MS:-}" ]; then options+=(--step-ms $STEP_MS); fi
  if [ "$DEVICE" = cpu ]; then options+=(--small --epochs 2); fi
  "$PYTHON" -m bench.study.real_run "$ARCHIVE" --device "$DEVICE" --seconds "$((LIMIT - 8))" \
    --json "$OUT/real-run.json" "${options[@]}"
}

# ---- a rehearsal's

crash() { "$PYTHON" -c 'import ctypes; ctypes.string_at(0)'; }
hang() { sleep 1000; }

# `timeout` needs a program: this script, called with a stage's name
if [ "${1:-}" = --stage ]; then
  "$2"
  exit
fi

failed=()

# stage NAME SECONDS LINES: runs a stage within what is left of the command's time, keeps its output, shows the last lines
stage() {
  local begin=$SECONDS status=0 outcome
  case " ${STAGES:-$1} " in *" $1 "*) ;; *) return ;; esac
  export LIMIT=$((slower * $2 < end - SECONDS ? slower * $2 : end - SECONDS))
  echo "== $1" | tee -a "$OUT/stages.log"
  if [ "$LIMIT" -lt 8 ]; then
    outcome="not begun"
  else
    # an interrupt first: bench/step/step.py then writes the rounds that are whole
    timeout --signal=INT --kill-after=5 $((LIMIT - 5)) bash bench/gpu.sh --stage "$1" >"$WORK/log" 2>&1 || status=$?
    tail -n "$3" "$WORK/log"
    cat "$WORK/log" >>"$OUT/stages.log"
    case $status in
      0) outcome=held ;;
      124 | 137) outcome="cut off" ;;
      *) outcome="failed with $status" ;;
    esac
  fi
  echo "== $1: $outcome after $((SECONDS - begin)) of $LIMIT s" | tee -a "$OUT/stages.log"
  printf '{"stage": "%s", "outcome": "%s", "seconds": %d, "limit": %d}\n' \
    "$1" "$outcome" $((SECONDS - begin)) "$LIMIT" >>"$OUT/stages.jsonl"
  [ "$outcome" = held ] || failed+=("$1")
}

if [ -n "${WHEELS:-}" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --target "$WORK/site" "$WHEELS"/*.whl
fi
# most valuable first
case "${1:-}" in
  survival)
    end=$((SECONDS + 80 * slower))
    stage build 60 4
    stage first_contact 75 30
    ;;
  measure)
    end=$((SECONDS + 300 * slower))
    if [ -n "$REHEARSE" ]; then
      stage crash 8 4
      slower=1 stage hang 8 4
    fi
    stage profiles 55 30
    stage step_large 85 30
    stage step_small 55 30
    stage rates 25 10
    stage tests 60 12
    stage memcheck 20 4
    ;;
  train)
    end=$((SECONDS + 400 * slower))
    stage real_run 398 30
    ;;
  *)
    echo "usage: bash bench/gpu.sh survival|measure|train; the first lines of the file say what each does" >&2
    exit 2
    ;;
esac

"$PYTHON" -m bench.gpu_result "$OUT"
if [ ${#failed[@]} -gt 0 ]; then
  echo "did not hold: ${failed[*]}"
  exit 1
fi
echo "all stages held"
