#!/usr/bin/env bash
# The robust-overfitting study of docs/study.md: 500 training images, AT and TRADES, with and without AWP, two seeds.
#
#   bench/study/study.sh DATA OUT [STAGE]     DATA holds train/<class>/*.jpg and test/<class>/*.jpg; STAGE: train, measure, draw, all
#
# One process a core, one thread a process. What is done already is not done again.
set -euo pipefail
data=$1 out=$2 stage=${3:-all}
jobs=${JOBS:-$(nproc)}
root=$(cd "$(dirname "$0")/../.." && pwd)
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
mkdir -p "$out"

# no augmentation, small batches, many steps: what makes 500 images overfit within minutes
common=(--data.name folder --data.root "$data" --data.train-limit 500 --data.pad 0 --data.no-flip
  --model.width 8 --global-batch-size 32 --epochs 80 --optimizer.milestones 0.25 0.85 --attack.steps 5
  --evaluation.steps 10 --evaluation.evaluate-every 8 --evaluation.held-out-limit 500 --evaluation.test-limit 1000)

train() { # preset gamma seed
  local run="$out/$1-seed$3"
  [ -e "$run/report.json" ] ||
    python "$root/engine/train.py" "cifar10-preact-resnet18-$1" "${common[@]}" --awp.gamma "$2" --awp.warmup 0 \
      --seed "$3" --run-dir "$run" > "$run.log" 2>&1
}

measure() { # preset gamma seed
  local run="$out/$1-seed$3"
  [ -e "$run/evaluation/evaluation.json" ] ||
    python "$root/engine/evaluate.py" "$run" --checkpoint last --attacks clean pgd20 autoattack --limit 500 --output "$run/evaluation" \
      > "$run-evaluation.log" 2>&1 || [ $? = 3 ] # 3: measured, with doubts, which the report names
  [ -e "$run/landscape/flatness.json" ] ||
    python "$root/engine/landscape.py" "$run" --checkpoint last --mode flatness --images 200 --attempts 2 --epochs 10 \
      > "$run-flatness.log" 2>&1
}

draw() {
  python "$root/engine/landscape.py" "$out"/{at,at-awp,trades,trades-awp}-seed0 --checkpoint last --mode 1d --images 200 \
    --points 15 --output "$out/landscape" > "$out/landscape.log" 2>&1
  python "$root/bench/study/study.py" "$out"
}

grid() {
  for seed in 0 1; do
    for row in "at 0" "at-awp 0.01" "trades 0" "trades-awp 0.005"; do
      # shellcheck disable=SC2086
      set -- $row
      while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
      "$what" "$1" "$2" "$seed" &
    done
  done
  wait
}

case $stage in
  train | measure) what=$stage grid ;;
  draw) draw ;;
  all) what=train grid && what=measure grid && draw ;;
  *) echo "bench/study/study.sh: STAGE: expected train, measure, draw or all, got '$stage'" >&2; exit 2 ;;
esac
