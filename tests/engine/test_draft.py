"""A smaller model that guesses: no text changes, right guesses save steps, wrong ones cost little, and every block is accounted for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen2 import LLM, SamplingParams, kernels
from qwen2.config import tiny
from qwen2.engine.draft import AT_ONCE, DEBT, EARNED, READ
from qwen2.engine.speculative import TOGETHER
from qwen2.weights.export import to_gguf
from tests.conftest import tiny_model
from tests.engine.conftest import byte_model
from tests.engine.test_speculative import told

pytestmark = pytest.mark.skipif(kernels.isa() is None, reason="this installation has no kernels for this processor")
GREEDY = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True, repetition_penalty=1.3)  # which does not repeat itself


def random_ids(length, seed):
    return torch.randint(0, 500, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [random_ids(length, length) for length in (3, 64, 20, 90)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("draft") / "model.gguf"
    to_gguf(tiny_model(tiny()), file, "Q8_0")
    return file


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Another network of the same tokens, which is hardly ever right."""
    file = tmp_path_factory.mktemp("draft") / "small.gguf"
    to_gguf(tiny_model(tiny(layers=1), seed=5), file, "Q8_0")
    return file


@pytest.fixture
def bold(monkeypatch):
    """Models of random weights are sure of nothing: guess all the same."""
    monkeypatch.setattr("qwen2.engine.draft.CHECK", 0.0)


def drafting(path, small, cost=0.0, **values):
    llm = LLM(path, draft=small, **values)
    llm.engine.draft.cost = cost
    return llm


def settled(llm):
    llm.engine.settle()
    llm.engine.check()
    assert not llm.engine.draft.followers
    assert not llm.engine.draft.cache.live
    return llm


@pytest.mark.parametrize("same", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, presence_penalty=0.5, logprobs=3, prompt_logprobs=1),
        SamplingParams(temperature=0.8, seed=7, top_k=5, max_tokens=80, ignore_eos=True),
        SamplingParams(temperature=0.6, seed=3, n=3, max_tokens=60, ignore_eos=True),
        SamplingParams(temperature=0.5, seed=1, max_tokens=200),
    ],
    ids=["greedy", "penalties", "drawn", "samples", "eos"],
)
@pytest.mark.usefixtures("bold")
def test_no_text_changes(path, small, params, same):
    plain, guessing = LLM(path, guesses=0), drafting(path, path if same else small)
    for prompt in PROMPTS:
        ours, theirs = guessing.generate([prompt], params)[0], plain.generate([prompt], params)[0]
        assert told(ours.choices) == told(theirs.choices)
    assert told(guessing.generate(PROMPTS, params)) == told(plain.generate(PROMPTS, params))
    engine = settled(guessing).engine
    assert engine.drafted > 0
    assert engine.guessed >= engine.drafted >= engine.drafted_right
    assert not same or params.temperature or engine.drafted_right > 0


@pytest.mark.usefixtures("bold")
def test_right_guesses_save_steps(path, monkeypatch):
    llm = drafting(path, path)
    steps, forward = [], llm.engine.runner.forward
    monkeypatch.setattr(llm.engine.runner, "forward", lambda batch: (steps.append(len(batch)), forward(batch))[1])
    plain = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    llm.generate([PROMPTS[0]], plain)
    engine = settled(llm).engine
    assert engine.guessed_right >= 60
    assert engine.drafted == engine.drafted_right
    assert len(steps) < 40


@pytest.mark.usefixtures("bold")
def test_an_answer_that_loses_by_it_is_left(path, small, monkeypatch):
    llm = drafting(path, small, cost=0.4)
    reads, read = [], llm.engine.draft.runner.read
    monkeypatch.setattr(llm.engine.draft.runner, "read", lambda ids, *rest: (reads.append(len(ids)), read(ids, *rest))[1])
    llm.generate([PROMPTS[0]], replace(GREEDY, max_tokens=400))
    assert settled(llm).engine.drafted_right < 20
    assert not llm.engine.draft.left
    assert 0 < len(reads) * 0.4 < 2 * DEBT + 20 * 1.4  # in steps of the larger model: what was lost, and what guesses brought


def test_a_draft_that_is_unsure_offers_nothing(path, small):
    llm = drafting(path, small, cost=0.4)  # random weights: no token is likely
    assert told(llm.generate(PROMPTS, GREEDY)) == told(LLM(path, guesses=0).generate(PROMPTS, GREEDY))
    assert settled(llm).engine.drafted == 0


