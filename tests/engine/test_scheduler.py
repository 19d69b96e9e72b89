"""Who runs when: priorities, fair shares of a step, prompts that share what others read, and answers that give way and go on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen2 import LLM, SamplingParams, kernels
from qwen2.config import tiny
from qwen2.engine.blocks import BLOCK
from qwen2.weights.export import to_gguf
from tests.conftest import tiny_model
from tests.engine.oracle import GREEDY, WARM, slow_greedy


def block_bytes(llm):
    return llm.engine.runner.memory.block_bytes


def watch(llm, monkeypatch):
    """The steps as they are taken: for each a list of (request id, sample, tokens read)."""
    steps, forward = [], llm.engine.runner.forward

    def watched(batch):
        steps.append([(span.answer.request.id, span.answer.index, span.count) for span in batch])
        return forward(batch)

    monkeypatch.setattr(llm.engine.runner, "forward", watched)
    return steps


def submit(llm, prompts, params=GREEDY, priorities=()):
    """Requests that are there at the same step."""
    requests = [llm.engine.request(prompt, params) for prompt in prompts]
    for request, priority in zip(requests, priorities, strict=False):
        request.priority = priority
    with llm.engine.lock:
        for request in requests:
            llm.engine.submit(request)
    return requests


def tokens(request):
    return [chunk.output for chunk in request.outbox if chunk.output is not None][-1].token_ids


def random_prompt(length, seed):
    return torch.randint(0, 255, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# --- order


def test_the_more_important_is_served_first(make_llm, model):
    llm = make_llm(model, max_batch=1)
    with llm.engine.lock:
        requests = submit(llm, [[1], [2], [3], [4]], priorities=(1, 0, 2, 0))
    llm.engine.settle()
    order = sorted(requests, key=lambda request: request.first_token)
    assert [request.id for request in order] == [1, 3, 0, 2]


def test_of_equals_who_was_handed_in_first_is_served_first(make_llm, model):
    llm = make_llm(model, max_batch=1)
    requests = [llm.engine.request([token], GREEDY) for token in (1, 2, 3)]
    with llm.engine.lock:
        for request in (requests[2], requests[0], requests[1]):
            llm.engine.submit(request)
    llm.engine.settle()
    assert [request.id for request in sorted(requests, key=lambda request: request.first_token)] == [2, 0, 1]


def test_who_is_more_important_takes_the_place_of_who_is_less(make_llm, model, monkeypatch):
    llm = make_llm(model, max_batch=2)
    less = [llm.stream(text, replace(GREEDY, max_tokens=200)) for text in ("abc", "def")]
    begun = [str(next(stream)) for stream in less]
    urgent = llm.engine.request([1, 2, 3], GREEDY)
    urgent.priority = -1
    assert "".join(str(chunk) for _, chunk in llm.engine.run([urgent])) == llm.tokenizer.decode(slow_greedy(model, [1, 2, 3], 24))
    assert llm.engine.scheduler.preemptions == 1
    for text, start, stream in zip(("abc", "def"), begun, less, strict=True):
        whole = start + "".join(map(str, stream))
        assert whole == llm.tokenizer.decode(slow_greedy(model, llm.tokenizer.encode(text), 200))


def test_answers_go_on_while_a_long_prompt_is_read(make_llm, model, monkeypatch):
    llm = make_llm(model)
    llm.engine.scheduler.chunk = 64
    steps = watch(llm, monkeypatch)
    with llm.engine.lock:
        submit(llm, [[1, 2]], replace(GREEDY, max_tokens=60))
        submit(llm, [random_prompt(400, 1)])
    llm.engine.settle()
    writing = [step for step in steps if (0, 0, 1) in step]
    beside = [count for step in writing for request, _, count in step if request == 1 and count > 1]
    assert len(beside) > 20  # never a long pause
    assert max(beside) <= 64 // 4


def test_a_short_prompt_does_not_wait_for_a_long_one(make_llm, model):
    llm = make_llm(model)
    llm.engine.scheduler.chunk = 64
    long, short = submit(llm, [random_prompt(450, 1), random_prompt(20, 2)])
    llm.engine.settle()
    assert short.first_token < long.first_token


def test_the_oldest_prompt_always_advances(make_llm, model, monkeypatch):
    llm = make_llm(model, max_batch=64)
    llm.engine.scheduler.chunk = 64
    steps = watch(llm, monkeypatch)
    submit(llm, [random_prompt(450, 1), *(random_prompt(40, seed) for seed in range(2, 40))], replace(GREEDY, max_tokens=1))
    llm.engine.settle()
    shares = [count for step in steps for request, _, count in step if request == 0]
    assert min(shares[:-1]) >= 4
    assert sum(shares) == 450


def test_prompts_with_one_beginning_read_it_once(make_llm, model, monkeypatch):
    llm = make_llm(model)
    llm.engine.scheduler.chunk = 128
    steps = watch(llm, monkeypatch)
    system = random_prompt(300, 1)
    prompts = [[*system, *random_prompt(20 + 3 * seed, seed)] for seed in range(8)]
    requests = submit(llm, prompts)
    llm.engine.settle()
    read = sum(count for step in steps for _, _, count in step)
    own, apart = (sum(len(prompt) - shared for prompt in prompts) for shared in (300, 256))
    assert 300 + own <= read - 8 * 23 <= 256 + apart  # of the fifth block, where they part, most is copied too
    for request in requests:
        assert list(tokens(request)) == slow_greedy(model, request.prompt, 24)
    llm.engine.check()


@pytest.mark.parametrize("n", [4, 16])
def test_nobody_waits_for_many_samples_to_find_places_together(make_llm, model, monkeypatch, n):
    llm = make_llm(model, max_batch=4)
    steps = watch(llm, monkeypatch)
    many = replace(WARM, n=n, max_tokens=2, logprobs=2)
    alone = make_llm(model, max_batch=32).generate([[1, 2, 3]], many)[0]
    with llm.engine.lock:
        (long,) = submit(llm, [[5, 6]], replace(GREEDY, max_tokens=100))
        (wide,) = submit(llm, [[1, 2, 3]], many)
        (short,) = submit(llm, [[7]], replace(GREEDY, max_tokens=2))
    llm.engine.settle()
    last = {request: max(i for i, step in enumerate(steps) if request.id in {entry[0] for entry in step}) for request in (long, short)}
    assert last[short] < 3 * n < last[long]
    assert max(len(step) for step in steps) == 4  # and never more at once than a batch has places
    outputs = {chunk.index: chunk.output for chunk in wide.outbox if chunk.output is not None}
    assert [outputs[i].token_ids for i in range(n)] == [choice.token_ids for choice in alone.choices]
    assert list(tokens(long)) == slow_greedy(model, long.prompt, 100)
    llm.engine.check()


# --- giving way


@pytest.fixture
def narrow(make_llm, model):
    """Room for one window of 512 tokens, and so for little more than one answer at a time."""
    size = block_bytes(LLM(model))
    return make_llm(model, cache_bytes=8 * size, keep_bytes=8 * size)


def test_answers_give_way_and_go_on_with_the_same_text(narrow, model, monkeypatch):
    params = replace(GREEDY, max_tokens=150)
    prompts = [random_prompt(60, seed) for seed in range(6)]
    requests = submit(narrow, prompts, params)
    narrow.engine.settle()
    assert narrow.engine.scheduler.preemptions > 0
    for request in requests:
        assert list(tokens(request)) == slow_greedy(model, request.prompt, 150)
    narrow.engine.check()


def test_samples_give_way_one_by_one(narrow, make_llm, model):
    params = replace(WARM, n=5, max_tokens=180)
    prompt = random_prompt(100, 1)
    few = narrow.generate([prompt], params)[0]
    assert narrow.engine.scheduler.preemptions > 0
    plenty = make_llm(model).generate([prompt], params)[0]
    assert [choice.token_ids for choice in few.choices] == [choice.token_ids for choice in plenty.choices]


def test_who_only_reads_gets_each_row_once(narrow, make_llm, model):
    texts = [random_prompt(330, seed) for seed in range(4)]
    asked = submit(narrow, [random_prompt(30, 9)], replace(GREEDY, max_tokens=300), priorities=(-1,))
    scores = narrow.score(texts)
    assert all(len(score) == 330 for score in scores)
    for score, right in zip(scores, make_llm(model).score(texts), strict=True):
        assert score[1:] == pytest.approx(right[1:], abs=1e-4)
    narrow.engine.settle()
    assert list(tokens(asked[0])) == slow_greedy(model, asked[0].prompt, 300)


@pytest.mark.skipif(kernels.isa() is None, reason="this installation has no kernels for this processor")
@pytest.mark.parametrize("cache_bits", [16, 8])
def test_the_same_bits_alone_together_after_giving_way_and_from_memory(tmp_path, cache_bits):
    to_gguf(tiny_model(tiny()), tmp_path / "model.gguf", "Q8_0")
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=120, ignore_eos=True, logprobs=4)
    prompts = [random_prompt(length, length) for length in (70, 64, 128, 3, 65, 200)]

    def told(outputs):
        return [(output.token_ids, output.logprobs) for output in outputs]

    llm = LLM(tmp_path / "model.gguf", cache_bits=cache_bits, keep_bytes=10**9)
    alone = [told(LLM(tmp_path / "model.gguf", cache_bits=cache_bits).generate([prompt], params))[0] for prompt in prompts]
    assert told(llm.generate(prompts, params)) == alone
    again = llm.generate(prompts, params)
    assert told(again) == alone
    assert all(output.usage.cached_tokens > 0 for output in again)
    size = llm.engine.runner.memory.block_bytes
    narrow = LLM(tmp_path / "model.gguf", cache_bits=cache_bits, cache_bytes=8 * size, keep_bytes=8 * size)
    assert told(narrow.generate(prompts, params)) == alone
    assert narrow.engine.scheduler.preemptions > 0
    narrow.engine.check()
    llm.engine.check()


def test_memory_is_bounded_by_what_was_asked(narrow):
    submit(narrow, [random_prompt(100, seed) for seed in range(10)], replace(GREEDY, max_tokens=100))
    narrow.engine.settle()
    assert narrow.engine.cache.pool.taken <= 8
    assert BLOCK * narrow.engine.cache.pool.limit >= narrow.window
