"""A short run of the header fuzzer; the long one is `python -m tests.fuzz.fuzz_headers`."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from tests.fuzz.fuzz_headers import run


def test_mutated_headers_end_in_clear_errors(tmp_path: Path) -> None:
    def library_agrees(kind: str, path: Path) -> None:
        """What we let through must not fail, or do worse, in the library behind us."""
        if kind == "safetensors":
            with safe_open(path, framework="numpy") as file:
                file.keys()

    report = run(6000, seed=1, folder=tmp_path, accepted=library_agrees)
    assert report.rounds == 6000
    assert report.accepted > 100  # the mutations are not so wild that nothing but the first check is reached
    assert min(report.refused["gguf"], report.refused["safetensors"]) > 2000
    assert len(report.reasons) > 50
