"""Packing that is stopped: nobody waits for weights that nobody wants any more."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2 import kernels
from qwen2.tokenizer import Tokenizer
from qwen2.weights import pack
from qwen2.weights.export import to_gguf
from qwen2.weights.model import load
from tests.conftest import tiny_model

needs_kernels = pytest.mark.skipif(kernels.isa() is None, reason="no kernels for this processor")


@needs_kernels
def test_packing_stops_between_two_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    packing, calls = pack.Packing(), []
    for number in range(3):
        place = pack.Place(7, 1000 * number, Path("model.gguf"))
        packing.add(pack.Rows(0, 16, 32, lambda first, count: pytest.fail("read by Python"), place))

    def packed(file: int, matrices: list[object], offsets: list[int]) -> None:
        calls.append(offsets)
        if len(calls) == 2:
            packing.stop()

    monkeypatch.setattr(pack, "TURN", 1)
    monkeypatch.setattr(pack, "pack_file", packed)
    packing.run()
    assert calls == [[0], [1000]]


@needs_kernels
@pytest.mark.parametrize("error", [ValueError("a vocabulary that is wrong"), KeyboardInterrupt()])
def test_what_is_wrong_with_the_texts_stops_packing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException) -> None:
    stops = []

    def wrong(metadata: object) -> None:
        raise error

    to_gguf(tiny_model(), tmp_path / "model.gguf", "Q8_0")
    monkeypatch.setattr(Tokenizer, "from_gguf", wrong)
    monkeypatch.setattr(pack.Packing, "stop", lambda packing: stops.append(packing))
    with pytest.raises(type(error), match="a vocabulary that is wrong" if str(error) else None):
        load(tmp_path / "model.gguf", packed=True)
    assert len(stops) == 1
