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
    assert torch.equal(embedding(rows), embedding.unpack()[rows])
    assert embedding(rows).isfinite().all()


def test_a_large_lookup_in_inference_mode():
    """Rows enough to be shared out among threads, in the mode that the engine runs in."""
    kind = format_id("Q8_0")
    blocks = torch.zeros(FORMATS[kind].size(4 * 1024), dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            found = PackedEmbedding(blocks, kind, (4, 1024), torch.float32)(torch.tensor([1, 2] * 600))
    finally:
        torch.set_num_threads(threads)
    assert found.shape == (1200, 1024)
    assert not found.any()
