"""What `qwen2 sft` and `qwen2 dpo` refuse before a run's folder is taken, and how each says what to do instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2.cli.app import main
from qwen2.weights.export import to_gguf
from qwen2.weights.modelfile import parse
from qwen2.weights.store import Store
from tests.conftest import random_adapter, tiny_model

QUICK = ["--steps", "1", "--batch", "4", "--length", "128", "--precision", "float32", "--no-measure", "--no-tensorboard"]
VERBS = pytest.mark.parametrize("verb", ["sft", "dpo"])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pairs, which both verbs read."""
    rows = [{"prompt": f"the {i} dog", "chosen": "a fox", "rejected": f"dog {i}"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pairs.jsonl"


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a command ends with."""
    capsys.readouterr()
    assert main(words) == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


@VERBS
def test_a_mistake_leaves_the_folder_free(
    verb: str, tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be trained is no run: the corrected command goes into the same folder."""
    run = tmp_path / "run"
    words = [verb, str(tiny_folder), str(data), "--out", str(run), "--lora-rank", "4", *QUICK]
    assert "target 'nonsense': there is no such layer" in refused([*words, "--lora-targets", "nonsense"], capsys)
    assert [path.name for path in run.iterdir()] == [".lock"]
    assert main(words) == 0
    said = refused([*words, "--resume", "--lora-targets", "q_proj"], capsys)
    assert "targets is 'all-linear' in the run, 'q_proj' here; resume it as it was started, or start another run from it: " in said
    assert said.endswith("name its folder as the model, and another one with --out")
    longer = ["3" if word == "1" else word for word in words]
    assert "under cosine the 1 steps that are done" in (said := refused([*longer, "--resume"], capsys))
    assert said.endswith("name its folder as the model, and another one with --out")
    assert main([verb, str(run), str(data), "--out", str(tmp_path / "next"), *QUICK]) == 0


@VERBS
def test_a_model_with_an_adapter_of_its_own_is_not_left_in_blocks(
    verb: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside packed weights it would take no part in training, and again be there when what was trained is merged."""
    monkeypatch.setenv("QWEN2_HOME", str(tmp_path / "home"))
    to_gguf(tiny_model(), tmp_path / "base.gguf", "Q8_0")
    adapter = random_adapter(tiny_model().config, tmp_path / "adapter")
    stored = Store(tmp_path / "home").create("mine", parse(f"FROM {tmp_path / 'base.gguf'}\nADAPTER {adapter}"))
    words = [verb, "mine", str(data), "--out", str(tmp_path / "run"), "--lora-rank", "4", *QUICK]
    said = refused([*words, "--qlora"], capsys)
    assert "--qlora: mine has an adapter, which its blocks cannot take in: merge it, qwen2 export mine FOLDER, and quantize that" in said
    assert str(stored.adapter_path) in said
    assert not (tmp_path / "run").exists()
    assert main(words) == 0
