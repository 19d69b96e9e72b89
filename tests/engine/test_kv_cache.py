"""The cache's accounting: what is kept, taken over, copied and freed; and that `check` sees what is wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.config import tiny
from qwen2.engine.kv_cache import KVCache, SequenceCache, common_prefix, memory, token_bytes

CONFIG = tiny()


TOKEN = token_bytes(CONFIG, torch.float32)


def new_cache(keep_bytes=10**9, **values):
    return KVCache(lambda: SequenceCache(CONFIG, torch.float32, torch.device("cpu")), keep_bytes, **values)


def read(cache, tokens):
    """Write tokens into every layer; the value of a token is its id, so that mix-ups show."""
    cache.reserve(len(cache) + len(tokens))
    k = torch.tensor(tokens, dtype=torch.float32)[:, None, None].expand(-1, CONFIG.kv_heads, CONFIG.head_dim)
    for layer in range(CONFIG.layers):
        cache.write(layer, k, -k)
    cache.advance(tokens)


def stored(cache):
    """The tokens as the tensors tell them, after checking that all layers, heads, keys and values agree."""
    length = len(cache)
    for keys, values in zip(cache.keys, cache.values, strict=True):
        assert (keys[:, :length] == cache.keys[0][0, :length, 0][None, :, None]).all()
        assert (values[:, :length] == -keys[:, :length]).all()
    return cache.keys[0][0, :length, 0].int().tolist()


def finish(pool, tokens):
    cache = pool.open(tokens)
    read(cache, tokens[len(cache) :])
    pool.close(cache)


def test_growing_keeps_what_was_written():
    cache = new_cache().open([0])
    for start in range(0, 1000, 37):
        read(cache, list(range(start, start + 37)))
    assert stored(cache) == cache.tokens == list(range(28 * 37))
    assert cache.capacity < 1.3 * len(cache) + 64  # memory grows with use
    assert memory([cache]) == 2 * CONFIG.layers * CONFIG.kv_heads * cache.capacity * CONFIG.head_dim * 4


def test_a_conversation_goes_on_in_the_same_memory():
    pool = new_cache()
    finish(pool, [1, 2, 3, 4])
    kept = pool.kept[0]
    cache = pool.open([1, 2, 3, 4, 5, 6])
    assert cache is kept
    assert stored(cache) == [1, 2, 3, 4]
    pool.check([cache])


def test_another_branch_copies_and_leaves_the_first():
    pool = new_cache()
    finish(pool, [1, 2, 3, 4])
    branch = pool.open([1, 2, 9, 9])
    read(branch, [9, 9])
    assert stored(branch) == [1, 2, 9, 9]
    assert stored(pool.kept[0]) == [1, 2, 3, 4]
    pool.check([branch])


def test_the_last_token_is_always_read_anew():
    pool = new_cache()
    finish(pool, [1, 2, 3])
    assert len(pool.open([1, 2, 3])) == 2
    assert len(pool.open([1])) == 0


def test_two_alternating_prompts_both_hit():
    pool = new_cache()
    first, second = [1, 2, 3, 4, 5], [1, 7, 8, 9, 5]
    finish(pool, first)
    finish(pool, second)
    for _ in range(3):
        for prompt in (first, second):
            cache = pool.open(prompt)
            assert len(cache) == 4
            read(cache, prompt[4:])
            pool.close(cache)
    assert len(pool.kept) == 2  # not one more at every turn


def test_kept_sequences_are_bounded_and_the_oldest_goes():
    pool = new_cache(keep=2)
    for base in (10, 20, 30):
        finish(pool, [base, base + 1, base + 2])
    assert [cache.tokens[0] for cache in pool.kept] == [20, 30]
    pool.open([20, 21, 99])  # used: now 30 is the oldest
    finish(pool, [40, 41])
    assert [cache.tokens[0] for cache in pool.kept] == [20, 40]
    pool.open([20, 21, 98])
    finish(pool, [50])
    assert [cache.tokens[0] for cache in pool.kept] == [20, 50]


def test_kept_sequences_are_bounded_in_bytes_but_for_the_last():
    pool = new_cache(keep_bytes=300 * TOKEN)
    for base in (10, 20, 30):
        finish(pool, list(range(base, base + 60)))  # 60 tokens with room for 64 more
    assert [cache.tokens[0] for cache in pool.kept] == [20, 30]
    assert pool.nbytes == 2 * 124 * TOKEN
    finish(pool, list(range(1000, 1400)))  # more than all that may be kept: the conversation that is going on
    assert [cache.tokens[0] for cache in pool.kept] == [1000]
    pool.check([])
    pool.kept.append(pool.kept[0].fork(5))
    with pytest.raises(RuntimeError, match=rf"^2 sequences of \d+ bytes are kept, 4 of {300 * TOKEN} bytes are allowed$"):
        pool.check([])


def test_reuse_can_be_refused():
    pool = new_cache()
    finish(pool, [1, 2, 3])
    assert len(pool.open([1, 2, 3, 4], reuse=False)) == 0


def test_forks_go_their_own_ways():
    pool = new_cache()
    one = pool.open([1, 2, 3])
    read(one, [1, 2, 3])
    two = pool.fork(one)
    read(one, [4])
    read(two, [5, 6])
    assert (stored(one), stored(two)) == ([1, 2, 3, 4], [1, 2, 3, 5, 6])
    one.truncate(2)
    assert stored(one) == [1, 2]
    pool.check([two, one])


def test_check_sees_what_is_wrong():
    pool = new_cache()
    cache = pool.open([1, 2])
    with pytest.raises(RuntimeError, match=r"^1 sequences are live, requests hold 0$"):
        pool.check([])
    pool.kept.append(cache)
    with pytest.raises(RuntimeError, match=r"^a kept sequence is in use$"):
        pool.check([cache])
    pool.kept.clear()
    cache.tokens = [0] * (cache.capacity + 1)
    with pytest.raises(RuntimeError, match=r"^a sequence of \d+ tokens has room for \d+, its tensors for"):
        pool.check([cache])
    cache.tokens = []
    twin = pool.open([1])
    twin.keys[0] = cache.keys[0]
    with pytest.raises(RuntimeError):
        pool.check([cache, twin])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), max_size=15))
def test_any_sequence_of_prompts_is_answered_from_true_memory(prompts):
    pool = new_cache(keep=3, keep_bytes=200 * TOKEN)
    for prompt in prompts:
        best = max((min(common_prefix(kept.tokens, prompt), len(prompt) - 1) for kept in pool.kept), default=0)
        cache = pool.open(prompt)
        assert stored(cache) == prompt[:best]  # the longest there was, and truly those tokens
        read(cache, prompt[best:])
        assert stored(cache) == prompt
        pool.check([cache])
        pool.close(cache)
        pool.check([])


@settings(deadline=None)
@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(a, b):
    length = common_prefix(a, b)
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]
