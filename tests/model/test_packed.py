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
