"""`qwen2 synth` as people type it: rows, figures, going on, and errors of one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen2 import LLM, SamplingParams
from qwen2.cli.app import main
from qwen2.post.checks.checkers import make_checker
from qwen2.post.synth.prompts import read_prompts
from qwen2.post.synth.sampling import EngineSampler
from qwen2.train.folder import write_json
from qwen2.train.place import origin
from tests.conftest import random_adapter, tiny_model

SHORT = ("--temperature", "1", "--max-tokens", "8", "--ignore-eos", "--stop", "a")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    arguments = ["--count", "6", "--held-out", "8", "--solutions", "4", "--worked", "--language", "en", "--language", "th"]
    assert main(["synth", "arithmetic", str(tmp_path / "sums"), *arguments]) == 0
    return tmp_path / "sums"


def test_arithmetic(sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [len(rows(sums / name)) for name in ("train.jsonl", "held-out.jsonl", "sft.jsonl")] == [6, 8, 4]
    assert main(["synth", "arithmetic", str(tmp_path / "more"), "--count", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'more' / 'train.jsonl'}: 3 problems"
    first = rows(sums / "train.jsonl")[0]
    assert (first.keys(), first["language"]) == ({"prompt", "answer", "language", "source"}, "en")
    answer = rows(sums / "sft.jsonl")[0]["messages"][1]["content"]
    assert " = " in answer
    for arguments, message in (
        (["--count", "-1"], "--count -1: must be at least 0"),
        (["--count", "2", "--language", "xx"], "language 'xx': unknown; there are en,"),
        (["--count", "99999", "--largest", "3", "--largest-factor", "3"], "train problems found that differ"),
    ):
        assert main(["synth", "arithmetic", str(tmp_path / "none"), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_reject_and_again(sums: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "even.py").write_text("def check(answer, row):\n    return (len(answer) + row['answer']) % 2 == 0\n")
    command = ["synth", "reject", str(tiny_folder), str(sums / "train.jsonl"), "--out", str(tmp_path / "out"), "--k", "6", *SHORT]
    command += ["--check", f"{tmp_path / 'even.py'}:check", "--seed"]
    assert main([*command, "5"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0].startswith("6 of 6 prompts, ")
    assert "pass@1 " in said.out
    assert "source add" in said.out or "source sub" in said.out
    sft, config = rows(tmp_path / "out" / "sft.jsonl"), json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(row["provenance"]["checker"] == "even.py:check" for row in sft)
    assert (config["answers"], config["sampling"]["max_tokens"], config["sampling"]["stop"]) == ({"k": 6, "seed": 5}, 8, ["a"])
    assert main([*command, "5"]) == 0
    again = capsys.readouterr()
    assert "6 of 6 prompts are finished" in again.err
    assert again.out == said.out
    assert main([*command, "6"]) == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("answers seed was 5, not 6; go on with it as it was started, or name another folder with --out")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "0"], "k 0: must be from 1 to 128"),
        (["--check", "guess"], "check 'guess': must be number, tests, or a function of yours as FILE.py:NAME"),
        (["--check", "gone.py:f"], "gone.py: no such file"),
        (
            ["--check", "tests"],
            "train.jsonl:1: no tests: the column tests must be a Python source or a list of them (rows that are broken: 6",
        ),
        (["--check-seconds", "0"], "check-seconds 0: must be above 0"),
        (["--temperature", "0"], "k 16 at temperature 0"),
        (["--answer-column", "gold"], "train.jsonl:1: the column gold is missing"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, sums: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    out = tmp_path / "out"
    assert main(["synth", "reject", str(tiny_folder), str(sums / "train.jsonl"), "--out", str(out), *arguments]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("qwen2: ")
    assert message in last
    assert not (out / "config.json").exists()


def test_a_run_is_sampled_from(sums: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"settings": {"steps": 1}}')
    command = ["synth", "reject", str(run), str(sums / "train.jsonl"), "--k", "2", "--temperature", "1", "--max-tokens", "4"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "this run has neither a model nor a checkpoint yet" in capsys.readouterr().err
    shutil.copytree(tiny_folder, run / "model")
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model"]["name"], len(config["model"]["digest"])) == ("run", 16)


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    """A run of adapters that has ended, and started from the tiny model."""
    run = tmp_path / "tuned"
    run.mkdir()
    random_adapter(tiny_model().config, run / "adapter")
    settings = {"steps": 1}
    write_json(run / "config.json", {"settings": settings, "lora": {"rank": 4}, "from": origin(str(tiny_folder), run)})
    return run


def named(folder: Path, base: str | None) -> Path:
    """The adapter, saying that it belongs to this base."""
    path = folder / "adapter_config.json"
    write_json(path, {**json.loads(path.read_text()), "base_model_name_or_path": base})
    return folder


def test_an_adapter_answers_beside_the_weights_of_its_base(
    sums: Path, adapter: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a run, by its folder, by --adapter: the same model, whose answers are the engine's, unmerged, and not the base's."""
    folder = named(random_adapter(tiny_model().config, tmp_path / "alone"), str(tiny_folder))
    found = []
    for words in ([str(adapter)], [str(folder)], [str(tiny_folder), "--adapter", str(adapter)], [str(tiny_folder)]):
        out = tmp_path / f"out-{len(found)}"
        command = ["synth", "reject", *words, str(sums / "train.jsonl"), "--out", str(out), "--k", "2", *SHORT]
        assert main(command) == 0, words
        assert "float32" not in capsys.readouterr().err
        config, answers = json.loads((out / "config.json").read_text())["model"], rows(out / "answers.jsonl")
        found.append((config["name"], {row["key"]: [one["text"] for one in row["answers"]] for row in answers}))
    names, texts = zip(*found, strict=True)
    assert names == (*(f"{tiny_folder.name} with the adapter {name}" for name in ("tuned", "alone", "tuned")), tiny_folder.name)
    assert texts[0] == texts[1] == texts[2] != texts[3]
    llm = LLM(tiny_folder, adapter=folder)
    sampler = EngineSampler(llm, SamplingParams(temperature=1, max_tokens=8, ignore_eos=True, stop=("a",)))
    asked = read_prompts([sums / "train.jsonl"], make_checker("number")).found
    engine = {prompt.key: [one.text for one in answers] for prompt, answers in sampler.sample(asked, 2, 0) if not isinstance(answers, str)}
    assert texts[0] == engine


