"""`qwen2 export`: both kinds of destination, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2.cli.app import main
from qwen2.weights.model import load


def test_a_folder_and_a_file(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(tiny_folder), str(tmp_path / "folder"), "--to", "bf16"]) == 0
    assert load(tmp_path / "folder").weight_format == "bfloat16"
    assert main(["export", str(tmp_path / "folder"), str(tmp_path / "out.gguf"), "--to", "q8_0"]) == 0
    assert load(tmp_path / "out.gguf").weight_format == "Q8_0"
    assert main(["export", str(tmp_path / "folder"), str(tmp_path / "same.gguf")]) == 0
    assert load(tmp_path / "same.gguf").weight_format == "BF16"
    assert capsys.readouterr().out.splitlines()[-1].endswith(" written")


def test_what_is_written_is_announced_before(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = tmp_path / "out.gguf"
    assert main(["export", str(tiny_folder), str(place), "--to", "q8_0"]) == 0
    count = sum(parameter.numel() for _, parameter in load(tiny_folder).network.tensors())
    said = capsys.readouterr()
    assert said.err == f"writing {count * 34 / 32 / 1000:.3g} kB of Q8_0 into {place}\n"
    assert main(["export", str(tiny_folder), str(tmp_path / "folder")]) == 0
    assert capsys.readouterr().err == f"writing {count * 4 / 1000:.3g} kB of float32 into {tmp_path / 'folder'}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "{model}"], "{model}: exists already; export to a new folder"),
        (
            ["{model}", "{new}", "--to", "q8_0"],
            "{new}: q8_0 blocks go into GGUF files only; end the destination in .gguf, or choose f32, f16 or bf16",
        ),
        (["{new}", "{new}.gguf"], "{new}: no such file or folder"),
    ],
)
def test_refusals(words: list[str], message: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    places = {"model": tiny_folder, "new": tmp_path / "new"}
    assert main(["export", *(word.format(**places) for word in words)]) == 1
    assert capsys.readouterr().err == f"qwen2: {message.format(**places)}\n"
