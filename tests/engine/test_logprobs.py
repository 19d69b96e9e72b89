"""Log-probabilities of a prompt's tokens and of continuations: the network's, to the last bit in any company, and each row read once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from qwen2 import LLM, SamplingParams, kernels
from qwen2.config import tiny
from qwen2.engine.logprobs import token_logprobs
from qwen2.engine.request import Continuation
from qwen2.weights.export import to_gguf
from tests.conftest import tiny_model
from tests.engine.oracle import network_logits

needs_kernels = pytest.mark.skipif(kernels.isa() is None, reason="this installation has no kernels for this processor")
SCORE = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=3)


def random_row(seed, size=340):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 4


def random_ids(length, seed):
    return torch.randint(0, 500, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def path(tmp_path):
    to_gguf(tiny_model(tiny()), tmp_path / "model.gguf", "Q8_0")
    return tmp_path / "model.gguf"


def test_they_are_the_models_own_and_name_no_padding():
    row = random_row(2)
    row[290:] += 50  # padding rows take part in the model's distribution, but are no tokens
    (found,) = token_logprobs(row[None], [5], 3, vocab=290)
    expected = row.double().log_softmax(-1)
    assert found.token_id == 5
    assert found.logprob == pytest.approx(float(expected[5]), abs=1e-4)
    best = expected[:290].sort(descending=True)
    assert [t for t, _ in found.top] == best.indices[:3].tolist()
    assert [p for _, p in found.top] == pytest.approx(best.values[:3].tolist(), abs=1e-4)
    assert best.indices[found.rank - 1] == 5
    assert token_logprobs(row[None], [5], 0, 290)[0].top == ()
    assert len(token_logprobs(row[None], [5], 400, 290)[0].top) == 290


@pytest.mark.parametrize("vocab", [512, 151_936])
def test_a_row_has_the_same_bits_alone_and_among_others(vocab):
    rows = torch.stack([random_row(seed, vocab) for seed in range(9)])
    tokens = list(range(7, 16))
    together = token_logprobs(rows, tokens, 4, vocab)
    assert together == [token_logprobs(rows[i][None], [tokens[i]], 4, vocab)[0] for i in range(9)]
    assert together[2:7] == token_logprobs(rows[2:7], tokens[2:7], 4, vocab)


def test_a_prompts_are_the_networks(llm, model):
    ids = llm.tokenizer.encode("The quick brown fox")
    expected = network_logits(model, ids).log_softmax(-1)
    output = llm.generate([ids], SCORE)[0]
    assert (output.text, output.token_ids, output.finish_reason) == ("", (), "length")
    first, *rest = output.prompt_logprobs
    assert first is None
    assert [each.token_id for each in rest] == ids[1:]
    for row, each in zip(expected, rest, strict=False):
        assert each.logprob == pytest.approx(float(row[each.token_id]), abs=1e-4)
        order = row[:305].argsort(descending=True)
        assert int(order[each.rank - 1]) == each.token_id
        assert [token for token, _ in each.top] == order[:3].tolist()
    written = llm.generate([ids], replace(SCORE, max_tokens=4))[0]
    assert written.prompt_logprobs == pytest.approx(output.prompt_logprobs) or len(written.prompt_logprobs) == len(ids)
    assert written.token_ids == llm.generate([ids], SamplingParams(temperature=0, max_tokens=4))[0].token_ids
    assert llm.generate([ids], SamplingParams(temperature=0, max_tokens=1))[0].prompt_logprobs is None
    assert llm.generate([ids[:1]], SCORE)[0].prompt_logprobs == (None,)


@needs_kernels
@pytest.mark.parametrize(
    "params", [SCORE, replace(SCORE, max_tokens=20, logprobs=2), replace(SCORE, max_tokens=9, temperature=1.0, seed=4, n=3)]
)
def test_the_same_bits_alone_together_in_chunks_from_memory_and_after_giving_way(path, params):
    def told(outputs):
        return [[(one.token_ids, one.logprobs, one.prompt_logprobs) for one in output.choices] for output in outputs]

    prompts = [random_ids(length, length) for length in (1, 2, 63, 64, 65, 100, 31, 8, 200, 5, 17, 40, 128, 70, 129, 12)]
    alone = [told(LLM(path).generate([ids], params))[0] for ids in prompts]
    llm = LLM(path, keep_bytes=10**9)
    assert told(llm.generate(prompts, params)) == alone
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2))  # all prompts are there to be found
    assert told(llm.generate(prompts, params)) == alone
    llm.engine.scheduler.chunk = 7
    assert told(llm.generate(prompts, params)) == alone
    assert all(output.usage.cached_tokens == 0 for output in llm.generate(prompts, params))
    scores = llm.score(prompts)
    for score, (one, *_) in zip(scores, alone, strict=True):
        assert score == [None if each is None else each.logprob for each in one[2]]
    size = llm.engine.runner.memory.block_bytes
    narrow = LLM(path, context=320, cache_bytes=6 * size, keep_bytes=6 * size)
    assert told(narrow.generate(prompts, params)) == alone
    assert params.max_tokens == 0 or narrow.engine.scheduler.preemptions > 0
    for engine in (llm.engine, narrow.engine):
        engine.settle()
        engine.check()


@needs_kernels
def test_what_is_written_has_the_log_probabilities_that_it_has_as_a_prompt(path):
    llm = LLM(path)
    prompt = random_ids(50, 3)
    written = llm.generate([prompt], SamplingParams(temperature=1.0, seed=2, max_tokens=30, ignore_eos=True, logprobs=5))[0]
    read = llm.generate([[*prompt, *written.token_ids]], replace(SCORE, prompt_logprobs=5))[0]
    assert read.prompt_logprobs[50:] == written.logprobs


def test_no_more_logits_than_a_block_and_the_head_only_for_who_asked(llm, monkeypatch):
    seen, logits = [], llm.model.network.logits
    monkeypatch.setattr(llm.model.network, "logits", lambda hidden, *more: (seen.append(len(hidden)), logits(hidden, *more))[1])
    monkeypatch.setattr("qwen2.engine.logprobs.LOGIT_ELEMENTS", 512 * 4)
    llm.generate(["x" * 50], SCORE)
    assert max(seen) <= 4
    assert sum(seen) == 49
    seen.clear()
    llm.generate(["y" * 50], SamplingParams(temperature=0, max_tokens=1))
    assert sum(seen) <= 1


def test_continuations(llm, model):
    def expected(ids, first):
        rows = network_logits(model, ids).log_softmax(-1)
        return sum(float(rows[i - 1, ids[i]]) for i in range(first, len(ids)))

    prompt = "Which of these is it? " * 5 + "Answer:"
    pairs = [(prompt, " yes"), (prompt, " no"), (prompt + " ", "no"), (list(b"ab"), "cd"), ("ab", list(b"cd")), ("a", "b" * 70)]
    found = llm.continuations(pairs)
    assert isinstance(found[0], Continuation)
    for (first, second), one in zip(pairs, found, strict=True):
        ids = [*(first.encode() if isinstance(first, str) else first), *(second.encode() if isinstance(second, str) else second)]
        assert [each.token_id for each in one.tokens] == ids[-len(one.tokens) :]
        assert one.logprob == pytest.approx(expected(ids, len(ids) - len(one.tokens)), abs=1e-3)
    assert found[2].logprob == found[1].logprob  # the space goes to what follows
    best = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))[0].token_ids
    assert llm.continuations([(list(prompt.encode()), best)])[0].greedy
    assert not found[0].greedy
    assert math.exp(found[0].tokens[0].logprob) < 1


def test_continuations_read_what_they_have_in_common_once(llm, monkeypatch):
    forward, rows = llm.engine.runner.forward, []
    monkeypatch.setattr(llm.engine.runner, "forward", lambda batch: (rows.append(sum(span.count for span in batch)), forward(batch))[1])
    prompt = list(b"0123456789" * 30)
    together = llm.continuations([(prompt, letter) for letter in "ABCD"])
    assert sum(rows) < 300 + 4 * 64
    llm.engine.clear_cache()
    assert together == [llm.continuations([(prompt, letter)])[0] for letter in "ABCD"]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda llm: llm.continuations([("a", "")]), "continuation is empty: there is nothing to be likely"),
        (lambda llm: llm.continuations([(" ", "a")]), "prompt is empty: a model needs at least one token to go on from"),
        (
            lambda llm: llm.continuations([("a", [9999])]),
            "continuation: token id 9999 is not in the vocabulary, whose ids go from 0 to 304",
        ),
        (lambda llm: llm.generate(["x" * 513], SCORE), "prompt has 513 tokens, the window is 512: shorten the prompt by at least 1, an"),
        (lambda llm: SamplingParams(max_tokens=0), "max_tokens 0: must be a whole number of at least 1"),
        (
            lambda llm: SamplingParams(max_tokens=0, prompt_logprobs=0, n=2),
            "n 2: must be 1 where max_tokens is 0, since nothing is written",
        ),
        (lambda llm: SamplingParams(prompt_logprobs=-1), "prompt_logprobs -1: must be a whole number of at least 0"),
    ],
)
def test_refusals(llm, ask, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ask(llm)
    assert len(llm.generate(["x" * 512], SCORE)[0].prompt_logprobs) == 512  # a text may fill the window


def test_numbers_that_are_none_end_the_request(make_llm, model, monkeypatch):
    llm = make_llm(model)
    logits = llm.model.network.logits
    monkeypatch.setattr(llm.model.network, "logits", lambda *hidden: logits(*hidden) * math.nan)
    for params in (SCORE, replace(SCORE, max_tokens=3, n=1)):
        with pytest.raises(FloatingPointError, match="log-probabilities are not finite: its weights are damaged"):
            llm.generate(["abcdef"], params)


def test_scoring_that_is_aborted_says_so(llm):
    with llm.engine.lock:
        request = llm.engine.request(list(b"x" * 100), replace(SCORE, max_tokens=5))
        llm.engine.submit(request)
        llm.engine.abort(request)
    llm.engine.settle()
    (chunk,) = request.outbox
    assert (chunk.finish_reason, chunk.output.prompt_logprobs) == ("abort", (None,))
