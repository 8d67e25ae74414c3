#!/usr/bin/env bash
# The studies of docs/study.md on 500 training images, two seeds each: `overfitting`, AT and TRADES with and without AWP;
# `recipes`, what came after AWP, and AWP's own variants.
#
#   bench/study/study.sh STUDY DATA OUT [STAGE]     DATA: train/<class>/*.jpg, test/<class>/*.jpg; STAGE: train, measure, draw, all
#
# One process a core, one thread a process. What is done already is not done again.
set -euo pipefail
study=$1 data=$2 out=$3 stage=${4:-all}
jobs=${JOBS:-$(nproc)}
root=$(cd "$(dirname "$0")/../.." && pwd)
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
mkdir -p "$out"

# no augmentation, small batches, many steps: what makes 500 images overfit within minutes
common=(--data.name folder --data.root "$data" --data.train-limit 500 --data.pad 0
  --model.width 8 --global-batch-size 32 --awp.warmup 0
  --evaluation.steps 10 --evaluation.held-out-limit 500 --evaluation.test-limit 1000)

# name, preset, flags
case $study in
  overfitting)
    epochs=80
    common+=(--evaluation.evaluate-every 8) checkpoints="last" few="--limit 500"
    plain="--optimizer.milestones 0.25 0.85 --attack.steps 5 --data.no-flip"
    arms=("at at $plain" "at-awp at-awp $plain" "trades trades $plain" "trades-awp trades-awp $plain") ;;
  recipes)
    # IKL's and ACAT's rate and attack are their own; averages of the last 50 steps or so, since all are but 800
    epochs=50
    common+=(--evaluation.evaluate-every 5 --optimizer.lr 0.1 --optimizer.warmup 2) checkpoints="last best" few="--limit 500 --no-gates"
    plain="--optimizer.schedule cosine --attack.steps 3 --attack.step-size 4/255 --data.no-flip"
    arms=("at at $plain" "at-awp at-awp $plain" "at-awp-shared at-awp $plain --awp.ascent shared"
      "at-awp-limited at-awp $plain --awp.gamma 0.2 --awp.max-rise 0.1"
      "adr-awp adr-awp $plain --average.decay 0.98" "idbh-awp at-awp-idbh ${plain% *} --average.decay 0.98"
      "ikl-awp wrn-34-10-ikl-awp --model.name preact-resnet-18 --data.no-flip --optimizer.no-per-epoch"
      "acat-awp acat --data.no-flip --optimizer.no-per-epoch --average.decay 0.98 --average.warmup 37") ;;
  *) echo "bench/study/study.sh: STUDY: expected overfitting or recipes, got '$study'" >&2; exit 2 ;;
esac
common+=(--epochs "$epochs")

train() { # seed name preset flags...
  local run="$out/$2-seed$1" preset=cifar10-preact-resnet18-$3
  [[ $3 == wrn* ]] && preset=cifar10-$3
  [ -e "$run/report.json" ] ||
    python "$root/engine/train.py" "$preset" "${common[@]}" "${@:4}" --seed "$1" --run-dir "$run" > "$run.log" 2>&1
}

measure() { # seed name
  local run="$out/$2-seed$1" measured
  measured="$run/evaluation-$checkpoint"
  # a best epoch that is the last is measured already
  if [ ! -e "$measured/evaluation.json" ] && ! { [ "$checkpoint" = best ] && grep -q "\"selected_epoch\": $epochs," "$run/report.json"; }; then
    # shellcheck disable=SC2086
    python "$root/engine/evaluate.py" "$run" --checkpoint "$checkpoint" --attacks clean pgd20 autoattack $few \
      --output "$measured" > "$run-$checkpoint.log" 2>&1 || [ $? = 3 ] # 3: measured, with doubts, which the report names
  fi
  [ "$study" = recipes ] || [ -e "$run/landscape/flatness.json" ] ||
    python "$root/engine/landscape.py" "$run" --checkpoint last --mode flatness --images 200 --attempts 2 --epochs 10 \
      > "$run-flatness.log" 2>&1
}

draw() {
  [ "$study" = recipes ] || python "$root/engine/landscape.py" "$out"/{at,at-awp,trades,trades-awp}-seed0 --checkpoint last \
    --mode 1d --images 200 --points 15 --output "$out/landscape" > "$out/landscape.log" 2>&1
  python "$root/bench/study/study.py" "$study" "$out"
}

grid() {
  for seed in 0 1; do
    for arm in "${arms[@]}"; do
      while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
      # shellcheck disable=SC2086
      "$what" "$seed" $arm &
    done
  done
  wait
}

measure_all() {
  for checkpoint in $checkpoints; do what=measure grid; done
}

case $stage in
  train) what=train grid ;;
  measure) measure_all ;;
  draw) draw ;;
  all) what=train grid && measure_all && draw ;;
  *) echo "bench/study/study.sh: STAGE: expected train, measure, draw or all, got '$stage'" >&2; exit 2 ;;
esac