def test_what_must_be_merged_says_so(
    sums: Path, adapter: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = named(random_adapter(tiny_model().config, tmp_path / "second", seed=2), str(adapter))
    report = tmp_path / "exact.json"
    command = ["synth", "exact", str(folder), str(sums / "held-out.jsonl"), "--max-tokens", "2", "--out", str(report)]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert f"{folder}: the model that it belongs to, {adapter}, is an adapter or a checkpoint: merged" in said
    assert f"{folder}: its weights exist merged, in float32, alone" in said
    assert json.loads(report.read_text())["model"] == "second"


def test_an_adapter_without_a_base_and_a_second_one(
    sums: Path, adapter: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, problems = random_adapter(tiny_model().config, tmp_path / "alone"), str(sums / "held-out.jsonl")
    for base, words, message in (
        (None, [str(folder)], f"{folder}: does not say which model it belongs to; name it: BASE --adapter {folder}"),
        (
            "./gone",
            [str(folder)],
            f"{folder}: the model that it belongs to: ./gone: no such file or folder; if it is elsewhere, name it: BASE",
        ),
        (
            None,
            [str(adapter), "--adapter", str(folder)],
            f"--adapter {folder}: {adapter} is an adapter or a checkpoint itself: name the model",
        ),
        (
            None,
            [str(tiny_folder), "--adapter", str(tiny_folder)],
            f"--adapter {tiny_folder}: no adapter's folder: adapter_config.json is not",
        ),
    ):
        named(folder, base)
        assert main(["synth", "exact", words[0], problems, *words[1:]]) == 1
        assert message in capsys.readouterr().err


def test_more_errors(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", "reject", str(tiny_folder), "--out", str(tmp_path / "out")]) == 1
    assert "name the files with prompts behind the model" in capsys.readouterr().err
    assert main(["synth", "reject", str(tiny_folder), str(tmp_path / "gone.jsonl"), "--out", str(tmp_path / "out")]) == 1
    assert "gone.jsonl: No such file or directory" in capsys.readouterr().err
    assert main(["synth", "reject", str(tiny_folder), "--unheard-of", "--out", "x"]) == 2


def test_exact_and_difference(sums: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "all.py").write_text("def check(answer, row):\n    return True\n")
    command = ["synth", "exact", str(tiny_folder), str(sums / "held-out.jsonl"), "--out"]
    assert main([*command, str(tmp_path / "before.json"), "--max-tokens", "8"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "exact match 0.0 % (0.0 to 32.4) of 8"
    assert "language th: 0.0 % (0.0 to 49.0) of 4" in said
    assert "counted as wrong: 8 x cut off" in said
    free = [
        "--temperature",
        "1",
        "--stop",
        "a",
        "--max-tokens",
        "400",
        "--check",
        f"{tmp_path / 'all.py'}:check",
        "--against",
        str(tmp_path / "before.json"),
    ]
    assert main([*command, str(tmp_path / "after.json"), *free]) == 0
    said = capsys.readouterr().out.splitlines()
    after = json.loads((tmp_path / "after.json").read_text())
    assert (
        said[-2]
        == f"exact match {100 * after['exact_match']['value']:.1f} % ({100 * after['exact_match']['low']:.1f} to {100 * after['exact_match']['high']:.1f}) of 8"
    )
    assert after["exact_match"]["value"] > 0.5
    assert said[-1].startswith(f"difference {100 * after['exact_match']['value']:.1f} % (")
    assert main(["synth", "difference", "--before", str(tmp_path / "before.json"), "--after", str(tmp_path / "after.json")]) == 0
    assert capsys.readouterr().out.splitlines() == said[-1:]
    assert main(["synth", "difference", "--before", str(tmp_path / "before.json"), "--after", *[str(tmp_path / "after.json")] * 2]) == 0
    assert capsys.readouterr().out.startswith(said[-1].partition("(")[0])
    assert main(["synth", "difference", "--before", str(sums / "train.jsonl"), "--after", str(tmp_path / "after.json")]) == 1
    assert "train.jsonl: no JSON" in capsys.readouterr().err


def test_exact_takes_no_penalties_from_the_model(sums: Path, tiny_folder: Path, tmp_path: Path) -> None:
    model, defaults = tmp_path / "chatty", {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 5.0}
    shutil.copytree(tiny_folder, model)
    write_json(model / "generation_config.json", {**json.loads((model / "generation_config.json").read_text()), **defaults})
    found = []
    for words in ([], ["--repetition-penalty", "1"], ["--repetition-penalty", "5"], ["--temperature", "2", "--top-k", "3"]):
        out = tmp_path / "exact.json"
        assert main(["synth", "exact", str(model), str(sums / "held-out.jsonl"), "--max-tokens", "16", "--out", str(out), *words]) == 0
        report = json.loads(out.read_text())
        found.append((report["sampling"], [problem["answers"][0]["text"] for problem in report["problems"]]))
    (sampling, texts), plain, penalised, drawn = found
    neutral = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    assert {name: sampling[name] for name in neutral} == neutral
    assert (sampling, texts) == plain
    assert (penalised[0]["repetition_penalty"], penalised[1] == texts) == (5, False)
    assert [drawn[0][name] for name in ("temperature", "top_k", "top_p", "repetition_penalty")] == [2, 3, 1, 1]


def test_what_exact_cannot_write_or_compare_is_said_before_a_model_is_read(
    sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    prompts = read_prompts([sums / "held-out.jsonl"], make_checker("number")).found
    write_json(tmp_path / "before.json", {"model": "m", "problems": [{"key": prompt.key, "right": True} for prompt in prompts[:1]]})
    write_json(tmp_path / "odd.json", {"problems": [7]})
    for words, message in (
        (["--out", str(tmp_path)], f"{tmp_path}: is a folder; name the file to write"),
        (["--out", str(tmp_path / "file" / "exact.json")], f"{tmp_path / 'file' / 'exact.json'}: cannot be written: "),
        (["--against", str(tmp_path / "before.json")], "7 problems are on one side only: measure all models on the same file"),
        (["--against", str(tmp_path / "odd.json")], "odd.json: not what qwen2 synth exact --out writes"),
        (["--against", str(sums / "train.jsonl")], "train.jsonl: no JSON"),
        (["--out", str(tmp_path / "new" / "exact.json")], "no-model"),
    ):
        capsys.readouterr()
        assert main(["synth", "exact", str(tmp_path / "no-model"), str(sums / "held-out.jsonl"), *words]) == 1
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1, said
        assert message in said[0]
    assert [*(tmp_path / "new").iterdir()] == []


def test_exact_makes_the_folder_of_its_report(sums: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "exact.json"
    assert main(["synth", "exact", str(tiny_folder), str(sums / "held-out.jsonl"), "--max-tokens", "2", "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())["problems"]) == 8
