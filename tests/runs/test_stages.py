"""What the recipes do around their stages: with a program in the place of qwen2 that writes down how it was called."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = r"""#!/bin/bash
echo "$*" >> "$CALLS"
case "$1 $2" in
  "report has") grep -qx "$4" "$3/finished" 2> /dev/null ;;
  "report add") [ "$4" != "$DIES" ] && echo "$4" >> "$3/finished" ;;
  "tokenizer train") mkdir -p "${@: -1}" ;;
  "data prepare")
    if [ -n "$KILL" ]; then
      until [ "$(cat "${4%/*}/.seconds/texts")" -gt 100 ]; do sleep 0.1; done
      kill -9 $PPID
    fi ;;
  "budget "*)
    all="$*"; out=${all#*--out }; out=${out%% --seconds*}
    mkdir "$out" || { echo "qwen2: $out: exists already" >&2; exit 1; }
    touch "$out/short.flags" "$out/long.flags" ;;
  "run "*) [ -z "$FAILS" ] || { echo "qwen2: no memory is left" >&2; exit 1; } ;;
esac
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a recipe is a shell script")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout under a path with a blank: the recipes, and the program where they look for qwen2."""
    folder = tmp_path / "my work"
    shutil.copytree(ROOT / "runs", folder / "runs", ignore=shutil.ignore_patterns("out"))
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "qwen2").write_text(PROGRAM)
    (folder / ".venv" / "bin" / "qwen2").chmod(0o755)
    return folder


def recipe(checkout: Path, *words: str, name: str = "base.sh", **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What became of a recipe, and how it called the program."""
    calls = checkout / "calls"
    calls.write_text("")
    known = {key: value for key, value in os.environ.items() if key != "QWEN2"}
    done = subprocess.run(
        [checkout / "runs" / name, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**known, "CALLS": str(calls), "KILL": "", "FAILS": "", "DIES": "", **environment},
    )
    return done, calls.read_text().splitlines()


def called(calls: list[str], beginning: str) -> str:
    (line,) = [line for line in calls if line.startswith(beginning)]
    return line


def seconds(calls: list[str], out: Path, stage: str) -> int:
    return int(called(calls, f"report add {out} {stage} ").rpartition("--seconds ")[2])


@pytest.mark.parametrize("words", [["--minutes", "abc"], ["--minutes", "0"], ["--minutes", "2.5"], ["--minutes", "-3"], ["--fast"]])
def test_what_cannot_be_meant_ends_before_anything_runs(checkout: Path, words: list[str]) -> None:
    done, calls = recipe(checkout, *words, str(checkout / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("base.sh: ")
    assert words[-1] in done.stderr
    assert done.stderr.count("\n") == 1
    assert calls == []
    assert not (checkout / "out").exists()


def test_numbers_of_the_other_recipe(checkout: Path) -> None:
    done, calls = recipe(checkout, "--more", "many", name="upcycle.sh")
    assert (done.returncode, calls) == (2, [])
    assert done.stderr == "upcycle.sh: --more many: must be a whole number from 1 up\n"


@pytest.mark.parametrize(("planned", "words"), [(True, []), (False, []), (True, ["--config", "other.json"])])
def test_the_parent_has_the_bases_shape_unless_another_is_given(checkout: Path, planned: bool, words: list[str]) -> None:
    base, out = checkout / "a base", checkout / "an out"
    done, calls = recipe(checkout, *words, str(base), str(out), name="upcycle.sh")
    assert (done.returncode, done.stderr, calls) == (2, f"upcycle.sh: {base}: no shards there; runs/base.sh makes them\n", [])
    assert not out.exists()
    for folder, name in (("data/shards", "manifest.json"), *([("budget", "config.json")] if planned else [])):
        (base / folder).mkdir(parents=True)
        (base / folder / name).write_text("{}")
    done, calls = recipe(checkout, *words, str(base), str(out), name="upcycle.sh")
    assert (done.returncode, done.stderr) == (0, "")
    shape = "--config other.json" if words else f"--config {base}/budget/config.json" if planned else "--size nano"
    assert f" {shape} --steps 1200 --lr 1e-3 --schedule constant" in called(
        calls, f"pretrain {base}/data/shards --tokenizer {base}/tokenizer --out {out}/parent "
    )
    for name, source in (("dense", "parent"), ("mixture", "start")):
        assert f" --from {out}/{source} --steps 2000 --lr 1e-3 --seed 1" in called(
            calls, f"pretrain {base}/data/shards --tokenizer {base}/tokenizer --out {out}/{name} "
        )


def test_every_stage_under_a_path_with_a_blank(checkout: Path) -> None:
    out = checkout / "an out"
    done, calls = recipe(checkout, str(out))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    finished = (out / "finished").read_text().split()
    assert finished == ["corpus", "texts", "tokenizer", "shards", "budget", "short", "long", "model", "samples"]
    assert called(calls, "report page").endswith("--title A base model in 29 languages")
    done, calls = recipe(checkout, str(out))
    assert [line.split(":")[1] for line in done.stdout.splitlines() if line.startswith("== ")] == [" finished before"] * 9
    assert not [line for line in calls if not line.startswith("report ")]


def test_why_a_sample_failed_is_said(checkout: Path) -> None:
    done, _ = recipe(checkout, str(checkout / "out"), FAILS="yes")
    assert done.returncode == 1
    assert done.stderr == "base.sh: qwen2 run failed on the prompt in en: qwen2: no memory is left\n"


def test_a_budget_that_was_made_but_not_written_down_is_used(checkout: Path) -> None:
    done, calls = recipe(checkout, str(checkout / "out"), DIES="budget")
    assert done.returncode == 1
    done, calls = recipe(checkout, str(checkout / "out"))
    assert done.returncode == 0, done.stderr
    assert not [line for line in calls if line.startswith("budget ")]


def test_seconds_of_all_sittings_count(checkout: Path) -> None:
    out = checkout / "out"
    (out / ".seconds").mkdir(parents=True)
    (out / ".seconds" / "corpus").write_text("600\n")
    (out / ".seconds" / "texts").write_text("100\n")
    done, _ = recipe(checkout, str(out), KILL="yes")
    assert done.returncode == -9
    assert int((out / ".seconds" / "texts").read_text()) > 100
    done, calls = recipe(checkout, str(out))
    assert done.returncode == 0, done.stderr
    assert seconds(calls, out, "texts") > 100
    assert int(called(calls, f"budget {out}/data/shards").split("--seconds ")[1].split()[0]) <= 25 * 60 - 700 - 150


def test_the_recipe_that_goes_on_from_a_base(checkout: Path) -> None:
    base, out = checkout / "a base", checkout / "an out"
    (base / "model" / "base").mkdir(parents=True)
    (base / "model" / "base" / "config.json").write_text("{}")
    (base / "data" / "text").mkdir(parents=True)
    (base / "data" / "text" / "manifest.json").write_text("{}")
    texts = [json.dumps({"text": f"{language} {i}", "metadata": {"language": language}}) for i in range(8) for language in ("en", "zh")]
    (base / "data" / "text" / "00000.jsonl").write_text("\n".join(texts) + "\n")
    out.mkdir()
    done, calls = recipe(checkout, "--seed", "3", str(base), str(out), name="tiny.sh")
    assert (done.returncode, done.stderr) == (0, "")
    finished = (out / "finished").read_text().split()
    assert [finished[0], finished[1], finished[2], finished[-1]] == ["chats", "problems", "before", "answers"]
    assert calls[0] == f"report follow {out} {base}"
    trained = [line for line in calls if line.startswith(("sft ", "dpo "))]
    assert len(trained) == sum(name.startswith(("sft", "dpo")) for name in finished)
    assert all(" --seed 3 " in line for line in trained)
    kept = [json.loads(line)["text"] for i in range(4) for line in (out / "texts" / f"{i}.jsonl").read_text().splitlines()]
    assert kept == [f"{language} {i + more}" for i in range(4) for more in (0, 4) for language in ("en", "zh")], "each round has its own"
    measured = [line for line in calls if line.startswith("synth exact")]
    assert len(measured) == sum(name.startswith(("before", "after")) for name in finished)
    assert all(f"{out}/problems/held-out.jsonl" in line for line in measured)
    done, calls = recipe(checkout, "--seed", "3", str(base), str(out), name="tiny.sh")
    assert [line.split(":")[1] for line in done.stdout.splitlines() if line.startswith("== ")] == [" finished before"] * len(finished)
    assert not [line for line in calls if not line.startswith("report ")]
