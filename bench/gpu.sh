#!/usr/bin/env bash
# Builds and tests on a GPU machine, and times whole training steps and single operations, in at most nine minutes:
#     bash bench/gpu.sh
# DEVICE=cpu runs the same stages on the CPU, on small models. OUT: for log and results (./gpu-out), at most 8 files:
# stages.log, report.md, plots, and <device>-<date>.json for bench/results/. STAGES: some of the stages, in this order.
# STEP_OPTIONS: for both runs of bench/step.py, such as "--engine cuda_graphs=true compile=true". BENCH_OPTIONS: for `pytest
# bench`, in place of sizes, passes and rounds. COMMIT: what is measured, where there is no git checkout. PYTHON: the
# interpreter (python3). A failing stage does not stop the rest; it shows in the exit code.
set -euo pipefail

export DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python3} OUT=${OUT:-gpu-out}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${WORK:-}" ]; then
  WORK=$(mktemp -d)
  trap 'rm -rf "$WORK"' EXIT
fi
# the sources are found even where neither pip nor setup.py can install
export WORK PYTHONPATH="$PWD/kernels:$PWD/engine${PYTHONPATH:+:$PYTHONPATH}" MPLCONFIGDIR="$WORK/matplotlib"

# pyproject's options ask for coverage and leave the GPU out
pytest=("$PYTHON" -m pytest -o addopts= --strict-markers -p no:cacheprovider -q)
if [ "$DEVICE" = cpu ]; then
  marker="not gpu and not compile"
  large="--model wrn-10-1 --batch-size 16 --repeats 2" small="--model preact-resnet-digits --batch-size 16 --repeats 2"
  chosen="--sizes 1e3,1e5 --passes 1 --rounds 3 --seconds 70 -k 1e"
else
  marker=gpu
  graphs="--engine cuda_graphs=true"
  large="--model wrn-34-10 --batch-size 128 --repeats 6 $graphs" small="--model preact-resnet-18 --batch-size 128 --repeats 8 $graphs"
  # from what launches cost to what memory bandwidth costs, beside the two models
  chosen="--sizes 1e4,1e6,1e8 --passes 2 --rounds 7 --seconds 70"
fi
bench_options="--device $DEVICE ${BENCH_OPTIONS:-$chosen}"

versions() {
  "$PYTHON" - <<'PYTHON'
import platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
for name in ("triton", "pytest", "pytest_benchmark", "setuptools", "tyro", "amp_C"):
    try:
        print(name, getattr(__import__(name), "__version__", "is there"))
    except ImportError:
        print(name, "is missing")
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
PYTHON
  for tool in "nvidia-smi" "nvcc --version" "cmake --version" "c++ --version"; do
    echo "\$ $tool"
    $tool 2>&1 || echo "failed"
  done
  [ "$DEVICE" = cpu ] || "$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"'
}

# "90a" and later carry what that chip alone has
device_architecture() {
  "$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a >= 9))'
}

build() {
  if [ "$DEVICE" = cpu ]; then AWP_CUDA_ARCHS=; else AWP_CUDA_ARCHS=${AWP_CUDA_ARCHS-$(device_architecture)}; fi
  export AWP_CUDA_ARCHS
  echo "AWP_CUDA_ARCHS=$AWP_CUDA_ARCHS"
  # what came with the tree was built elsewhere
  rm -f kernels/awp_kernels/libawp_kernels.so kernels/awp_kernels/build.json
  "$PYTHON" -m pip install --no-build-isolation --no-deps -e . || echo "pip cannot install here: building in place"
  [ -f kernels/awp_kernels/libawp_kernels.so ] || "$PYTHON" setup.py build_ext --inplace
  cat kernels/awp_kernels/build.json
}

implementations() {
  "$PYTHON" -m awp_kernels | tee "$WORK/implementations.txt"
  [ "$DEVICE" = cpu ] || grep -q "^  cuda  *available" "$WORK/implementations.txt"
}

# options that leave out test files whose imports are missing here
ignored_tests() {
  "$PYTHON" -W ignore - <<'PYTHON'
import importlib, pathlib, sys
sys.path.insert(0, "tests")
for path in sorted(pathlib.Path("tests").glob("test_*.py")):
    try:
        importlib.import_module(path.stem)
    except ModuleNotFoundError as error:
        print(f"--ignore={path}")
        print(f"left out: {path}: {error}", file=sys.stderr)
    except BaseException as error:
        print(f"{path}: {error!r}: pytest will tell more", file=sys.stderr)
PYTHON
}