@pytest.mark.usefixtures("bold")
def test_a_prompt_is_read_only_for_an_answer_that_is_long_enough(path, monkeypatch):
    monkeypatch.setattr("qwen2.engine.speculative.Lookup.guess", lambda *_: ())
    llm = drafting(path, path)
    reads, read = [], llm.engine.draft.runner.read
    monkeypatch.setattr(llm.engine.draft.runner, "read", lambda ids, *rest: (reads.append(len(ids)), read(ids, *rest))[1])
    prompt = random_ids(300, 1)
    short = 300 // EARNED
    llm.generate([prompt], replace(GREEDY, max_tokens=short))
    assert not reads
    llm.generate([prompt], replace(GREEDY, max_tokens=2 * short))
    assert sum(reads) > 300
    assert max(reads) <= AT_ONCE
    reads.clear()
    llm.generate([[*prompt, 5, 6]], replace(GREEDY, max_tokens=20))  # what it has read before it does not read again
    assert reads[0] <= READ
    settled(llm)


@pytest.mark.usefixtures("bold")
def test_memory_is_shared_out_and_a_draft_makes_nobody_give_way(path, small):
    whole = LLM(path, draft=small)
    block, other = whole.engine.cache.pool.memory.block_bytes, whole.engine.draft.cache.pool.memory.block_bytes
    llm = drafting(path, path, context=320)  # the same network: blocks of equal size
    assert llm.engine.draft.cache.pool.limit == TOGETHER * 5
    narrow = drafting(path, path, context=320, cache_bytes=2 * 8 * block, keep_bytes=2 * 8 * block)
    assert narrow.engine.cache.pool.limit == narrow.engine.draft.cache.pool.limit == 8
    params = replace(GREEDY, max_tokens=150)
    assert told(narrow.generate(PROMPTS, params)) == told(LLM(path, guesses=0).generate(PROMPTS, params))
    assert narrow.engine.scheduler.preemptions > 0
    assert narrow.engine.drafted > 0
    assert settled(narrow).engine.cache_bytes <= 2 * 8 * block
    with pytest.raises(
        ValueError, match=rf"^a cache of {4 * (block + other):,} bytes holds 256 tokens, the window is 320: give it {5 * (block + other):,}"
    ):
        LLM(path, draft=small, context=320, cache_bytes=4 * (block + other))


@pytest.mark.usefixtures("bold")
def test_an_answer_that_is_aborted_leaves_nothing(path):
    llm = drafting(path, path)
    stream = llm.stream(PROMPTS[1], replace(GREEDY, max_tokens=400))
    for _ in range(60):
        next(stream)
    stream.close()
    assert settled(llm).engine.drafted > 0


@pytest.mark.usefixtures("bold")
def test_nobody_drafts_in_a_crowd(path):
    llm = drafting(path, path)
    with llm.engine.lock:
        for seed in range(TOGETHER + 1):
            llm.engine.submit(llm.engine.request(random_ids(10, seed), GREEDY))
    llm.engine.settle()
    assert settled(llm).engine.drafted == 0


@pytest.mark.usefixtures("bold")
def test_what_stands_in_the_text_is_not_drafted(path):
    llm = drafting(path, path)
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, logit_bias={11: 100.0})
    assert llm.generate([[11, 12] * 20], params)[0].token_ids == (11,) * 200
    engine = settled(llm).engine
    assert engine.guessed_right - engine.drafted_right > 150


@pytest.mark.usefixtures("bold")
def test_numbers_of_a_draft_that_are_none_harm_nobody(path, monkeypatch):
    llm = drafting(path, path)
    logits = llm.engine.draft.runner.logits
    monkeypatch.setattr(llm.engine.draft.runner, "logits", lambda x, rows: logits(x, rows) * float("nan"))
    assert told(llm.generate(PROMPTS, GREEDY)) == told(LLM(path, guesses=0).generate(PROMPTS, GREEDY))
    assert settled(llm).engine.drafted == 0


@pytest.mark.usefixtures("bold")
def test_a_step_of_the_draft_that_breaks_off_leaves_no_block(path, monkeypatch):
    llm = drafting(path, path)
    read = llm.engine.draft.runner.read

    def failing(*values):
        raise MemoryError("no room")

    monkeypatch.setattr(llm.engine.draft.runner, "read", failing)
    with pytest.raises(MemoryError, match="no room"):
        llm.generate([PROMPTS[0]], GREEDY)
    monkeypatch.setattr(llm.engine.draft.runner, "read", read)
    assert told(llm.generate(PROMPTS, GREEDY)) == told(LLM(path, guesses=0).generate(PROMPTS, GREEDY))
    settled(llm)


def test_refusals(path):
    with pytest.raises(ValueError, match=r"^draft tiny has other tokens than model.gguf, so it cannot guess them: take a smaller model of"):
        LLM(path, draft=packed(byte_model(), path))
    with pytest.raises(ValueError, match=r"^draft with guesses 0: a draft does nothing but guess; leave one of them out$"):
        LLM(path, draft=path, guesses=0)
    with pytest.raises(
        ValueError, match=r"^draft: only on a CPU with kernels is a guess checked without changing the text; leave draft out$"
    ):
        LLM(tiny_model(), draft=path)


def packed(model, path):
    """A model with the network of another: only its tokens matter here."""
    from qwen2.weights.model import load

    return replace(model, network=load(path, packed=True).network)
