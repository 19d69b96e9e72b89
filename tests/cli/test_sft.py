"""`qwen2 sft` from the command line: a run of mixed files, its dry run, resuming, adapters, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qwen2 import LLM, SamplingParams
from qwen2.cli.app import main
from qwen2.post.finetuning.settings import LORA_LR, SftSettings
from qwen2.train.metrics import read_lines
from qwen2.train.saved import take
from tests.post.conftest import talks

QUICK = ["--length", "128", "--batch", "4", "--micro-batch", "2", "--log-every", "1", "--no-tensorboard", "--no-measure"]
FEW = [*QUICK, "--precision", "float32", "--save-every", "2", "--eval-every", "3", "--samples", "1", "--sample-tokens", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files of several formats, with some rows that cannot be used."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"messages": example.messages} for example in talks(30)]
    bad = [{"messages": rows[0]["messages"][:1], "score": 1}, {"prompt": "the fox?", "completion": "quick", "score": 2}]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *bad]) + "{broken\n")
    (folder / "b.json").write_text(json.dumps([{"instruction": "the dog?", "input": "", "output": "lazy"}] * 3, indent=1))
    (folder / "c.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("the quick brown fox", "jumps over the lazy dog"))
    )
    (folder / "README.md").write_text("# The fox\nA data set.\n")
    return folder


@pytest.fixture(scope="module")
def ended(tiny_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["sft", str(tiny_folder), str(data), "--out", str(out), *FEW, "--epochs", "1.5", "--eval-share", "0.2"]) == 0
    return out


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line is refused with: one line."""
    capsys.readouterr()
    assert main(["sft", *words]) in (1, 2)
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_leaves_all_that_it_should(ended: Path) -> None:
    assert sorted(path.name for path in ended.iterdir() if not path.name.startswith(".")) == [
        "checkpoints", "config.json", "curves.png", "metrics.jsonl", "model", "samples.jsonl", "tokenizer",
    ]  # fmt: skip
    config = json.loads((ended / "config.json").read_text())
    assert set(config) == {"settings", "model", "data", "start", "from"}
    settings = SftSettings(**config["settings"])
    assert (settings.epochs, settings.lr, settings.schedule, settings.final_lr) == (1.5, 2e-5, "cosine", 0.1)
    lines = read_lines(ended / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, settings.steps + 1))
    evaluated = [line["step"] for line in lines if "eval" in line]
    assert evaluated == sorted({0, *range(3, settings.steps + 1, 3), settings.steps})
    output = LLM(ended / "model").chat([{"role": "user", "content": "the fox?"}], SamplingParams(max_tokens=3))
    assert output.usage.completion_tokens >= 1


