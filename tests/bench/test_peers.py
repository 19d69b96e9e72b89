"""Where bench/peers.py looks for other engines, and the script that builds them, as far as it goes without building."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def chosen(home: Path, monkeypatch: pytest.MonkeyPatch, **given: object) -> tuple[list[str], Namespace]:
    monkeypatch.setenv("QWEN2_PEERS", str(home))
    monkeypatch.syspath_prepend(str(BENCH))
    args = Namespace(
        **{"model": "qwen2.5-coder:0.5b", "isa": None, "peers": None, "llama_cpp": None, "ctranslate2": None, "openvino": None, **given}
    )
    return runpy.run_path(str(BENCH / "peers.py"))["chosen"](args), args


def test_engines_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    columns, _ = chosen(tmp_path, monkeypatch)
    assert columns == ["ours", "transformers-fp32", "transformers-bf16"]
    assert capsys.readouterr().err.startswith("left out: llama.cpp, ctranslate2, openvino; bench/setup_peers.sh sets them up")


def test_what_the_script_built_is_used_where_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("llama/bin/python", "others/bin/python", "q8_0.gguf", "int8/model.bin"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    columns, args = chosen(tmp_path, monkeypatch)
    assert {"llama.cpp", "ctranslate2", "openvino"} < set(columns)
    assert args.ctranslate2 == [str(tmp_path / "others/bin/python"), str(tmp_path / "int8")]
    assert "llama.cpp" not in chosen(tmp_path, monkeypatch, isa="avx2")[0]  # it was built for all that this processor has
    assert "openvino" not in chosen(tmp_path, monkeypatch, model="smollm2:135m")[0]  # whose weights are another model's
    assert chosen(tmp_path, monkeypatch, llama_cpp="mine")[1].llama_cpp == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_script_says_what_it_would_do_and_refuses_the_rest(tmp_path: Path) -> None:
    environment = {**os.environ, "QWEN2_PEERS": str(tmp_path / "peers")}
    run = lambda *flags: subprocess.run([BENCH / "setup_peers.sh", *flags], env=environment, stderr=subprocess.PIPE, text=True)  # noqa: E731
    plan = run("--dry-run")
    assert plan.returncode == 0
    steps = [line.removeprefix("setup_peers: ") for line in plan.stderr.splitlines() if line.startswith("setup_peers: ")]
    assert steps == ["source", "configure", "build", "llama", "others", "weights"]
    assert "-DGGML_NATIVE=ON" in plan.stderr
    assert not (tmp_path / "peers").exists()
    unknown = run("source", "everything")
    assert (unknown.returncode, unknown.stderr) == (2, f"setup_peers: everything: unknown; the steps are {' '.join(steps)}\n")
    early = run("build")
    assert early.returncode == 1
    assert early.stderr.endswith("build.ninja is missing; first: bench/setup_peers.sh configure\n")
