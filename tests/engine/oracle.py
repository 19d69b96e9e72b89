"""What the engine's tests measure by: the network without an engine, read anew for every token."""

from __future__ import annotations

import torch

from qwen2.engine.request import SamplingParams
from qwen2.model import packed_attend

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
WARM = SamplingParams(temperature=1.0, seed=5, max_tokens=24, ignore_eos=True)


@torch.inference_mode()
def network_logits(model, ids):
    """(T, V) by the network, without cache or engine."""
    attend = packed_attend(model.config, torch.arange(len(ids)), [len(ids)])
    return model.network.logits(model.network(torch.tensor(ids), attend))


def slow_greedy(model, ids, count):
    """Greedy tokens, the whole text read anew for each."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(network_logits(model, ids)[-1, :305].argmax()))
    return ids[-count:]