tests() {
  local ignored options=(tests)
  ignored=$(ignored_tests)
  # the CPU has `pytest` for all of it; this stands for the stage
  if [ "$DEVICE" = cpu ]; then options=(tests/test_awp.py); fi
  # Triton compiles a kernel for each dtype: in several processes where pytest-xdist is there
  if "$PYTHON" -c "import xdist" 2>/dev/null; then options+=(-n 8); fi
  # shellcheck disable=SC2086  # one option a word
  "${pytest[@]}" -m "$marker" --timeout=100 --durations=5 $ignored "${options[@]}"
}

# sanitize TOOL SECONDS: some of the fuzzer's cases; bench/compute_sanitizer.sh by itself takes more, and two more tools
sanitize() {
  if ! command -v compute-sanitizer >/dev/null || [ "$DEVICE" = cpu ]; then
    echo "compute-sanitizer is not there, or there is nothing for it to check: the cases run without"
    timeout "$2" "$PYTHON" tests/fuzz.py --device "$DEVICE" --cases 20
    return
  fi
  TOOLS=$1 BACKENDS=cuda CASES=100 SECONDS_EACH=$2 bash bench/compute_sanitizer.sh
}

memcheck() { sanitize memcheck 35; }
racecheck() { sanitize racecheck 30; }

# step NAME OPTIONS: the engine, the public loop and plain mixed precision, taking turns
step() {
  # shellcheck disable=SC2086  # one option a word
  "$PYTHON" bench/step.py --device "$DEVICE" --method at-awp --against both $2 ${STEP_OPTIONS:-} --json "$WORK/$1.json"
}

step_large() { step step-1-large "$large"; }
step_small() { step step-2-small "$small"; }

operations() {
  # shellcheck disable=SC2086  # one option a word
  "${pytest[@]}" bench --benchmark-enable "--benchmark-json=$WORK/operations.json" $bench_options
}

report() {
  local name results
  name=$("$PYTHON" - <<'PYTHON'
import datetime, os, re, torch
name = torch.cuda.get_device_name() if os.environ["DEVICE"] == "cuda" else "cpu"
print(re.sub(r"[^a-z0-9]+", "-", name.lower()), datetime.date.today(), sep="-")
PYTHON
  )
  # what there is: a stage may have failed
  shopt -s nullglob
  results=("$WORK"/step-*.json)
  # an empty file is what an interrupted run leaves
  if [ -s "$WORK/operations.json" ]; then results+=("$WORK/operations.json"); fi
  "$PYTHON" bench/report.py "${results[@]}" --out "$OUT" --result "$OUT/$name.json" \
    --command "pytest bench --benchmark-enable -o addopts= --benchmark-json=operations.json $bench_options" |
    tee "$OUT/report.md"
}

# `timeout` needs a program: this script, called with a stage's name
if [ $# -eq 1 ]; then
  "$1"
  exit
fi

failed=()

# stage NAME SECONDS LINES: runs a stage, keeps its output, shows the last lines
stage() {
  local begin=$SECONDS status=0
  case " ${STAGES:-$1} " in *" $1 "*) ;; *) return ;; esac
  echo "== $1" | tee -a "$OUT/stages.log"
  # an interrupt: bench/step.py then writes the rounds that are whole
  timeout --signal=INT --kill-after=10 "$2" bash bench/gpu.sh "$1" >"$WORK/log" 2>&1 || status=$?
  cat "$WORK/log" >>"$OUT/stages.log"
  tail -n "$3" "$WORK/log"
  echo "== $1: exit code $status after $((SECONDS - begin)) s" | tee -a "$OUT/stages.log"
  if [ $status -ne 0 ]; then failed+=("$1"); fi
}

rm -f "$OUT/stages.log"
# limits add up to nine minutes
stage versions 15 40
stage build 120 4
stage implementations 10 20
stage tests 60 12
stage step_large 90 30
stage step_small 55 30
stage operations 90 3
stage report 15 200
stage memcheck 45 4
stage racecheck 40 4

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all stages passed"
