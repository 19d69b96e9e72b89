#!/usr/bin/env bash
# Whether upcycling pays: a dense model is trained on, and so is the mixture of 16 experts made from it, on the same further tokens.
#
#   runs/upcycle.sh [--quick] [--steps N] [--more M] [--config FILE] [BASE] [OUT]    BASE: runs/out/base, OUT: runs/out/upcycle
#
# BASE is a run of base.sh, whose shards and tokenizer are used. N steps (1200) make the dense parent, of the shape that FILE says, else
# of BASE's model (BASE/budget/config.json), else of nano size; both go on for M steps (2000). A step is 4,096 tokens. OUT/report.html
# has the curves. --quick takes a few steps of each, which shows that all of it runs. Interrupted, the same command goes on.
set -euo pipefail
source "$(dirname "$0")/stages.sh"

steps=1200 more=2000 evaluated=12000 shape=() places=()
while [ $# -gt 0 ]; do
  case $1 in
    --quick) steps=4 more=3 evaluated=300 ;;
    --steps) steps=${2:?--steps needs a number}; shift ;;
    --more) more=${2:?--more needs a number}; shift ;;
    --config) shape=(--config "${2:?--config needs a config.json}"); shift ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit ;;
    -*) fail 2 "$1 is unknown; upcycle.sh --help shows what there is" ;;
    *) places+=("$1") ;;
  esac
  shift
done
base=${places[0]:-runs/out/base} out=${places[1]:-runs/out/upcycle}
if [ ${#shape[@]} -eq 0 ]; then
  if [ -e "$base/budget/config.json" ]; then shape=(--config "$base/budget/config.json"); else shape=(--size nano); fi
fi
whole --steps "$steps"
whole --more "$more"
[ -e "$base/data/shards/manifest.json" ] || fail 2 "$base: no shards there; runs/base.sh makes them"
begin

# train NAME FLAGS...: the same rows, rate and schedule for all
train() {
  local name=$1 resume=(); shift
  if [ -e "$out/$name/config.json" ]; then resume=(--resume); fi
  qwen2 pretrain "$base/data/shards" --tokenizer "$base/tokenizer" --out "$out/$name" --length 256 --batch 16 --micro-batch 8 \
    --log-every 5 --eval-bytes $evaluated "$@" "${resume[@]}"
}
mixture() {
  rm -rf "$out/start"
  qwen2 upcycle "$out/parent/model" "$out/start" --experts 16 --active 4
}

main() {
  # The parent's rate stays high to its end, so that what goes on from it is not made to climb a hill that only one of them knows.
  stage parent training parent train parent "${shape[@]}" --steps "$steps" --lr 1e-3 --schedule constant
  stage start upcycling start mixture
  stage dense training dense train dense --from "$out/parent" --steps "$more" --lr 1e-3 --seed 1
  stage mixture training mixture train mixture --from "$out/start" --steps "$more" --lr 1e-3 --seed 1
  qwen2 report page "$out" --title 'Upcycling: a mixture of 16 experts and its dense parent'
}
main; exit
