"""`qwen2 dpo` as a person types it: a run, its end, going on, a look before, and mistakes in one line each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2.cli.app import main
from qwen2.train.metrics import read_lines

QUICK = ["--steps", "3", "--batch", "4", "--length", "128", "--no-measure", "--no-tensorboard", "--precision", "float32", "--threads", "1"]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    good = [{"prompt": f"the {i} lazy dog", "chosen": "a fox", "rejected": f"dog {i}", "source": "x"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good, {"prompt": "a", "chosen": "b", "rejected": "b"}]))
    return path


def test_a_run_goes_on_and_is_a_model(tiny_folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ["dpo", str(tiny_folder), str(pairs), "--out", str(out)]
    assert main([*words, *QUICK, "--schedule", "constant", "--warmup", "0", "--eval-share", "0.2", "--beta", "0.2"]) == 0
    said = capsys.readouterr()
    assert "41 rows read: " in said.err
    assert f"1 left out: chosen and rejected are equal ({pairs}:41)" in said.err
    assert "columns without use: source (40)" in said.err
    assert "loss dpo, beta 0.2; 3 steps of up to 4: 0." in said.err
    assert "step 3: loss 0." in said.err
    assert ", accuracy " in said.err
    assert said.out.startswith(f"{out / 'model'}: written after 3 steps and ")
    assert main([*words, "--resume", "--steps", "4"]) == 0
    assert "going on from step 3 of 4" in capsys.readouterr().err
    assert [line["step"] for line in read_lines(out / "metrics.jsonl") if "eval" in line] == [0, 3, 4]
    assert main(["show", str(out / "model")]) == 0


def test_adapters_and_epochs(tiny_folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    quick = QUICK[2:]
    words = [
        "dpo",
        str(tiny_folder),
        str(pairs),
        "--out",
        str(out),
        *quick,
        "--lora-rank",
        "2",
        "--eval-data",
        str(pairs),
        "--epochs",
        "0.2",
    ]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "40 pairs to learn from, 40 held out" in said.err
    assert "adapters of rank 2; 2 steps of up to 4: 0.20 epochs" in said.err
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    written = json.loads((out / "config.json").read_text())
    assert (written["settings"]["lr"], written["lora"]["rank"]) == (2e-5, 2)
    assert main(["export", str(out), str(tmp_path / "merged")]) == 0


def test_a_dry_run_trains_nothing(tiny_folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(tmp_path.rglob("*"))
    assert main(["dpo", str(tiny_folder), str(pairs), "--dry-run", "--epochs", "2", "--eval-share", "0", "--length", "128"]) == 0
    said = capsys.readouterr()
    assert set(tmp_path.rglob("*")) == before
    assert "chosen and rejected are equal" in said.err
    assert f"{pairs}:1" in said.out
    assert "the 0 lazy dog" in said.out
    assert "[a fox<|im_end|>]" in said.out
    assert f"--- {pairs}:2: rejected, " in said.out
    assert "5 steps of up to 16: 2.00 epochs" in said.err
    assert "more if a prompt were computed for each of its answers" in said.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the data: qwen2 dpo MODEL DATA..."),
        (["{pairs}", "--beta", "-1"], "beta -1.0: must be a number from 0"),
        (["{pairs}", "--loss", "orpo", "--sft", "1"], "sft 1.0: the loss orpo has no such setting"),
        (["{pairs}", "--steps", "3", "--epochs", "2"], "--steps and --epochs: give one of them"),
        (["{pairs}", "--eval-data", "{pairs}", "--eval-share", "0.2"], "--eval-data and --eval-share: give one of them"),
        (["{pairs}", "--lora-alpha", "3"], "--lora-alpha: is of adapters"),
        (["{pairs}", "--reference", "adapter", "--steps", "1", "--length", "128"], "reference adapter: there is none without --lora-rank"),
        (["nowhere.jsonl", "--length", "128"], "nowhere.jsonl: no such file"),
        (["{pairs}"], "length 1,024: the model's window is 512 tokens"),
        (["{pairs}", "--length", "8"], "there is nothing to learn from"),
        (["{pairs}", "--length", "128", "--eval-data", "{bad}"], "nothing of the data for evaluation can be used: 42 rows read"),
        (["{pairs}", "--length", "128", "--eval-data", "{empty}"], "nothing of the data for evaluation can be used: 41 rows read"),
        (["{pairs}", "--resume"], "no run to resume here"),
        (["{pairs}", "--wat"], "--wat"),
        (["{pairs}", "--loss", "ppo"], "ppo"),
    ],
)
def test_mistakes_end_in_a_line(
    words: list[str], message: str, tiny_folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}')
    (tmp_path / "empty.jsonl").write_text("")
    given = [word.format(pairs=pairs, bad=tmp_path / "bad.jsonl", empty=tmp_path / "empty.jsonl") for word in words]
    assert main(["dpo", str(tiny_folder), *given, "--out", str(tmp_path / "run")]) in (1, 2)
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("verb", "setting"), [("sft", "loss"), ("dpo", "packing")])
def test_a_run_of_the_other_verb_is_not_resumed(
    verb: str, setting: str, tiny_folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    written = {"settings": {setting: True}, "start": {}, "data": {}, "from": {}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(written))
    assert main([verb, str(tiny_folder), str(pairs), "--out", str(tmp_path / "run"), "--resume"]) == 1
    assert f"not a run of qwen2 {verb}; name that with --out" in capsys.readouterr().err


def test_help_needs_no_torch_and_tells_defaults() -> None:
    program = "import sys; from qwen2.cli.app import main; main(['dpo', '--help']); print('torch' in sys.modules)"
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert outcome.stdout.strip().endswith("False")
    for flag in ("--loss", "--beta", "--lora-rank", "--length-normalised", "--eval-data", "--dry-run", "--too-long"):
        assert flag in outcome.stdout
    assert "Example: qwen2 dpo" in outcome.stdout
