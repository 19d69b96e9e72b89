"""`qwen2 quantize`: the file, the dry run, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qwen2.cli.app import main
from qwen2.config import tiny
from qwen2.weights.export import to_hf_folder
from qwen2.weights.model import load
from tests.conftest import tiny_model

Out = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    to_hf_folder(tiny_model(tiny(hidden=256, ffn=512, heads=4, kv_heads=2)), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model"


def test_a_file_beside_nothing_else(folder: Path, capsys: Out) -> None:
    assert main(["quantize", str(folder), "--to", "q4_k_m"]) == 0
    said = capsys.readouterr().out
    place = folder.parent / "model-q4_k_m.gguf"
    assert said.startswith("model-q4_k_m.gguf: ")
    assert said.rstrip().endswith(" bits a weight")
    assert load(place).weight_format == "Q4_K_M"
    assert sorted(os.listdir(folder.parent)) == ["model", "model-q4_k_m.gguf"]
    assert main(["quantize", str(folder), "--to", "q4_k_m"]) == 1
    assert capsys.readouterr().err == "qwen2: model-q4_k_m.gguf: exists already; name another file to write\n"


def test_the_dry_run_shows_every_tensor_and_writes_nothing(folder: Path, capsys: Out) -> None:
    assert main(["quantize", str(folder), "out.gguf", "--to", "q4_k_m", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["TENSOR", "SHAPE", "TYPE", "BITS", "SIZE", "REASON"]
    rows = {line.split()[0]: line for line in lines[1:]}
    assert "Q6_K  6.562  " in rows["blk.1.ffn_down.weight"]
    assert rows["blk.1.ffn_down.weight"].endswith("ffn_down is sensitive in these layers")
    assert "Q4_K  4.5  " in rows["blk.0.ffn_up.weight"]
    assert "F32   32  " in rows["blk.0.attn_norm.weight"]
    assert lines[-1].startswith("in all: ")
    assert os.listdir(folder.parent) == ["model"]


def test_a_type_in_capitals_is_the_same(folder: Path, capsys: Out) -> None:
    assert main(["quantize", str(folder), "--to", "Q4_K_M"]) == 0
    assert capsys.readouterr().out.startswith("model-q4_k_m.gguf: ")


def test_the_dry_run_fetches_nothing_and_names_a_missing_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setenv("QWEN2_HOME", str(folder.parent / "home"))
    assert main(["quantize", "smollm2:135m", "--to", "q8_0", "--dry-run"]) == 1
    assert "qwen2 pull smollm2:135m" in capsys.readouterr().err
    assert main(["quantize", str(folder), "nowhere/x.gguf", "--to", "q8_0", "--dry-run"]) == 0
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_damaged_blocks_are_not_copied(folder: Path, capsys: Out) -> None:
    assert main(["quantize", str(folder), "a.gguf", "--to", "q4_k_m"]) == 0
    data = bytearray(Path("a.gguf").read_bytes())
    data[-20_000:-10_000] = b"\xff" * 10_000
    Path("damaged.gguf").write_bytes(data)
    capsys.readouterr()
    assert main(["quantize", "damaged.gguf", "b.gguf", "--to", "q4_k_m"]) == 1
    assert "weights that are not finite: the file it comes from is damaged" in capsys.readouterr().err
    assert not Path("b.gguf").exists()


def test_an_unknown_type_is_a_wrong_command_line(folder: Path, capsys: Out) -> None:
    assert main(["quantize", str(folder), "--to", "q9"]) == 2
    assert "q9" in capsys.readouterr().err


def test_the_dry_run_says_that_the_destination_is_taken(folder: Path, capsys: Out) -> None:
    (folder.parent / "out.gguf").touch()
    assert main(["quantize", str(folder), "out.gguf", "--to", "q8_0", "--dry-run"]) == 0
    assert "out.gguf exists already" in capsys.readouterr().err


def test_no_more_threads_than_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, used = torch.get_num_threads(), list[int]()
    monkeypatch.setattr(
        "qwen2.weights.quantize.Plan.write", lambda *_: used.append(torch.get_num_threads()) or (folder.parent / "a").touch()
    )
    try:
        torch.set_num_threads(2)
        main(["quantize", str(folder), "a", "--to", "q8_0", "--threads", "1"])
    finally:
        torch.set_num_threads(before)
    assert used == [1]
