"""What products are computed in: settled once for all ranks and sittings, written down, kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.cli.app import main
from qwen2.train import precision
from qwen2.train.precision import in_words, settled
from qwen2.train.settings import Settings
from qwen2.train.world import World
from tests.train.conftest import write_shards

CPU = torch.device("cpu")
QUICK = ("--length", "48", "--batch", "2", "--micro-batch", "2", "--no-measure", "--no-tensorboard", "--schedule", "constant")


class Ranks(World):
    """A rank among others, of which it is known what each multiplies."""

    size = 2

    def __init__(self, able: list[bool]) -> None:
        super().__init__()
        self.able = able

    def every(self, value: Any) -> list[Any]:
        return self.able


@pytest.mark.parametrize(("able", "found"), [([True, True], "bfloat16"), ([True, False], "float32"), ([False, True], "float32")])
def test_ranks_that_are_not_alike_compute_alike(able: list[bool], found: str, tmp_path: Path):
    assert settled(Settings(), tmp_path, False, Ranks(able)).precision == found
    assert settled(Settings(precision="bfloat16"), tmp_path, False, Ranks(able)).precision == "bfloat16", "what was asked for is taken"


def pretend(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: able)


@pytest.mark.parametrize("first", [True, False])
def test_a_run_keeps_its_precision_on_another_processor(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shards, out = write_shards(tmp_path / "shards"), tmp_path / "run"
    pretend(first, monkeypatch)
    assert main(["pretrain", str(shards), "--out", str(out), "--size", "tiny", "--steps", "2", *QUICK]) == 0
    wanted = "bfloat16" if first else "float32"
    assert f"products are computed in {wanted}\n" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["settings"]["precision"] == wanted
    pretend(not first, monkeypatch)
    for flags in ((), ("--precision", "auto")):
        steps = "4" if flags else "3"
        assert main(["pretrain", str(shards), "--out", str(out), "--resume", "--steps", steps, *flags]) == 0
        said = capsys.readouterr().err
        assert f"products are computed in {wanted}" in said
        assert ("does not multiply it itself" in said) == first
        assert json.loads((out / "config.json").read_text())["settings"]["precision"] == wanted
    other = "float32" if first else "bfloat16"
    assert main(["pretrain", str(shards), "--out", str(out), "--resume", "--precision", other]) == 1
    assert f"settings: precision is '{wanted}' in the run, '{other}' here" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its config says auto; what that is now is written down."""
    shards, out = write_shards(tmp_path / "shards"), tmp_path / "run"
    pretend(False, monkeypatch)
    assert main(["pretrain", str(shards), "--out", str(out), "--size", "tiny", "--steps", "2", *QUICK]) == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "settings": {**config["settings"], "precision": "auto"}}))
    assert main(["pretrain", str(shards), "--out", str(out), "--resume", "--steps", "3"]) == 0
    assert json.loads((out / "config.json").read_text())["settings"]["precision"] == "float32"


def test_a_slow_choice_is_said(monkeypatch: pytest.MonkeyPatch):
    pretend(False, monkeypatch)
    assert in_words(torch.float32, CPU) == "products are computed in float32"
    assert "this processor does not multiply it itself" in in_words(torch.bfloat16, CPU)
