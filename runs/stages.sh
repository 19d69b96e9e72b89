# What the recipes of this folder share: the command, numbers that are checked before anything runs, and stages that are done once.
#
#   source "$(dirname "$0")/stages.sh"      then, with $out set: begin; stage NAME KIND FOLDER COMMAND...

if [ -n "${QWEN2:-}" ]; then
  read -ra program <<< "$QWEN2"   # QWEN2='nice qwen2' runs it in another way
else
  program=("$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/qwen2")
  [ -x "${program[0]}" ] || program=(qwen2)
fi
qwen2() { command "${program[@]}" "$@"; }

# fail CODE WORDS...: say what is wrong, and end
fail() { local code=$1; shift; echo "$(basename "$0"): $*" >&2; exit "$code"; }

# whole FLAG VALUE: a number from 1 up, or the end
whole() { case $2 in '' | *[!0-9]* | 0* | ???????*) fail 2 "$1 $2: must be a whole number from 1 up" ;; esac; }

# begin: make the folder $out, and go on counting seconds where the sittings before this one stopped
begin() {
  mkdir -p "$out/.seconds"
  SECONDS=0
  local file
  for file in "$out"/.seconds/*; do
    case $file in *.part | *'*') ;; *) SECONDS=$((SECONDS + $(cat "$file"))) ;; esac
  done
}

# stage NAME KIND FOLDER COMMAND...: run it unless it is finished, and write down how long it took, in all sittings together
stage() {
  local name=$1 kind=$2 folder=$3 started=$SECONDS file="$out/.seconds/$1" clock; shift 3
  if qwen2 report has "$out" "$name" --quiet; then echo "== $name: finished before"; return; fi
  echo "== $name"
  [ ! -e "$file" ] || started=$((SECONDS - $(cat "$file")))
  count > /dev/null 2>&1 &
  clock=$!
  # shellcheck disable=SC2064  # the clock of now
  trap "kill $clock 2> /dev/null || true" EXIT
  "$@"
  kill $clock 2> /dev/null || true
  wait $clock 2> /dev/null || true
  trap - EXIT
  echo $((SECONDS - started)) > "$file"
  qwen2 report add "$out" "$name" --kind "$kind" --folder "$folder" --seconds $((SECONDS - started))
}
# answers FOLDER MODEL TOKENS: lines NAME|PROMPT from the standard input, each with what the model answers, greedily, in FOLDER
answers() {
  local name prompt
  mkdir -p "$1"
  while IFS='|' read -r name prompt; do
    echo "$prompt" > "$1/$name.prompt"
    if ! qwen2 run "$2" "$prompt" --plain --temperature 0 --max-tokens "$3" < /dev/null 2> "$1/said" > "$1/$name.answer"; then
      fail 1 "qwen2 run failed on the prompt $name: $(cat "$1/said")"
    fi
    echo "$prompt -> $(cat "$1/$name.answer")"
  done
}
# count: every second, for as long as this shell lives, so that a sitting which is killed counts too
count() {
  while kill -0 $$; do
    echo $((SECONDS - started)) > "$file.part" && mv "$file.part" "$file"
    sleep 1
  done
}
