#!/usr/bin/env bash
# A base model from raw text: corpora from package registries, cleaned and de-duplicated in 29 languages, a tokenizer, pre-training,
# a long-context stage, bits per byte by language, export to a Hugging Face folder and GGUF, and what the model writes.
#
#   runs/base.sh [--quick] [--minutes N] [OUT]        OUT: runs/out/base
#
# It takes about N minutes (25), whatever the machine: how fast that trains is measured, and a slow one trains less and says so.
# --quick goes through the same steps in under three. Interrupted, the same command goes on: finished stages are not done again.
# At the end OUT/report.html shows everything, and OUT/report.json has the same figures.
set -euo pipefail
source "$(dirname "$0")/stages.sh"

quick='' minutes=25 out=runs/out/base
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=yes ;;
    --minutes) minutes=${2:?--minutes needs a number}; shift ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit ;;
    -*) fail 2 "$1 is unknown; base.sh --help shows what there is" ;;
    *) out=$1 ;;
  esac
  shift
done
whole --minutes "$minutes"
if [ -z "$quick" ]; then
  recipe=base vocab=8192 evaluated=12000
  plan=(--stage short=256x16:0.8 --stage long=2048x2:0.2@1000000)
else
  recipe=quick vocab=2048 evaluated=1200
  plan=(--stage short=128x8:0.7 --stage long=512x2:0.3@1000000 --size tiny --trial 1)
fi
released=qwen2.5-coder:0.5b   # whose vocabulary ours is compared with, where it is here already
begin

stage_corpus() { qwen2 data fetch "$recipe" --corpus "$out/corpus"; }
stage_texts() { qwen2 data prepare "$recipe" "$out/data" --corpus "$out/corpus"; }
stage_tokenizer() {
  [ -d "$out/tokenizer" ] || qwen2 tokenizer train "$out/data/text" --vocab $vocab --out "$out/tokenizer"
  local others=()
  if qwen2 list | grep "^$released " > /dev/null; then others=("$released"); else echo "no $released here to compare with: qwen2 pull $released"; fi
  qwen2 tokenizer compare "$out/tokenizer" "${others[@]}" --texts "$out/data/held-out" --json > "$out/tokenizer/compare.part"
  mv "$out/tokenizer/compare.part" "$out/tokenizer/compare.json"
}
stage_shards() { qwen2 data prepare "$recipe" "$out/data" --corpus "$out/corpus" --tokenizer "$out/tokenizer"; }
stage_budget() {
  [ ! -e "$out/budget" ] || return 0   # whole, as it is renamed when it is: broken off before it was written down
  local left=$((minutes * 60 - SECONDS - 150))   # evaluations, export and samples come behind
  if [ -n "$quick" ]; then left=15; elif [ $left -lt 60 ]; then left=60; fi
  qwen2 budget "$out/data/shards" --tokenizer "$out/tokenizer" --out "$out/budget" --seconds $left "${plan[@]}"
}
# train NAME FLAGS...: a stage with the steps that the budget gave it, going on where an interruption left it
train() {
  local name=$1 resume=(); shift
  if [ -e "$out/$name/config.json" ]; then resume=(--resume); fi
  # shellcheck disable=SC2046  # a file of flags
  qwen2 pretrain "$out/data/shards" --tokenizer "$out/tokenizer" --out "$out/$name" $(cat "$out/budget/$name.flags") \
    --log-every 5 --eval-bytes $evaluated "$@" "${resume[@]}"
}
stage_short() { train short --config "$out/budget/config.json" --lr 4e-3; }
stage_long() { train long --from "$out/short" --lr 1e-3; }
stage_model() {
  rm -rf "$out/model" && mkdir "$out/model"
  qwen2 export "$out/long/model" "$out/model/base"
  qwen2 export "$out/long/model" "$out/model/base.gguf"
}
stage_samples() {
  mkdir -p "$out/samples"
  while IFS='|' read -r language prompt; do
    echo "$prompt" > "$out/samples/$language.prompt"
    if ! qwen2 run "$out/model/base.gguf" "$prompt" --complete --plain --temperature 0.7 --top-p 0.9 --seed 1 --max-tokens 60 \
      < /dev/null 2> "$out/samples/said" > "$out/samples/$language.text"; then
      fail 1 "qwen2 run failed on the prompt in $language: $(cat "$out/samples/said")"
    fi
    echo "$language: $prompt$(cat "$out/samples/$language.text")"
  done << 'PROMPTS'
en|Everyone has the right to
de|Wenn die Datei
fr|Vous pouvez
es|Para cambiar
ru|Если вы
zh|您可以
ar|يمكنك
id|Anda dapat
PROMPTS
}

main() {  # read whole before it runs: the file may be changed meanwhile
  stage corpus corpus corpus stage_corpus
  stage texts texts data stage_texts
  stage tokenizer tokenizer tokenizer stage_tokenizer
  stage shards shards data/shards stage_shards
  stage budget budget budget stage_budget
  stage short training short stage_short
  stage long training long stage_long
  stage model export model stage_model
  stage samples samples samples stage_samples
  qwen2 report page "$out" --title "A base model in 29 languages${quick:+ (quick)}"
}
main; exit
