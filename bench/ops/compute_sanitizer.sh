#!/usr/bin/env bash
# The fuzzer and the table of samples on a GPU under NVIDIA's compute-sanitizer, which must report nothing:
#     bash bench/ops/compute_sanitizer.sh
# TOOLS: some of "memcheck racecheck initcheck synccheck". BACKENDS: "cuda triton". CASES: of the fuzzer (400).
# SECONDS_EACH: a tool's limit with a backend (600); a run that was cut short has found nothing until then, and says so.
# Without torch's caching allocator each tensor has bounds of its own. A report ends it with exit code 9.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-python3}
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH="$PWD/kernels:$PWD/engine${PYTHONPATH:+:$PYTHONPATH}"
if ! command -v compute-sanitizer >/dev/null; then
  echo "compute-sanitizer was not found on PATH: it is part of the CUDA toolkit" >&2
  exit 2
fi

failed=()
for tool in ${TOOLS:-memcheck racecheck initcheck synccheck}; do
  for backend in ${BACKENDS:-cuda triton}; do
    status=0
    timeout "${SECONDS_EACH:-600}" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
      "$python" tests/soak/fuzz.py --device cuda --backend "$backend" --cases "${CASES:-400}" || status=$?
    if [ $status -eq 124 ]; then
      echo "$tool, $backend: cut short; nothing was found until then"
    elif [ $status -ne 0 ]; then
      failed+=("$tool/$backend")
    fi
  done
done

if [ ${#failed[@]} -gt 0 ]; then
  echo "reports from: ${failed[*]}"
  exit 9
fi
echo "no reports"
