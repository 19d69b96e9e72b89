"""`qwen2 bench`: the figures it prints belong to what was asked, and what cannot be measured is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2 import kernels
from qwen2.cli.app import main
from qwen2.engine import speed
from qwen2.weights.export import to_gguf
from qwen2.weights.model import load
from tests.conftest import tiny_model

Out = pytest.CaptureFixture[str]
SHORT = ["--prompt", "9", "17", "--depth", "0", "20", "--streams", "1", "2", "--tokens", "3", "--repeat", "1"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "BUFFER", 1 << 20)
    monkeypatch.setattr(speed, "ROUNDS", 100)


def test_json_has_a_row_for_everything_asked(tiny_folder: Path, capsys: Out) -> None:
    assert main(["bench", str(tiny_folder), *SHORT, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["tokens"] for row in report["prefill"]] == [9, 17]
    assert [(row["depth"], row["streams"]) for row in report["decode"]] == [(0, 1), (0, 2), (20, 1), (20, 2)]
    assert all(row["rate"] > 0 for row in report["prefill"] + report["decode"])
    assert report["isa"] == kernels.isa()
    assert (report["ceilings"] is None) == (kernels.isa() is None)


@pytest.mark.skipif(kernels.isa() is None, reason="ceilings are the kernels'")
@pytest.mark.parametrize(("form", "of"), [("F16", "32-bit floats"), ("BF16", "32-bit floats"), ("Q8_0", "8-bit integers")])
def test_speeds_are_held_against_what_the_weights_are_multiplied_with(form: str, of: str, tmp_path: Path, capsys: Out) -> None:
    to_gguf(tiny_model(), tmp_path / "model.gguf", form)
    assert (
        main(["bench", str(tmp_path / "model.gguf"), "--prompt", "9", "--depth", "0", "--streams", "2", "--tokens", "2", "--repeat", "1"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(f" GOP/s in products of {of}") for line in lines) == 1


def test_figures_are_medians_and_belong_together(tiny_folder: Path, capsys: Out) -> None:
    flags = ["--prompt", "9", "--depth", "0", "20", "--streams", "1", "2", "--tokens", "3", "--repeat", "4", "--json"]
    assert main(["bench", str(tiny_folder), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["depth"], row["streams"]) for row in report["decode"]] == [(0, 1), (0, 2), (20, 1), (20, 2)]
    for row in report["prefill"] + report["decode"]:
        assert len(row["rates"]) == 4
        assert row["rate"] == pytest.approx(sum(sorted(row["rates"])[1:3]) / 2)
    config = load(tiny_folder).config
    alone, both = report["decode"][:2]  # prompts of 8 tokens where depth is 0
    each = config.flops_per_token(8 + 3 // 2)
    assert alone["operations_per_second"] == pytest.approx(each * alone["rate"])
    read = report["weight_bytes"] + 2 * report["cache_bytes_per_token"] * (8 + 3 / 2)
    assert both["bytes_per_second"] == pytest.approx(read * both["rate"] / 2)


def test_the_table(tiny_folder: Path, capsys: Out) -> None:
    assert main(["bench", str(tiny_folder), *SHORT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tiny_folder}: float32, ")
    assert [line.split("  ")[0] for line in lines[-6:]] == [
        "prefill 9", "prefill 17", "decode at 0", "decode at 0, 2 streams", "decode at 20", "decode at 20, 2 streams",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "0"], "--prompt must be at least 1"),
        (["--depth", "-1"], "--depth must be at least 0"),
        (["--repeat", "0"], "--repeat must be at least 1"),
        (["--depth", "0", "--tokens", "100000"], "--depth 0 with --tokens 100,000 and --streams 1 needs 100,010 tokens, the window is"),
        (["--tokens", "100000"], "--depth 0 with --tokens 100,000 and --streams 1 needs 100,010 tokens, the window is"),
        (["--depth", "400", "--streams", "200", "--tokens", "32"], "--depth 400 with --tokens 32 and --streams 200 needs 832 tokens, the"),
        (["--threads", "0"], "threads 0: must be a whole number of at least 1"),
        (["--prompt", "100000"], "--prompt 100,000 does not fit the window of"),
    ],
)
def test_refusals(flags: list[str], message: str, tiny_folder: Path, capsys: Out) -> None:
    assert main(["bench", str(tiny_folder), *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"qwen2: {message}")
    assert error.count("\n") == 1


@pytest.mark.skipif(kernels.isa() is None, reason="this processor has no kernels to choose from")
def test_a_set_that_the_processor_lacks_is_refused(tiny_folder: Path, capsys: Out) -> None:
    other = "avx2" if kernels.isa() == "neon" else "neon"
    assert main(["bench", str(tiny_folder), "--isa", other]) == 1
    assert capsys.readouterr().err.startswith(f"qwen2: isa {other!r}: this processor cannot run it; it has ")
