#!/usr/bin/env bash
# A model that answers from a base model: fine-tuning, rejection sampling in rounds, DPO, on short arithmetic asked in several languages
# beside plain chat; exact match and bits per byte before and after each stage, a quantized GGUF file, and what it answers.
#
#   runs/tiny.sh [--quick] [--seed N] [BASE] [OUT]      BASE: runs/out/base, OUT: runs/out/tiny
#
# BASE is a run of base.sh. It takes about 28 minutes on two cores of a Zen 4. --seed (1) is that of the order of examples and of what is sampled;
# problems are the same for every seed. --quick goes through the same steps in a minute. Interrupted, the same command goes on.
# At the end OUT/report.html shows everything from the raw text on, and OUT/report.json has the same figures.
set -euo pipefail
source "$(dirname "$0")/stages.sh"

quick='' seed=1 places=()
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=yes ;;
    --seed) seed=${2:?--seed needs a number}; shift ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit ;;
    -*) fail 2 "$1 is unknown; tiny.sh --help shows what there is" ;;
    *) places+=("$1") ;;
  esac
  shift
done
base=${places[0]:-runs/out/base} out=${places[1]:-runs/out/tiny}
whole --seed "$seed"
[ -e "$base/model/base/config.json" ] || fail 2 "$base: no base model there; runs/base.sh makes one"
[ -e "$base/data/text/manifest.json" ] || fail 2 "$base: no texts there; runs/base.sh makes them"

languages=(en zh de fr es)
if [ -z "$quick" ]; then
  chats=(chatterbot-corpus llamafactory) dialogues=150
  problems=(--count 8000 --held-out 2000 --solutions 800 --largest 30)
  plateau=20 epochs=(10 9 8) k=16 rows=(--length 512 --batch 4 --micro-batch 4 --lr 4e-3) bytes=6000 replayed=4000
else
  chats=(chatterbot-corpus) dialogues=5
  problems=(--count 60 --held-out 40 --solutions 300 --largest 5)
  plateau=6 epochs=(2) k=16 rows=(--length 256 --batch 8 --micro-batch 8 --lr 4e-3) bytes=600 replayed=300
fi
for language in "${languages[@]}"; do problems+=(--language "$language"); done
solving=(--max-tokens 32 --max-batch 128)   # the longest answers to problems have about 15 tokens
begin

