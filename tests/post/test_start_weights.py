"""What `sft` and `dpo` both refuse where the weights themselves are to be trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2.post.adapters import check_weights
from qwen2.weights.export import to_gguf
from qwen2.weights.model import load
from tests.conftest import tiny_model


def test_weights_that_cannot_be_trained(tmp_path: Path):
    model = tiny_model()
    with pytest.raises(ValueError, match="has an adapter beside its weights: train that, or merge it first"):
        check_weights(replace(model, adapter=tmp_path), None)
    to_gguf(model, tmp_path / "base.gguf", "Q8_0")
    with pytest.raises(ValueError, match="weights in blocks cannot be trained themselves: train adapters, --lora-rank N"):
        check_weights(load(tmp_path / "base.gguf", packed=True), None)


def test_a_run_of_adapters_is_not_resumed_without_them(tmp_path: Path):
    check_weights(tiny_model(), tmp_path)  # no run there yet, which is said elsewhere
    (tmp_path / "config.json").write_text(json.dumps({"settings": {}}))
    check_weights(tiny_model(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"settings": {}, "lora": {"rank": 4}}))
    check_weights(tiny_model(), None)
    with pytest.raises(ValueError, match="this run trains adapters; give --lora-rank and what else it was started with"):
        check_weights(tiny_model(), tmp_path)
