"""An embedding in blocks gives the rows of the unpacked matrix, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen2.model import PackedEmbedding
from qwen2.quant import FORMATS, format_id


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_equal_the_unpacked_matrix(name: str, dtype: torch.dtype):
    kind = format_id(name)
    blocks = np.random.default_rng(0).integers(0, 60, FORMATS[kind].size(20 * 512), dtype=np.uint8)  # bytes small enough for finite scales
    embedding = PackedEmbedding(torch.from_numpy(blocks), kind, (20, 512), dtype)
    rows = torch.tensor([3, 0, 19, 3])
    assert embedding(rows).dtype == dtype
    assert torch.equal(embedding(rows), dict(embedding.unpack())["weight"][rows])
    assert embedding(rows).isfinite().all()


def test_a_large_lookup_in_inference_mode_leaves_torch_s_threads_alone(monkeypatch: pytest.MonkeyPatch):
    """More rows than one piece, in the mode that the engine runs in: others may be computing in this process meanwhile."""
    kind = format_id("Q8_0")
    blocks = np.random.default_rng(0).integers(0, 60, FORMATS[kind].size(4 * 1024), dtype=np.uint8)
    embedding, rows = PackedEmbedding(torch.from_numpy(blocks), kind, (4, 1024), torch.float32), torch.tensor([1, 2] * 600)
    whole, changes = dict(embedding.unpack())["weight"], []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", changes.append)
    with torch.inference_mode():
        found = embedding(rows)
    assert torch.equal(found, whole[rows])
    assert changes == []