stage_chats() {  # the shortest ones, which are plain chat, in the languages of the problems, as many of each at most
  qwen2 data fetch "${chats[@]}" --corpus "$out/chats"
  local package spoken
  spoken="\"language\": \"($(IFS='|'; echo "${languages[*]}"))\""
  mkdir -p "$out/chats"
  for package in "${chats[@]}"; do
    [ ! -e "$out/chats/chat/$package.jsonl" ] ||   # a package that is gone: said by qwen2, and in corpus.json
      LC_ALL=C awk -v spoken="$spoken" 'match($0, spoken) { print length "\t" substr($0, RSTART, RLENGTH) "\t" $0 }' "$out/chats/chat/$package.jsonl" |
      LC_ALL=C sort -s -n | LC_ALL=C awk -F '\t' -v most=$dialogues 'n[$2]++ < most' | LC_ALL=C cut -f 3-
  done > "$out/chats/chats.part"
  mv "$out/chats/chats.part" "$out/chats/chats.jsonl"
}
stage_problems() { qwen2 synth arithmetic "$out/problems" "${problems[@]}" --operation add --operation sub --stories 0.25; }
# measure NAME MODEL [NAME OF AN EARLIER ONE]
measure() {
  local against=()
  mkdir -p "$out/$1"
  [ -z "${3:-}" ] || against=(--against "$out/$3/exact.json")
  [ -e "$out/$1/bits.json" ] || qwen2 bits "$2" "$base/data/shards" --bytes $bytes --out "$out/$1/bits.json"
  qwen2 synth exact "$2" "$out/problems/held-out.jsonl" --out "$out/$1/exact.json" "${solving[@]}" "${against[@]}"
}
# tune VERB NAME MODEL DATA AND FLAGS...: going on where an interruption left it
tune() {
  local verb=$1 name=$2 model=$3 resume=(); shift 3
  if [ -e "$out/$name/config.json" ]; then resume=(--resume); fi
  qwen2 "$verb" "$model" "$@" --out "$out/$name" --seed "$seed" --log-every 20 "${resume[@]}"
}
# texts ROUND BYTES: so much in each language of what the base model was trained on, other documents in each round
texts() {
  mkdir -p "$out/texts"
  # shellcheck disable=SC2016  # awk's
  LC_ALL=C awk -v round="$1" -v rounds=4 -v most="$2" 'match($0, /"language": ?"[a-z]+"/) {
      language = substr($0, RSTART, RLENGTH)
      if (documents[language]++ % rounds == round && (bytes[language] += length) < most) print
    }' "$base"/data/text/*.jsonl > "$out/texts/$1.part"
  mv "$out/texts/$1.part" "$out/texts/$1.jsonl"
}
# learn NAME MODEL EPOCHS ROUND [SAMPLES]: fine-tuning on solutions, chats, the model's own right answers, and texts, so that less of what
# the base model knew is forgotten: each epoch has others of them
learn() {
  local name=$1 model=$2 epochs=$3 own=()
  [ -z "${5:-}" ] || own=("$out/$5/sft.jsonl")   # the newest round alone: what was learned from the one before it solves again
  texts "$4" $((epochs * replayed))
  tune sft "$name" "$model" "$out/problems/sft.jsonl" "$out/chats/chats.jsonl" "${own[@]}" "$out/texts/$4.jsonl" "${rows[@]}" \
    --epochs "$epochs" --text-epochs "$epochs" --eval-share 0.05 --eval-every 200
}
# sample NAME MODEL: answers to the training problems; the right ones become rows, and pairs with wrong ones
sample() {
  qwen2 synth reject "$2" "$out/problems/train.jsonl" --out "$out/$1" --k $k --temperature 1 --seed "$seed" --per-prompt 1 "${solving[@]}"
}
# prefer MODEL SAMPLES
prefer() {
  tune dpo dpo "$1" "$out/$2/pairs.jsonl" --length 128 --batch 32 --micro-batch 32 --lr 5e-5 --beta 0.3 --sft 0.2 --save-every 50
}
stage_model() {
  rm -rf "$out/model" && mkdir "$out/model"
  qwen2 export "$out/dpo" "$out/model/tiny"
  qwen2 quantize "$out/model/tiny" "$out/model/tiny-q8_0.gguf" --to q8_0
}
stage_answers() {
  answers "$out/answers" "$out/model/tiny-q8_0.gguf" 60 << 'PROMPTS'
1-en|What is 18 + 27?
2-de|Ein Seil ist 32 m lang. 17 m werden abgeschnitten. Wie viele Meter bleiben?
3-zh|一本书15元，一支笔12元，一共多少元？
4-fr|Combien font 41 - 16 ?
5-en|Hello
6-es|Hola
PROMPTS
}

main() {  # read whole before it runs: the file may be changed meanwhile
  local last=sft round
  qwen2 report follow "$out" "$base"
  stage chats corpus chats stage_chats
  stage problems rows problems stage_problems
  stage before evaluation before measure before "$base/model/base"
  stage sft tuning sft learn sft "$base/model/base" $plateau 0
  stage after-sft evaluation after-sft measure after-sft "$out/sft" before
  stage sft-twice tuning sft-twice learn sft-twice "$base/model/base" $((2 * plateau)) 0   # what imitation alone can still bring
  stage after-twice evaluation after-twice measure after-twice "$out/sft-twice" after-sft
  for ((round = 1; round <= ${#epochs[@]}; round++)); do
    stage "reject-$round" sampling "reject-$round" sample "reject-$round" "$out/$last"
    stage "sft-$round" tuning "sft-$round" learn "sft-$round" "$out/$last" "${epochs[round - 1]}" "$round" "reject-$round"
    last=sft-$round
    stage "after-$last" evaluation "after-$last" measure "after-$last" "$out/$last" after-sft
  done
  stage "reject-$round" sampling "reject-$round" sample "reject-$round" "$out/$last"
  stage dpo tuning dpo prefer "$out/$last" "reject-$round"
  stage after-dpo evaluation after-dpo measure after-dpo "$out/dpo" after-sft
  stage chat-model export model stage_model
  stage answers samples answers stage_answers
  qwen2 report page "$out" --title "From raw text to a model that answers${quick:+ (quick)}"
}
main; exit
