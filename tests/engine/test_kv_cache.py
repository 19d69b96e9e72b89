"""The cache's accounting: what is shared, copied, taken over, evicted and freed; and that `check` sees what is wrong."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.config import tiny
from qwen2.engine.attention import write
from qwen2.engine.blocks import BLOCK, BlockPool, NoRoomError, TensorMemory
from qwen2.engine.kv_cache import KVCache, common_prefix

CONFIG = tiny()
CPU = torch.device("cpu")


def new_cache(limit=100, keep=100, **values):
    return KVCache(TensorMemory(CONFIG, torch.float32, CPU), limit, keep, **values)


def read(sequence, tokens):
    """Write tokens into every layer; the value of a token is its id, so that mix-ups show."""
    sequence.reserve(len(sequence) + len(tokens))
    k = torch.tensor(tokens, dtype=torch.float32)[:, None, None].expand(-1, CONFIG.kv_heads, CONFIG.head_dim)
    for layer in range(CONFIG.layers):
        keys, values = write(sequence, layer, k, -k)
        assert (keys == -values).all()
        assert keys[0, :, 0].int().tolist() == [*sequence.tokens, *tokens]
    sequence.advance(tokens)


def stored(sequence):
    """The tokens as the memory tells them."""
    if not len(sequence):
        return []
    assert all(block.address == address for block, address in zip(sequence.blocks, sequence.addresses, strict=True))
    whole = torch.cat([block.memory for block in sequence.blocks], dim=3)[:, :, :, : len(sequence)]  # (L, 2, K, T, d)
    assert (whole[:, 0] == -whole[:, 1]).all()
    assert (whole[:, 0] == whole[:1, 0, :1, :, :1]).all()
    return whole[0, 0, 0, :, 0].int().tolist()


def finish(cache, tokens, **values):
    sequence = cache.open(tokens)
    read(sequence, tokens[len(sequence) :])
    cache.close(sequence, **values)


def numbers(count, start=1):
    return list(range(start, start + count))


def test_growing_keeps_what_was_written():
    cache = new_cache()
    sequence = cache.open([0])
    for start in range(0, 1000, 37):
        read(sequence, numbers(37, start))
    assert stored(sequence) == sequence.tokens == numbers(28 * 37, 0)
    assert len(sequence.blocks) == -(-28 * 37 // BLOCK)  # memory grows with use
    assert cache.nbytes == len(sequence.blocks) * 2 * CONFIG.layers * CONFIG.kv_heads * BLOCK * CONFIG.head_dim * 4
    cache.check([sequence])


def test_a_conversation_goes_on_in_the_same_memory():
    cache = new_cache()
    finish(cache, numbers(100))
    before = set(cache.idle)
    sequence = cache.open(numbers(120))
    assert stored(sequence) == numbers(100)
    assert {id(block) for block in sequence.blocks} == before  # shared, and the last one taken over
    cache.check([sequence])
    assert cache.pool.taken == 2


def test_what_is_being_copied_does_not_make_room_for_its_own_copy():
    cache = new_cache(limit=2)
    finish(cache, numbers(BLOCK))
    finish(cache, numbers(BLOCK, 1000))  # used later, so that the first would go before it
    sequence = cache.open([*numbers(10), 7, 8])
    assert stored(sequence) == numbers(10)
    cache.check([sequence])
    other = cache.open([*numbers(5), 9])  # one block is held, the other the only one to copy from: nothing is copied
    assert stored(other) == []
    cache.check([sequence, other])


def test_a_prefix_that_is_still_in_use_is_shared_and_its_end_copied():
    cache = new_cache()
    first = cache.open(numbers(150))
    read(first, numbers(150))
    second = cache.open([*numbers(150), 7])
    assert len(second) == 2 * BLOCK  # full blocks are found while their reader goes on, a part only when it has ended
    assert second.blocks == first.blocks[:2]
    read(second, [*numbers(22, 129), 7])
    assert stored(first) == numbers(150)
    cache.check([first, second])


def test_another_branch_copies_and_leaves_the_first():
    cache = new_cache()
    finish(cache, numbers(100))
    branch = cache.open([*numbers(80), 9, 9])
    assert len(branch) == 80
    read(branch, [9, 9])
    assert stored(branch) == [*numbers(80), 9, 9]
    assert stored(cache.open(numbers(101))) == numbers(100)
    assert cache.pool.taken == 3


def test_the_last_token_is_always_read_anew():
    cache = new_cache()
    finish(cache, numbers(3))
    assert len(cache.open(numbers(3))) == 2
    assert len(cache.open([1])) == 0
    cache = new_cache()
    finish(cache, numbers(128))
    assert len(cache.open(numbers(128))) == 127
    assert len(cache.open(numbers(129))) == 128


def test_several_alternating_prompts_all_hit():
    cache = new_cache()
    prompts = [[1, *numbers(300, base)] for base in (1000, 2000, 3000, 1000)]
    for prompt in prompts:
        finish(cache, prompt)
    taken = cache.pool.taken
    for _ in range(3):
        for prompt in prompts:
            sequence = cache.open(prompt)
            assert len(sequence) == 300
            read(sequence, prompt[300:])
            cache.close(sequence)
    assert cache.pool.taken == taken == 15  # not one more at every turn


def test_two_that_read_the_same_at_once_end_up_with_the_same_blocks():
    cache = new_cache()
    one, two = cache.open(numbers(200)), cache.open(numbers(200))
    for sequence in (one, two):
        read(sequence, numbers(200))
    assert one.blocks[:3] == two.blocks[:3]
    assert one.blocks[3] is not two.blocks[3]
    assert (stored(one), stored(two)) == (numbers(200), numbers(200))
    cache.check([one, two])


def test_a_prompt_takes_over_what_was_read_since():
    cache = new_cache()
    one, two = cache.open(numbers(200)), cache.open(numbers(200))
    read(one, numbers(200))
    assert cache.extend(two, numbers(200)) == 192
    assert stored(two) == numbers(192)
    assert cache.extend(two, numbers(200)) == 0
    cache.check([one, two])


def test_the_least_recently_used_goes_and_a_text_goes_from_its_end():
    cache = new_cache(limit=6)
    finish(cache, numbers(192))
    finish(cache, numbers(192, 1000))
    assert len(cache.idle) == 6
    cache.close(cache.open(numbers(193)))  # used just now: the other is the older one
    finish(cache, numbers(100, 5000))
    assert len(cache.open(numbers(193))) == 192
    assert len(cache.open(numbers(193, 1000))) == 64  # what is left of it is its beginning
    cache.check(cache.live)


def test_what_is_kept_is_bounded_but_for_the_last():
    cache = new_cache(keep=2)
    finish(cache, numbers(128))
    finish(cache, numbers(10, 1000))
    assert len(cache.idle) == 2
    finish(cache, numbers(500, 2000))  # more than may be kept: the conversation that is going on
    assert len(cache.idle) == 8
    assert len(cache.open(numbers(501, 2000))) == 500
    cache.check(cache.live)


def test_no_room_is_said_and_changes_nothing():
    cache = new_cache(limit=3)
    sequence = cache.open([1])
    read(sequence, numbers(100))
    other = cache.open([2])
    with pytest.raises(NoRoomError, match=r"^all 3 blocks of the cache are in use$"):
        other.reserve(100)
    cache.check([sequence, other])
    cache.close(sequence)
    other.reserve(192)  # evicts
    cache.check([other])
    assert not cache.idle


def test_reuse_can_be_refused():
    cache = new_cache()
    finish(cache, numbers(100))
    sequence = cache.open(numbers(101), reuse=False)
    assert len(sequence) == 0
    read(sequence, numbers(100, 500))
    cache.close(sequence)
    assert len(cache.open(numbers(101, 500))) == 0  # and nothing of it is found


def test_what_went_wrong_is_found_by_nobody():
    cache = new_cache()
    one = cache.open(numbers(200))
    read(one, numbers(200))
    two = cache.open(numbers(200))
    cache.discard(one)
    assert len(cache.open(numbers(200))) == 0
    assert stored(two) == numbers(192)
    cache.check(cache.live)
    cache.close(two)
    cache.check(cache.live)


def test_forks_go_their_own_ways():
    cache = new_cache()
    one = cache.open(numbers(100))
    read(one, numbers(100))
    two = cache.fork(one)
    assert one.blocks[0] is two.blocks[0]
    read(one, [4])
    read(two, [5, 6])
    assert (stored(one), stored(two)) == ([*numbers(100), 4], [*numbers(100), 5, 6])
    cache.check([two, one])


def test_texts_are_told_apart_by_their_tokens_not_their_hashes(monkeypatch):
    monkeypatch.setattr("builtins.hash", lambda _: 1)
    cache = new_cache()
    finish(cache, numbers(200))
    finish(cache, numbers(200, 1000))
    for start in (1, 1000):
        sequence = cache.open(numbers(201, start))
        assert stored(sequence) == numbers(len(sequence), start)
        read(sequence, numbers(201, start)[len(sequence) :])
        assert stored(sequence) == numbers(201, start)
    cache.check(cache.live)


def test_another_seed_finds_nothing_of_it():
    roots = {new_cache(seed=seed).root for seed in ((), ("weights", None, 4.0), ("weights", None, 2.0), ("others", None, 4.0))}
    assert len(roots) == 4


def test_slabs_go_back_when_nothing_of_them_is_in_use():
    class Small(TensorMemory):
        def slab(self):
            slab = super().slab()
            slab.blocks = slab.blocks[:4]
            return slab

    pool = BlockPool(Small(CONFIG, torch.float32, CPU), 100)
    taken = [pool.take() for _ in range(40)]
    pool.check(taken)
    Random(0).shuffle(taken)
    while taken:
        pool.give(taken.pop())
        pool.check(taken)
    assert len(pool.free) == 4


def test_check_sees_what_is_wrong():
    cache = new_cache()
    sequence = cache.open([1, 2])
    with pytest.raises(RuntimeError, match=r"^1 sequences are live, requests hold 0$"):
        cache.check([])
    read(sequence, numbers(100))
    sequence.blocks[0].refs = 2
    with pytest.raises(RuntimeError, match=r"^a block of the cache has 2 holders counted, 1 sequences hold it$"):
        cache.check([sequence])
    sequence.blocks[0].refs = 1
    lost = cache.take()
    with pytest.raises(RuntimeError, match=r"^3 blocks are counted as taken, 2 are held$"):
        cache.check([sequence])
    cache.pool.give(lost)
    cache.pool.give(sequence.blocks[1])
    cache.pool.taken += 1
    with pytest.raises(RuntimeError, match=r"^a block of the cache is free and in use"):
        cache.check([sequence])
    cache.pool.free.pop()
    sequence.tokens[0] = 99
    with pytest.raises(RuntimeError, match=r"^a block of the cache does not hold what its sequence has read$"):
        cache.check([sequence])
    sequence.tokens[0] = 1
    sequence.addresses[0] = 7
    with pytest.raises(RuntimeError, match=r"^a sequence has the address of another block$"):
        cache.check([sequence])


OPEN, READ, FORK, CLOSE, DISCARD, CLEAR = range(6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10**6)), max_size=60), st.integers(6, 40), st.integers(0, 20))
def test_any_course_of_events_is_answered_from_true_memory(events, limit, keep):
    """Texts over few letters, with many common beginnings; after every event the accounts are right and the memory tells the truth."""
    cache, live = new_cache(limit=limit, keep=keep), []
    for kind, number in events:
        random = Random(number)
        one = live[number % len(live)] if live else None
        if kind == OPEN:
            prompt = [token for _ in range(random.randint(1, 5)) for token in [random.randint(1, 2)] * random.choice((1, 31, 63, 64))]
            sequence = cache.open(prompt)
            assert sequence.tokens == prompt[: len(sequence)]
            assert len(sequence) < len(prompt)
            live.append(sequence)
        elif kind == READ and one is not None:
            new = [random.randint(1, 2)] * random.choice((1, 2, 64, 100))
            if cache.available >= one.missing(len(one) + len(new)):
                read(one, new)
        elif kind == FORK and one is not None and cache.available:
            live.append(cache.fork(one))
        elif kind == CLOSE and one is not None:
            live.remove(one)
            cache.close(one, keep=number % 3 > 0)
        elif kind == DISCARD and one is not None:
            live.remove(one)
            cache.discard(one)
        elif kind == CLEAR:
            cache.clear()
        cache.check(live)
        for sequence in live:
            assert stored(sequence) == sequence.tokens
    for sequence in live:
        cache.close(sequence)
    cache.clear()
    cache.check([])
    assert cache.pool.taken == 0
    assert not cache.found
    assert not cache.branches


@settings(deadline=None)
@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(a, b):
    length = common_prefix(a, b)
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]
