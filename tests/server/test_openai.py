"""OpenAI's dialect through its own client and bare requests: answers equal the engine's, streams equal wholes, refusals name their cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest

from qwen2 import LLM, SamplingParams
from tests.server.conftest import NAME, Running

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]


def test_models(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == ["tiny:one", "tiny:two"]
    assert openai_client.models.retrieve("tiny:two").owned_by == "qwen2"
    with pytest.raises(openai.NotFoundError, match="model 'tiny:three' is not here"):
        openai_client.models.retrieve("tiny:three")


def test_the_answer_is_the_engines(openai_client: openai.OpenAI, llm: LLM) -> None:
    answer = openai_client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=0, max_completion_tokens=12)
    right = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=12))
    assert answer.choices[0].message.content == right.text
    assert answer.choices[0].finish_reason == right.finish_reason
    assert answer.usage is not None
    counts = (right.usage.prompt_tokens, right.usage.completion_tokens, right.usage.total_tokens)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == counts
    again = openai_client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=0, max_tokens=12)
    assert again.choices[0].message.content == right.text
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == right.usage.prompt_tokens - 1
    other = openai_client.chat.completions.create(model="tiny:two", messages=MESSAGES, temperature=0, max_tokens=12)
    assert other.choices[0].message.content != right.text


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0}, {"temperature": 1.0, "seed": 5, "n": 3, "top_p": 0.9}, {"temperature": 1.0, "seed": 2, "stop": ["e", "a"]}],
)
def test_the_whole_is_the_stream_folded(openai_client: openai.OpenAI, params: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "max_tokens": 20, "logprobs": True, "top_logprobs": 2, **params}
    whole = openai_client.chat.completions.create(**asked)
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    logprobs: dict[int, list[float]] = {}
    usage = None
    for chunk in openai_client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons |= {} if choice.finish_reason is None else {choice.index: choice.finish_reason}
            if choice.logprobs is not None and choice.logprobs.content:
                logprobs.setdefault(choice.index, []).extend(one.logprob for one in choice.logprobs.content)
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert reasons[choice.index] == choice.finish_reason
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert logprobs[choice.index] == [one.logprob for one in choice.logprobs.content]
        assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_the_same_seed_gives_the_same_text_in_a_crowd(running: Running) -> None:
    from concurrent.futures import ThreadPoolExecutor

    asked = {"temperature": 1.0, "seed": 11, "max_tokens": 30}
    alone = running.chat("Tell", **asked).json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(12) as pool:
        crowd = list(pool.map(lambda i: running.chat("Tell" if i % 2 else f"Other {i}", **asked).json(), range(24)))
    assert {answer["choices"][0]["message"]["content"] for answer in crowd[1::2]} == {alone}


def test_completions_of_texts_and_ids(openai_client: openai.OpenAI, llm: LLM) -> None:
    prompts = ["abc", "def"]
    answer = openai_client.completions.create(model=NAME, prompt=prompts, temperature=1.0, seed=3, max_tokens=6, n=2, logprobs=2)
    right = llm.generate(prompts, SamplingParams(temperature=1.0, seed=3, max_tokens=6, n=2, logprobs=2))
    assert [choice.text for choice in answer.choices] == [one.text for output in right for one in output.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs == [one.logprob for one in right[0].logprobs or ()]
    ids = llm.tokenizer.encode("abc")
    assert (
        openai_client.completions.create(model=NAME, prompt=ids, temperature=0, max_tokens=6).choices[0].text
        == llm.generate([ids], SamplingParams(temperature=0, max_tokens=6))[0].text
    )
    echoed = openai_client.completions.create(model=NAME, prompt="abc", temperature=0, max_tokens=3, echo=True).choices[0].text
    assert echoed.startswith("abc")
    streamed: dict[int, str] = {}
    for chunk in openai_client.completions.create(model=NAME, prompt=prompts, temperature=1.0, seed=3, max_tokens=6, n=2, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[i] for i in range(4)] == [choice.text for choice in answer.choices]


def test_ends_as_other_servers_take_them(openai_client: openai.OpenAI, llm: LLM) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    plain = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    token = plain.token_ids[5]
    ended = openai_client.chat.completions.create(**asked, extra_body={"ignore_eos": True, "stop_token_ids": [token]})
    before = plain.token_ids.index(token)
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage is not None
    assert ended.usage.completion_tokens == before + 1
    going_on = openai_client.chat.completions.create(**asked, extra_body={"ignore_eos": True})
    assert going_on.choices[0].finish_reason == "length"
    assert going_on.choices[0].message.content == plain.text


def test_embeddings(openai_client: openai.OpenAI, llm: LLM) -> None:
    texts = ["a rose", "another text", "c"]
    found = openai_client.embeddings.create(model=NAME, input=texts)  # the client asks for base64
    np.testing.assert_array_equal(np.array([one.embedding for one in found.data], np.float32), llm.embed(texts).numpy())
    plain = openai_client.embeddings.create(model=NAME, input=texts[0], encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, llm.embed(texts[:1])[0].numpy(), atol=1e-6)
    assert found.usage.prompt_tokens == sum(len(llm.tokenizer.encode(text)) for text in texts)


def test_tokens(running: Running, llm: LLM) -> None:
    found = running.post("/tokenize", model=NAME, messages=MESSAGES).json()
    assert found["tokens"] == list(llm.template.render(MESSAGES, add_generation_prompt=True).ids)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), llm.window)
    ids = running.post("/tokenize", model=NAME, prompt="Hello <|im_end|>").json()["tokens"]
    assert ids == llm.tokenizer.encode("Hello <|im_end|>")
    assert running.post("/detokenize", model=NAME, tokens=ids).json() == {"prompt": "Hello <|im_end|>"}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("chat/completions", {"foo": 1}, 400, "unknown field foo: this server would have to ignore it"),
        ("chat/completions", {"temperature": -1}, 400, "temperature -1.0: must be between 0 (greedy) and 100"),
        ("chat/completions", {"n": 1000}, 400, "n is 1000: this server writes at most 16 samples of one request"),
        ("chat/completions", {"stop": ["a"] * 17}, 400, "stop: at most 16 texts of at most 1000 characters"),
        ("chat/completions", {"messages": []}, 400, "messages is empty; a conversation has at least one message"),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0]: unknown role 'king'"),
        ("chat/completions", {"max_tokens": 0}, 400, "max_tokens 0: must be a whole number of at least 1"),
        ("chat/completions", {"max_tokens": 1, "max_completion_tokens": 2}, 400, "max_tokens and max_completion_tokens differ"),
        ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs goes with logprobs: true"),
        ("chat/completions", {"stream_options": {"include_usage": True}}, 400, "stream_options goes with stream: true"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x" * 3000}]},
            400,
            "the window is 1,024: shorten the prompt by at least",
        ),
        ("chat/completions", {"model": "../../etc/passwd"}, 404, "model '../../etc/passwd' is not here"),
        ("chat/completions", {"model": "gpt-4o"}, 404, "model 'gpt-4o' is not here, and there is none of that name to pull"),
        ("completions", {"prompt": []}, 400, "prompt has 0 texts: 1 to 2048 at once"),
        ("completions", {"prompt": [99999]}, 400, "prompt: token id 99999 is not in the vocabulary"),
        ("embeddings", {"input": ""}, 400, "prompt is empty"),
    ],
)
def test_refusals(running: Running, path: str, body: dict[str, Any], status: int, message: str) -> None:
    standing = {"model": NAME} | ({"messages": MESSAGES} if path.startswith("chat") else {})
    answer = running.client.post(f"/v1/{path}", json={**standing, **body})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] in ("invalid_request_error", "not_found_error")


def test_an_over_long_prompt_has_openais_code(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x" * 3000}])
    assert caught.value.code == "context_length_exceeded"


def test_messages_come_back_as_clients_hold_them(openai_client: openai.OpenAI, running: Running) -> None:
    """An answer is appended as it came, with its nulls; Qwen-Agent adds notes of its own; the system may be called a developer."""
    asked: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 5}
    first = openai_client.chat.completions.create(messages=MESSAGES, **asked).choices[0].message
    second = openai_client.chat.completions.create(messages=[*MESSAGES, first, {"role": "user", "content": "And?"}], **asked)
    noted = {"role": "assistant", "content": first.content, "refusal": None, "annotations": [], "id": "1", "extra": {"function_id": "1"}}
    plain = [*MESSAGES, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And?"}]
    for messages in (plain, [*MESSAGES, noted, plain[-1]]):
        assert running.post("/v1/chat/completions", messages=messages, **asked).json()["choices"][0]["message"]["content"] == (
            second.choices[0].message.content
        )
    counts = [
        running.post("/tokenize", model=NAME, messages=[{"role": role, "content": "Be brief"}, *MESSAGES]).json()["tokens"]
        for role in ("system", "developer")
    ]
    assert counts[0] == counts[1]
    unread = running.post("/v1/chat/completions", messages=[{"role": "assistant", "refusal": "no", "content": "x"}], **asked)
    assert "messages[0] has the unknown key 'refusal'" in unread.json()["error"]["message"]


def test_bodies_that_are_no_json(running: Running) -> None:
    answer = running.client.post("/v1/chat/completions", content=b'{"model":', headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    missing = running.post("/v1/chat/completions", model=NAME).json()["error"]
    assert missing["message"].startswith("messages: ")


# --- clients that go away


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_answer(running: Running, stream: bool) -> None:
    import socket
    import time

    running.chat(max_tokens=1)  # loaded
    engine = running.server.models.loaded[NAME].llm.engine
    body = json.dumps(
        {
            "model": NAME,
            "messages": MESSAGES,
            "stream": stream,
            "max_tokens": 490,
            "temperature": 1,
            "logit_bias": {"511": -100, "509": -100},
        }
    )
    port = int(running.url.rpartition(":")[2])
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with engine.lock, socket.create_connection(("127.0.0.1", port)) as connection:  # it is there before the first step
        connection.sendall((head + body).encode())
        while not engine.inbox:
            time.sleep(0.005)
    steps = 0
    forward = engine.runner.forward

    def counted(batch: Any) -> Any:
        nonlocal steps
        steps += 1
        return forward(batch)

    engine.runner.forward = counted
    engine.settle()
    assert steps < 400
    assert not engine.cache.live


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(running: Running) -> None:
    running.chat(max_tokens=1)
    engine = running.server.models.loaded[NAME].llm.engine
    forward, calls = engine.runner.forward, []

    def failing(batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("no room")
        return forward(batch)

    engine.runner.forward = failing
    lines = [line for line in running.chat(stream=True, max_tokens=50, temperature=0).text.split("\n\n") if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["message"].startswith("there is not enough memory")
    engine.runner.forward = forward
    assert running.chat(max_tokens=5).status_code == 200


# --- models


def test_models_give_way_to_each_other(serve: Callable[..., Running]) -> None:
    running = serve(max_loaded=1)
    for name in (NAME, "tiny:two", NAME):
        assert running.post("/v1/completions", model=name, prompt="a", max_tokens=2).status_code == 200
        assert list(running.server.models.loaded) == [name]


def test_a_model_goes_when_nobody_asks_for_it(serve: Callable[..., Running]) -> None:
    import time

    running = serve(keep_alive=0.2)
    running.chat(max_tokens=1)
    assert running.client.get("/health").json()["models"] == [NAME]
    time.sleep(1.5)
    assert running.client.get("/health").json()["models"] == []
    assert running.chat(max_tokens=1).status_code == 200
