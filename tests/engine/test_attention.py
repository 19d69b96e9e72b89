"""Attention over the cache equals attention without one, however the tokens are cut into steps and mixed into batches."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.config import tiny
from qwen2.engine import attention
from qwen2.engine.attention import cached_attend
from qwen2.engine.blocks import TensorMemory
from qwen2.engine.kv_cache import KVCache
from qwen2.model import Rope, packed_attend
from tests.conftest import random_network

CPU = torch.device("cpu")


def whole(network, tokens):
    """Hidden states of one sequence, without any cache."""
    return network(torch.tensor(tokens), packed_attend(network.config, torch.arange(len(tokens)), [len(tokens)]))


def stepwise(network, sequences, steps):
    """Read the sequences together: each step takes from each as many tokens as `steps` says, until all are read."""
    memory = KVCache(TensorMemory(network.config, torch.float32, CPU), limit=1000, keep=0)
    caches = [memory.open(sequence, reuse=False) for sequence in sequences]
    rope, rows = Rope(network.config), [[] for _ in sequences]
    for counts in steps:
        spans = []
        for sequence, cache, n in zip(sequences, caches, counts, strict=True):
            n = min(n, len(sequence) - len(cache))
            if n:
                cache.reserve(len(cache) + n)
                spans.append((cache, sequence[len(cache) : len(cache) + n]))
        if not spans:
            continue
        attend = cached_attend(rope, [(cache, len(new)) for cache, new in spans], torch.float32, CPU)
        hidden = network(torch.tensor([t for _, new in spans for t in new]), attend)
        for (cache, new), part in zip(spans, hidden.split([len(new) for _, new in spans]), strict=True):
            rows[next(i for i, c in enumerate(caches) if c is cache)].append(part)
            cache.advance(new)
    return [torch.cat(r) for r in rows]


@torch.inference_mode()
def check(config, sequences, steps):
    network = random_network(config)
    steps = [*steps, [max(map(len, sequences))] * len(sequences)]
    for ours, sequence in zip(stepwise(network, sequences, steps), sequences, strict=True):
        torch.testing.assert_close(ours, whole(network, sequence), rtol=1e-4, atol=1e-4)


def test_every_shape_of_the_family(shape):
    tokens = torch.randint(shape.vocab, (3, 40), generator=torch.Generator().manual_seed(1)).tolist()
    check(shape, tokens, [[20, 1, 5], [1, 1, 9], [1, 30, 1], [7, 1, 1]])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_steps_give_the_same(data):
    count = data.draw(st.integers(1, 3))
    sequences = data.draw(st.lists(st.lists(st.integers(0, 511), min_size=1, max_size=30), min_size=count, max_size=count))
    steps = data.draw(st.lists(st.lists(st.integers(0, 9), min_size=count, max_size=count), max_size=8))
    check(tiny(layers=1), sequences, steps)


def test_blocks_of_queries_are_the_whole_mask(monkeypatch):
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 100)
    check(tiny(), [list(range(60))], [[20], [33]])


def test_masks_look_at_history_and_backwards_only():
    (mask,) = attention._masks(3, 2, CPU)
    assert mask.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_large_key_biases_stay_finite_in_bfloat16():
    dtype = torch.bfloat16
    network = random_network(tiny())
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.k_proj.bias.fill_(300.0)  # Qwen2-7B has such; float16 overflows on their products
    with torch.inference_mode():
        wide = whole(network, list(range(20)))
        network = network.to(dtype)
        cache = KVCache(TensorMemory(network.config, dtype, CPU), limit=1, keep=0).open(range(20))
        cache.reserve(20)
        narrow = network(torch.arange(20), cached_attend(Rope(network.config), [(cache, 20)], dtype, CPU))
    assert torch.isfinite(narrow).all()
    assert torch.nn.functional.cosine_similarity(narrow.float(), wide, dim=-1).median() > 0.99
