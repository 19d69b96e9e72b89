"""Rejection sampling: what is kept, what is counted, that a killed run goes on, that a seed decides everything."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen2.post.checks.checkers import make_checker
from qwen2.post.rows.encode import encode
from qwen2.post.rows.readers import read
from qwen2.post.rows.records import Example, Preference
from qwen2.post.synth.prompts import Prompt, Prompts, read_prompts
from qwen2.post.synth.reject import reject
from qwen2.post.synth.sampling import Sampled, seed_of
from qwen2.post.synth.settings import RejectSettings
from qwen2.post.synth.summary import pass_at, sizes
from tests.conftest import tiny_model
from tests.post.fake import FakeSampler

NUMBER = make_checker("number")
K8 = RejectSettings(k=8, per_prompt=2)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i} + {i}?", "answer": 2 * i, "source": "ab"[i % 2], "language": "en"} for i in range(count)]


@pytest.fixture
def prompts(tmp_path: Path) -> Prompts:
    return read_prompts([write(tmp_path / "sums.jsonl", sums(10))], NUMBER)


# --- what comes of it


def test_rows_and_summary(prompts: Prompts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = reject(FakeSampler(), prompts, NUMBER, K8, out)
    assert (summary.prompts, summary.solved, summary.answers, summary.cut) == (10, 10, 80, 10)
    assert (summary.right, summary.wrong, summary.failed) == (30, 40, {})  # samples 0, 2 and 6; 4 is right and cut off
    assert summary.pass_at == pytest.approx({1: 3 / 8, 2: 1 - (5 * 4) / (8 * 7), 4: 1 - (5 * 4 * 3 * 2) / (8 * 7 * 6 * 5), 8: 1.0})
    assert {name: (group.prompts, group.acceptance) for name, group in summary.by_source.items()} == {"a": (5, 0.375), "b": (5, 0.375)}
    sft, pairs = rows(out / "sft.jsonl"), rows(out / "pairs.jsonl")
    assert (len(sft), len(pairs)) == (summary.sft_rows, summary.pairs) == (20, 10)
    first = sft[0]["provenance"]
    assert sft[0]["messages"][0] == {"role": "user", "content": "What is 0 + 0?"}  # in the order of the file, not of the sampler
    key = prompts.found[0].key
    assert first == {
        "model": "fake", "digest": "0123456789abcdef", "sampling": {"temperature": 1.0, "top_k": 0}, "checker": "number", "source": "a",
        "language": "en", "prompt": f"{tmp_path / 'sums.jsonl'}:1", "key": key, "seed": seed_of(0, key) + first["sample"], "sample": first["sample"], "verdict": "0",
    }  # fmt: skip
    for row in pairs:
        told, wanted = row["provenance"], int(row["prompt"][0]["content"].split()[2]) * 2
        assert NUMBER.check(row["chosen"][0]["content"], {"answer": wanted}).right
        assert NUMBER.check(row["rejected"][0]["content"], {"answer": wanted}).right is False
        assert (told["rule"], told["chosen"]["verdict"]) == ("length", str(wanted))
    assert json.loads((out / "summary.json").read_text())["sft_rows"] == 20


def test_the_rows_are_what_training_reads(prompts: Prompts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reject(FakeSampler(), prompts, NUMBER, K8, out)
    examples, preferences = list(read([out / "sft.jsonl"])), list(read([out / "pairs.jsonl"]))
    assert [type(record) for record in examples] == [Example] * 20
    assert [type(record) for record in preferences] == [Preference] * 10
    assert encode(tiny_model().template, examples[0])


def test_rows_hold_what_was_asked_and_the_sampled_answer_alone_is_learned(prompts: Prompts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = [{"role": "system", "content": "you are a fox"}, {"role": "user", "content": "Ha?"}, {"role": "assistant", "content": "Ho."}]
    reject(FakeSampler(before=before), prompts, NUMBER, K8, out)
    (first, *_), pairs, template = read([out / "sft.jsonl"]), list(read([out / "pairs.jsonl"])), tiny_model().template
    assert isinstance(first, Example)
    assert first.messages[:4] == [*before, *prompts.found[0].messages]
    assert all(isinstance(pair, Preference) and pair.messages[:3] == before for pair in pairs)
    encoded = encode(template, first)
    learned = [id for id, is_learned in zip(encoded.ids, encoded.mask, strict=True) if is_learned]
    assert learned == template.render(first.messages, add_generation_prompt=False).ids[encoded.mask.index(True) :][: len(learned)]
    assert template.tokenizer.decode(learned).startswith(first.messages[-1]["content"])


def test_answers_without_text_are_counted_and_in_no_row(tmp_path: Path) -> None:
    prompts = read_prompts([write(tmp_path / "sums.jsonl", sums(2))], NUMBER)
    checker, out = mine(tmp_path, "return not answer.strip() or answer == 'a'"), tmp_path / "out"
    sampler = FakeSampler(lambda prompt, k, seed: [Sampled(text, 1, "stop") for text in ("", " ", "a", "b")])
    summary = reject(sampler, prompts, checker, RejectSettings(k=4), out)
    checker.close()
    assert (summary.right, summary.empty, summary.sft_rows, summary.pairs) == (6, 4, 2, 2)
    assert "right and empty, in no row: 4" in list(summary.lines())
    assert [record.messages[-1]["content"] for record in read([out / "sft.jsonl"]) if isinstance(record, Example)] == ["a", "a"]


def test_the_same_seed_gives_the_same_rows_in_whatever_order(prompts: Prompts, tmp_path: Path) -> None:
    reject(FakeSampler(), prompts, NUMBER, K8, tmp_path / "a")
    backwards = Prompts(prompts.found[::-1])
    reject(FakeSampler(), backwards, NUMBER, K8, tmp_path / "b")
    assert rows(tmp_path / "a" / "sft.jsonl") == sorted(
        rows(tmp_path / "b" / "sft.jsonl"), key=lambda row: int(row["messages"][0]["content"].split()[2])
    )
    reject(FakeSampler(), prompts, NUMBER, RejectSettings(k=8, per_prompt=2, seed=1), tmp_path / "c")
    assert rows(tmp_path / "a" / "sft.jsonl") != rows(tmp_path / "c" / "sft.jsonl")


def test_prompts_that_cannot_be_asked_are_counted(prompts: Prompts, tmp_path: Path) -> None:
    said = FakeSampler().answer
    sampler = FakeSampler(lambda prompt, k, seed: "too long" if "3 + 3" in prompt.messages[0]["content"] else said(prompt, k, seed))
    summary = reject(sampler, prompts, NUMBER, K8, tmp_path / "out")
    assert (summary.finished, summary.refused, summary.answers) == (10, {"too long": 1}, 72)
    assert "not asked: 1 x too long" in list(summary.lines())
    again = FakeSampler()
    reject(again, prompts, NUMBER, K8, tmp_path / "out")
    assert again.asked == []


# --- going on


@pytest.mark.parametrize("after", [0, 1, 6])
def test_a_killed_run_goes_on_where_it_stood(after: int, prompts: Prompts, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    reject(FakeSampler(), prompts, NUMBER, RejectSettings(k=8), whole)
    ended = subprocess.run([sys.executable, "-m", "tests.post.fake", str(out), str(tmp_path / "sums.jsonl"), str(after)], timeout=100)
    assert ended.returncode == -signal.SIGKILL
    finished = {row["key"] for row in rows(out / "answers.jsonl")}
    assert bool(finished) == bool(after)
    sampler = FakeSampler()
    reject(sampler, prompts, NUMBER, RejectSettings(k=8), out)
    assert set(sampler.asked) == {prompt.key for prompt in prompts.found} - finished
    for name in ("sft.jsonl", "pairs.jsonl", "summary.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("torn", range(1, 60, 7))
def test_a_torn_line_is_cut_off_and_said(torn: int, prompts: Prompts, tmp_path: Path) -> None:
    out, said = tmp_path / "out", list[str]()
    reject(FakeSampler(), prompts, NUMBER, K8, out)
    before, path = (out / "sft.jsonl").read_bytes(), out / "answers.jsonl"
    last = path.read_bytes().splitlines(keepends=True)[-1]
    path.write_bytes(path.read_bytes()[:-torn])
    sampler = FakeSampler()
    reject(sampler, prompts, NUMBER, K8, out, said.append)
    assert sampler.asked == [json.loads(last)["key"]]
    assert (out / "sft.jsonl").read_bytes() == before
    assert said[0].endswith(f"its last line was torn ({len(last) - torn} bytes): cut off, and its prompt is asked again") == (torn > 0)


def test_a_damaged_line_is_named(prompts: Prompts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reject(FakeSampler(), prompts, NUMBER, K8, out)
    lines = (out / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (out / "answers.jsonl").write_bytes(lines[0] + b"{broken\n" + b"".join(lines[2:]))
    with pytest.raises(ValueError, match=r"answers.jsonl:2: damaged; cut this line out"):
        reject(FakeSampler(), prompts, NUMBER, K8, out)


def test_other_rows_of_the_same_answers(prompts: Prompts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reject(FakeSampler(), prompts, NUMBER, K8, out)
    sampler = FakeSampler()
    summary = reject(sampler, prompts, NUMBER, RejectSettings(k=8, per_prompt=1, pairs_per_prompt=2), out)
    assert (sampler.asked, summary.sft_rows, summary.pairs) == ([], 10, 20)


def test_more_prompts_are_asked_beside_those_of_before(prompts: Prompts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reject(FakeSampler(), prompts, NUMBER, K8, out)
    sampler = FakeSampler()
    summary = reject(sampler, read_prompts([write(tmp_path / "more.jsonl", sums(12))], NUMBER), NUMBER, K8, out)
    assert (len(sampler.asked), summary.prompts) == (2, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sampler, settings: (FakeSampler(digest="other"), settings), "model digest was 0123456789abcdef, not other"),
        (
            lambda sampler, settings: (FakeSampler(params={"temperature": 0.5, "top_k": 0}), settings),
            "sampling temperature was 1.0, not 0.5",
        ),
        (lambda sampler, settings: (FakeSampler(params={"temperature": 1.0}), settings), "sampling top_k was 0, not None"),
        (lambda sampler, settings: (sampler, RejectSettings(k=4)), "answers k was 8, not 4"),
        (lambda sampler, settings: (sampler, RejectSettings(k=8, seed=3)), "answers seed was 0, not 3"),
    ],
)
def test_the_folder_of_another_run(change: Callable[..., Any], message: str, prompts: Prompts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reject(FakeSampler(), prompts, NUMBER, K8, out)
    before = (out / "sft.jsonl").read_bytes()
    sampler, settings = change(FakeSampler(), K8)
    with pytest.raises(ValueError, match=message):
        reject(sampler, prompts, NUMBER, settings, out)
    assert (out / "sft.jsonl").read_bytes() == before


def test_folders_that_are_no_such_run(prompts: Prompts, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds other files \(sums.jsonl\); name another folder"):
        reject(FakeSampler(), prompts, NUMBER, K8, tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "answers.jsonl").write_text("not ours, without an end of line")
    with pytest.raises(ValueError, match=r"holds other files \(answers.jsonl\)"):
        reject(FakeSampler(), prompts, NUMBER, K8, tmp_path / "other")
    assert (tmp_path / "other" / "answers.jsonl").read_text() == "not ours, without an end of line"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"settings": {}}')
    with pytest.raises(ValueError, match="holds a run of another kind"):
        reject(FakeSampler(), prompts, NUMBER, K8, tmp_path / "run")
    out = tmp_path / "out"
    reject(FakeSampler(), prompts, NUMBER, K8, out)
    with pytest.raises(ValueError, match="holds answers to 4 prompts that are not in these files"):
        reject(FakeSampler(), Prompts(prompts.found[:6]), NUMBER, K8, out)


def test_a_row_that_was_mended_is_judged_again(prompts: Prompts, tmp_path: Path) -> None:
    out, said, listed = tmp_path / "out", list[str](), sums(10)
    assert reject(FakeSampler(), prompts, NUMBER, K8, out).solved == 10
    listed[3]["answer"] = 1000
    sampler, mended = FakeSampler(), read_prompts([write(tmp_path / "sums.jsonl", listed)], NUMBER)
    assert reject(sampler, mended, NUMBER, K8, out, said.append).solved == 9
    assert sampler.asked == []
    assert said[0] == f"{out}: rows are not the ones of before: the answers to 1 prompts are judged again"
    said.clear()
    reject(sampler, mended, NUMBER, K8, out, said.append)
    assert said == [f"{out}: 10 of 10 prompts are finished"]


# --- checkers that fail


def mine(tmp_path: Path, body: str) -> Any:
    (tmp_path / "mine.py").write_text(f"def check(answer, row):\n    {body}\n")
    return make_checker(f"{tmp_path / 'mine.py'}:check")


def test_a_checker_that_fails_now_and_then_is_counted(prompts: Prompts, tmp_path: Path) -> None:
    checker = mine(tmp_path, "return answer == {}[row['answer']] if row['answer'] > 10 else str(row['answer']) in answer")
    summary = reject(FakeSampler(), prompts, checker, K8, tmp_path / "out")
    checker.close()
    assert summary.failed == {f"raised KeyError: {n} (line 2)": 7 for n in (12, 14, 16, 18)}
    assert (summary.solved, summary.right + summary.wrong) == (6, 6 * 7)
    assert any(line == "checker failed: 7 x raised KeyError: 12 (line 2)" for line in summary.lines())
    assert all(int(row["prompt"][0]["content"].split()[2]) < 6 for row in rows(tmp_path / "out" / "pairs.jsonl"))


def test_a_checker_that_always_fails_ends_the_run_and_a_mended_one_goes_on(tmp_path: Path) -> None:
    prompts, out, said = read_prompts([write(tmp_path / "sums.jsonl", sums(40))], NUMBER), tmp_path / "out", list[str]()
    checker, first = mine(tmp_path, "return row['answers']"), FakeSampler()
    with pytest.raises(
        ValueError,
        match=r"check mine.py:check failed on each of the first 70 answers, mostly so: raised KeyError: 'answers' \(line 2\); mend it",
    ):
        reject(first, prompts, checker, K8, out)
    checker.close()
    kept = len(rows(out / "answers.jsonl"))
    assert 10 <= kept < 40
    checker, sampler = mine(tmp_path, "return row['answer'] > 5"), FakeSampler()
    summary = reject(sampler, prompts, checker, K8, out, said.append)
    checker.close()
    assert len(sampler.asked) == 40 - kept
    assert said[0] == f"{out}: the checker is not the one of before: the answers to {kept} prompts are judged again"
    assert (summary.failed, summary.solved) == ({}, 37)


def test_ctrl_c_leaves_rows_of_what_is_finished(prompts: Prompts, tmp_path: Path) -> None:
    asked = FakeSampler()

    def answer(prompt: Prompt, k: int, seed: int) -> Any:
        if len(asked.asked) == 5:
            raise KeyboardInterrupt
        return FakeSampler().answer(prompt, k, seed)

    asked.answer = answer
    with pytest.raises(KeyboardInterrupt):
        reject(asked, prompts, NUMBER, K8, tmp_path / "out")
    finished = len(rows(tmp_path / "out" / "answers.jsonl"))
    assert len(rows(tmp_path / "out" / "sft.jsonl")) == 2 * finished
    assert finished <= 4


@pytest.mark.skipif(sys.platform == "win32", reason="a sandbox needs Linux or macOS, and says so")
def test_programs_are_judged_while_others_are_written(tmp_path: Path) -> None:
    checker = make_checker("tests", seconds=30)
    listed = [{"prompt": f"f(x) = x + {i}", "tests": [f"assert f(1) == {1 + i}"]} for i in range(4)]
    prompts = read_prompts([write(tmp_path / "code.jsonl", listed)], checker)
    codes = ["def f(x): return x + 1", "```python\ndef f(x):\n    return x + 2\n```", "1 / 0", "no code"]
    codes += ["import json\njson.dumps = lambda *a, **k: 'x'"]  # the harness's too, if it asked for it then
    sampler = FakeSampler(lambda prompt, k, seed: [Sampled(code, len(code), "stop") for code in codes])
    summary = reject(sampler, prompts, checker, RejectSettings(k=5), tmp_path / "out")
    assert (summary.right, summary.wrong, summary.solved, summary.pairs) == (2, 18, 2, 2)
    verdicts = {answer["said"] for row in rows(tmp_path / "out" / "answers.jsonl") for answer in row["answers"]}
    assert {
        "1 of 1 tests passed",
        "no Python code",
        "0 of 1 tests passed; the solution raised ZeroDivisionError: division by zero",
    } < verdicts


# --- counting


def test_pass_at_k_is_what_drawing_gives() -> None:
    from itertools import combinations

    flags = [True, False, False, True, False, False]
    for k in range(1, 7):
        drawn = [any(chosen) for chosen in combinations(flags, k)]
        assert pass_at(6, 2, k) == pytest.approx(sum(drawn) / len(drawn))
    assert sizes(16) == [1, 2, 4, 8, 16]
    assert sizes(6) == [1, 2, 4, 6]
    assert sizes(1) == [1]


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"k": 129}, {"per_prompt": -1}, {"pairs_per_prompt": -1}, {"workers": 0}, {"least_distance": 1.5}]
)
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}: must be"):
        RejectSettings(**wrong)
