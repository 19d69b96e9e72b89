"""Log-probabilities of prompts over HTTP: OpenAI's `echo`, as evaluation harnesses read it, and vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from qwen2 import LLM, SamplingParams
from tests.server.conftest import NAME, Running

TEXT = "the quick brown fox jumps over the lazy d\u00f6g \u2603 and then"
MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]


def asked(openai_client: openai.OpenAI, **values: Any) -> Any:
    return openai_client.completions.create(model=NAME, temperature=0, **values)


@pytest.mark.parametrize("most", [0, 1, 5])
def test_echo_tells_every_token_of_the_prompt(openai_client: openai.OpenAI, llm: LLM, most: int) -> None:
    ids = llm.tokenizer.encode(TEXT)
    right = llm.generate([ids], SamplingParams(temperature=0, max_tokens=most, prompt_logprobs=5, logprobs=5))[0]
    for prompt in (TEXT, ids):
        choice = asked(openai_client, prompt=prompt, echo=True, max_tokens=most, logprobs=5).choices[0]
        told = choice.logprobs
        assert choice.text == TEXT + right.text
        assert told.token_logprobs[0] is None
        assert told.top_logprobs[0] is None
        every = [*(right.prompt_logprobs or ())[1:], *(right.logprobs or ())]
        assert told.token_logprobs[1:] == [one.logprob for one in every]
        assert len(told.tokens) == len(ids) + len(right.token_ids)
        for values, one in zip(told.top_logprobs[1:], every, strict=True):
            assert max(values.values()) == one.top[0][1]
            assert (one.logprob == max(values.values())) == (one.rank == 1)  # how a harness tells whether it is the model's own choice
        for token, offset, following in zip(told.tokens, told.text_offset, [*told.text_offset[1:], len(choice.text)], strict=True):
            assert "\ufffd" in token or choice.text[offset:following] == token


def test_a_harness_finds_how_likely_a_continuation_is(openai_client: openai.OpenAI, llm: LLM) -> None:
    context, rest = llm.tokenizer.encode("the quick brown"), llm.tokenizer.encode(" fox jumps")
    told = asked(openai_client, prompt=[[*context, *rest]], echo=True, max_tokens=1, logprobs=1, seed=1234).choices[0].logprobs
    values = told.token_logprobs[len(context) : -1]  # what was written in addition is left out
    assert sum(values) == llm.continuations([(context, rest)])[0].logprob


def test_the_stream_has_the_same(openai_client: openai.OpenAI) -> None:
    asking: dict[str, Any] = {"prompt": ["abc def", "the dog"], "echo": True, "max_tokens": 4, "logprobs": 2, "n": 2, "seed": 1}
    whole = openai_client.completions.create(model=NAME, temperature=1.0, **asking)
    texts, values, offsets = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)]  # type: ignore[var-annotated]
    for chunk in openai_client.completions.create(model=NAME, temperature=1.0, **asking, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                values[choice.index] += choice.logprobs.token_logprobs or []
                offsets[choice.index] += choice.logprobs.text_offset or []
    assert texts == [choice.text for choice in whole.choices]
    assert values == [choice.logprobs.token_logprobs for choice in whole.choices if choice.logprobs is not None]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices if choice.logprobs is not None]


def test_echo_alone_may_write_nothing(openai_client: openai.OpenAI) -> None:
    answer = asked(openai_client, prompt="abc", echo=True, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].logprobs, answer.usage.completion_tokens) == ("abc", None, 0)
    chunks = [chunk.choices[0] for chunk in asked(openai_client, prompt="abc", echo=True, max_tokens=0, stream=True)]
    assert [(choice.text, choice.finish_reason) for choice in chunks] == [("abc", "length")]


def test_prompt_logprobs_as_vllm_has_them(running: Running, llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXT)
    (right,) = llm.generate([ids], SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2))
    common = {"model": NAME, "temperature": 0, "max_tokens": 2, "prompt_logprobs": 2}
    told = running.post("/v1/completions", prompt=TEXT, **common).json()["choices"][0]["prompt_logprobs"]
    assert told[0] is None
    for values, one in zip(told[1:], (right.prompt_logprobs or ())[1:], strict=True):
        assert one is not None
        assert (values[str(one.token_id)]["logprob"], values[str(one.token_id)]["rank"]) == (one.logprob, one.rank)
        assert {int(token): each["logprob"] for token, each in values.items()} == dict(one.top) | {one.token_id: one.logprob}
        assert sorted(each["rank"] for each in values.values())[:2] == [1, 2]
    chat = running.post("/v1/chat/completions", messages=MESSAGES, **common).json()
    rendered = llm.template.render(MESSAGES, add_generation_prompt=True).ids
    assert len(chat["prompt_logprobs"]) == len(rendered) == chat["usage"]["prompt_tokens"]
    assert all(str(token) in values for token, values in zip(rendered[1:], chat["prompt_logprobs"][1:], strict=True))
    assert "prompt_logprobs" not in running.chat(max_tokens=1).json()


def test_in_a_crowd_and_beside_a_cache(running: Running) -> None:
    def score(text: str) -> Any:
        body = {"prompt": text, "echo": True, "max_tokens": 0, "logprobs": 2}
        return running.post("/v1/completions", model=NAME, **body).json()["choices"][0]["logprobs"]["token_logprobs"]

    alone = score(TEXT)
    running.post("/v1/completions", model=NAME, prompt=TEXT, max_tokens=4)
    with ThreadPoolExecutor(12) as pool:
        crowd = list(pool.map(lambda i: score(TEXT if i % 2 else f"{i} {TEXT}"), range(24)))
    assert all(one[1:] == pytest.approx(alone[1:], abs=1e-4) for one in crowd[1::2])


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs goes with stream: false"),
        ("chat/completions", {"messages": MESSAGES, "stream": True, "prompt_logprobs": 1}, "prompt_logprobs goes with stream: false"),
        ("completions", {"prompt": "a", "prompt_logprobs": -1}, "prompt_logprobs: "),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens 0: must be a whole number of at least 1"),
        ("completions", {"prompt": "a", "echo": True, "max_tokens": 0, "n": 2}, "n 2: must be 1 where max_tokens is 0"),
    ],
)
def test_refusals(running: Running, path: str, body: dict[str, Any], message: str) -> None:
    answer = running.post(f"/v1/{path}", model=NAME, **body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_embeddings_texts_and_scores_run_in_the_same_steps(serve: Callable[..., Running]) -> None:
    running = serve()
    running.chat(max_tokens=1)
    engine = running.server.models.loaded[NAME].llm.engine
    forward, kinds = engine.runner.forward, list[set[str]]()

    def watched(batch: Any) -> Any:
        requests = [span.answer.request for span in batch]
        kinds.append({"score" if one.scored else "embed" if one.only_read else "write" for one in requests})
        return forward(batch)

    engine.runner.forward = watched
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/embeddings", {"input": ["a rose", "b"]}),
        ("/v1/completions", {"prompt": TEXT, "echo": True, "max_tokens": 0, "logprobs": 1}),
        ("/v1/completions", {"prompt": "abc", "max_tokens": 8}),
    ]
    with ThreadPoolExecutor(3) as pool:
        with engine.lock:  # all are there before the first step
            answers = [pool.submit(running.post, path, model=NAME, **body) for path, body in bodies]
            while len(engine.inbox) < 4:
                pass
        assert [answer.result().status_code for answer in answers] == [200, 200, 200]
    assert {"score", "embed", "write"} in kinds
