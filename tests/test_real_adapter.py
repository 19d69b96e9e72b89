"""An adapter of a real model whose head is its embedding: beside the weights, merged, as a folder read again and as GGUF, the same logits.

Peers have lost a trained head there: merged, it was tied again. The adapter is on every linear layer, random as if it were trained
far, so that what it does is well above what formats round.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen2 import LLM
from qwen2.cli.app import main
from qwen2.model.lora import LoraSettings, add_lora, lora_parameters
from qwen2.weights.adapter import save_adapter
from qwen2.weights.model import load
from tests.model.test_parity import our_logits

pytestmark = pytest.mark.xdist_group("real model")
TEXT = "The capital of France is Paris, and the capital of Italy is Rome. Two and three make five."


@torch.no_grad()
def test_a_tied_models_adapter_merged_reloaded_and_gguf_have_the_same_logits(smollm: Path, tmp_path: Path) -> None:
    plain, settings, generator = load(smollm), LoraSettings(rank=4, alpha=8), torch.Generator().manual_seed(1)
    ids = plain.tokenizer.encode(TEXT)
    network, tokens = plain.network, torch.tensor([ids])
    base = our_logits(network, tokens)[0]  # (T, V)
    packed = LLM(smollm)
    noise = (packed.logits(ids) - base).abs().mean()  # of products with inputs in 8 bits
    add_lora(network, settings)
    for parameter in lora_parameters(network).values():
        parameter.copy_(0.04 * torch.randn(parameter.shape, generator=generator))
    adapted = our_logits(network, tokens)[0]
    effect = (adapted - base).abs().mean()
    assert plain.config.tied
    assert effect > 4 * noise
    adapter, folder, file = (tmp_path / name for name in ("adapter", "folder", "merged.gguf"))
    save_adapter(network, settings, adapter, str(smollm))
    assert main(["export", str(adapter), str(folder)]) == 0
    assert main(["export", str(folder), str(file), "--to", "q8_0"]) == 0
    reloaded = load(folder)
    assert reloaded.config.tied
    torch.testing.assert_close(our_logits(reloaded.network, tokens)[0], adapted, rtol=1e-3, atol=1e-3)
    found = {"beside the file's blocks": packed.beside(adapter=adapter).logits(ids), "GGUF": LLM(file).logits(ids)}
    for name, logits in found.items():
        assert (logits - adapted).abs().mean() < 2 * noise, name