def test_resumed_it_comes_to_the_same_end_without_the_model_it_came_from(
    ended: Path, tiny_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (ended / "metrics.jsonl").read_text(), (ended / "model" / "model.safetensors").read_bytes()
    assert main(["sft", str(tiny_folder), str(data), "--out", str(ended), "--resume"]) == 0
    assert "going on from step" in capsys.readouterr().err
    assert ((ended / "metrics.jsonl").read_text(), (ended / "model" / "model.safetensors").read_bytes()) == before
    assert "settings: last_turn is False in the run, True here" in said(
        [str(tiny_folder), str(data), "--out", str(ended), "--resume", "--last-turn"], capsys
    )
    assert "data: sha256 is" in said([str(tiny_folder), str(data / "a.jsonl"), "--out", str(ended), "--resume"], capsys)


def test_a_dry_run_shows_tokens_lengths_and_what_is_left_out(tiny_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", str(tiny_folder), str(data), "--dry-run", "--length", "128", "--show", "1"]) == 0
    shown = capsys.readouterr().out
    first = talks(1)[0].messages
    assert f"--- {data / 'a.jsonl'}:1: " in shown
    assert f"<|im_start|>assistant\n[{first[1]['content']}<|im_end|>]" in shown
    assert "34 conversations, 2 texts read; 36 examples to learn from, 0 held out" in shown
    assert f"1 left out: no assistant turn ({data / 'a.jsonl'}:31)" in shown
    assert f"1 left out: a file beside the data ({data / 'README.md'})" in shown
    assert f"1 left out: not JSON ({data / 'a.jsonl'}:33: " in shown
    assert "columns without use: score (1)" in shown
    assert "rows of 128 tokens" in shown
    assert "of memory" in shown
    assert not (tiny_folder / "config.json.lock").exists()


def test_adapters_are_trained_resumed_and_merged_by_export(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    words = ["sft", str(tiny_folder), str(data), "--out", str(tmp_path / "run"), *FEW, "--steps", "4"]
    lora = ["--lora-rank", "4", "--lora-dropout", "0.1"]
    assert main([*words, *lora]) == 0
    run = tmp_path / "run"
    config = json.loads((run / "config.json").read_text())
    assert (config["lora"]["rank"], config["settings"]["lr"]) == (4, LORA_LR)
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert not (run / "model").exists()
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes(), (run / "metrics.jsonl").read_text()
    for place in ("step-000004",):
        for file in (run / "checkpoints" / place).iterdir():
            file.unlink()
        (run / "checkpoints" / place).rmdir()
    assert main([*words[:5], "--resume"]) == 0  # from step 2, with the dropout's draws that it would have had
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before[0]
    losses = [
        [line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line]
        for text in (before[1], (run / "metrics.jsonl").read_text())
    ]
    assert losses[0] == losses[1]
    assert main(["export", str(run), str(tmp_path / "merged")]) == 0
    config["from"].pop("weights")  # the first versions did not write it down
    (run / "config.json").write_text(json.dumps(config))
    assert main([*words[:5], "--resume"]) == 0
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == [511, 509]
    assert take(run, print).generation.eos == (511, 509)


def test_adapters_are_not_resumed_over_other_weights(
    tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, words = tmp_path / "base", [str(data), *FEW, "--steps", "2", "--lora-rank", "4", "--out", str(tmp_path / "run")]
    shutil.copytree(tiny_folder, base)
    assert main(["sft", str(base), *words]) == 0
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors")
    assert "from: weights is" in said([str(base), *words, "--resume"], capsys)


def test_adapters_over_weights_in_blocks(tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(tiny_folder), str(tmp_path / "tiny.gguf"), "--to", "q8_0"]) == 0
    words = [str(tmp_path / "tiny.gguf"), str(data), *FEW, "--steps", "2", "--lora-rank", "4", "--qlora"]
    assert main(["sft", *words, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["start"]["weights"] == "packed"
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    capsys.readouterr()
    assert "start: weights is 'packed' in the run, 'float32' here" in said(
        [*words[:-1], "--out", str(tmp_path / "run"), "--resume"], capsys
    )


def test_what_is_refused_in_one_line(
    tiny_folder: Path, data: Path, ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(tiny_folder), str(tmp_path / "run")
    (tmp_path / "empty.jsonl").write_text('{"messages": []}\n')
    cases = {
        "name the data": [model, "--out", out],
        "name the run's folder: --out": [model, str(data)],
        "of which run?": [model, str(data), "--dry-run", "--resume"],
        "no run to resume here": [model, str(data), "--out", out, "--resume"],
        "--steps and --epochs: give one of them": [model, str(data), "--out", out, "--steps", "3", "--epochs", "2"],
        "--eval-data and --eval-share": [model, str(data), "--out", out, "--eval-share", "0.1", "--eval-data", str(data / "b.json")],
        "there is nothing to learn from: nothing read; 0 examples to learn from, 0 held out; 1 left out: not well-formed": [
            model, str(tmp_path / "empty.jsonl"), "--out", out,
        ],
        "no such file or folder": [model, str(tmp_path / "missing.jsonl"), "--out", out],
        "nothing of the data for evaluation can be used: 34 conversations, 2 texts read": [
            model, str(data), "--out", out, *FEW, "--eval-data", str(tmp_path / "empty.jsonl"),
        ],
        "the model's window is": [model, str(data), "--out", out, "--length", "9999"],
        "--lora-alpha: is of adapters": [model, str(data), "--out", out, "--lora-alpha", "3"],
        "holds a run already": [model, str(data), "--out", str(ended), *FEW],
        "Unknown option: --lenght. Did you mean --length?": [model, str(data), "--out", out, "--lenght", "3"],
        "precision float16": [model, str(data), "--out", out, "--precision", "float16"],
    }  # fmt: skip
    for wanted, words in cases.items():
        assert wanted in said(words, capsys), wanted
    assert not (tmp_path / "run" / "model").exists()


def test_held_out_files_are_evaluated_and_not_learned(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    words = ["--out", str(tmp_path / "run"), *FEW, "--steps", "1", "--no-packing", "--eval-data", str(data / "b.json")]
    assert main(["sft", str(tiny_folder), str(data / "a.jsonl"), *words]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["data"]["examples"], config["data"]["held_out"]) == (31, 3)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {line["prompt"] for line in samples} == {"the dog?"}
