"""Steps that break off: whoever was admitted hears of it, what waits is unharmed, nothing hangs, and the next request is right."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace

import pytest

from qwen2 import LLM
from qwen2.engine.request import SamplingParams
from tests.engine.oracle import GREEDY, WARM, slow_greedy

# where a step can break off: (object of the engine, method)
PLACES = [
    ("scheduler", "next_batch"),
    ("cache", "open"),
    ("runner", "forward"),
    ("scheduler", "due"),
    ("runner", "logits"),
    ("cache", "close"),
    ("scheduler", "retire"),
]
LONG = replace(GREEDY, max_tokens=400)


def break_once(monkeypatch, place, name, error, after=0, late=False):
    """Raise on call number `after`, before its work or after it."""
    real, calls = getattr(place, name), []

    def broken(*args, **values):
        calls.append(name)
        if len(calls) != after + 1:
            return real(*args, **values)
        if late:
            real(*args, **values)
        raise error

    monkeypatch.setattr(place, name, broken)


def outcome(stream):
    """The text of a stream, or the error that it ends with."""
    try:
        return "".join(map(str, stream))
    except (MemoryError, RuntimeError, KeyboardInterrupt) as error:
        return error


def within(seconds, work):
    """Run work in a thread and say whether it ended."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def submitted(llm, texts, params=GREEDY):
    """Requests that the engine takes in at one step."""
    requests = [llm.engine.request(llm.tokenizer.encode(text), params) for text in texts]
    for request in requests:
        llm.engine.submit(request)
    return requests


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("part", "name"), PLACES)
def test_lack_of_memory_fails_the_batch_and_no_token_is_wrong(make_llm, model, monkeypatch, part, name, late):
    llm = make_llm(model, max_batch=2)
    texts = ("abc", "defg", "hi", "jk")
    expected = [slow_greedy(model, llm.tokenizer.encode(text), 24) for text in texts]
    break_once(monkeypatch, getattr(llm.engine, part), name, MemoryError("no room"), after=2, late=late)
    with llm.engine.lock:
        requests = submitted(llm, texts)
    llm.engine.settle()
    assert sum(request.error is not None for request in requests) in (1, 2)
    for request, right in zip(requests, expected, strict=True):
        assert request.finished
        if request.error is None:
            assert list(request.outbox[-1].output.token_ids) == right
        else:
            assert str(request.error) == "no room"
            begun = [token for chunk in request.outbox for token in chunk.token_ids]
            assert begun == right[: len(begun)]
    llm.engine.check()
    for text, right in zip(texts, expected, strict=True):
        assert list(llm.generate(text, GREEDY)[0].token_ids) == right


@pytest.mark.parametrize("name", ["forward", "logits"])
def test_those_of_the_batch_fail_and_those_that_wait_do_not(make_llm, model, monkeypatch, name):
    llm = make_llm(model, max_batch=2)
    break_once(monkeypatch, llm.engine.runner, name, MemoryError("no room"), after=3)
    with llm.engine.lock:
        first, second, waiting = submitted(llm, ("abc", "defg", "hi"))
    llm.engine.settle()
    assert [str(request.error) for request in (first, second, waiting)] == ["no room", "no room", "None"]
    assert list(waiting.outbox[-1].output.token_ids) == slow_greedy(model, waiting.prompt, 24)


def test_the_error_is_raised_where_the_request_is_waited_for(llm, monkeypatch):
    break_once(monkeypatch, llm.engine.runner, "forward", MemoryError("no room"), after=2)
    with pytest.raises(MemoryError, match=r"^no room$"):
        list(llm.stream("abc", GREEDY))


def test_what_is_no_error_but_an_end_is_told_as_one(llm, model, monkeypatch):
    break_once(monkeypatch, llm.engine.runner, "forward", SystemExit(3), after=2)
    assert str(outcome(llm.stream("def", GREEDY))) == "the step was broken off by SystemExit; ask again"
    assert list(llm.generate("def", GREEDY)[0].token_ids) == slow_greedy(model, llm.tokenizer.encode("def"), 24)


def test_samples_fail_together(llm, monkeypatch):
    break_once(monkeypatch, llm.engine.cache, "fork", MemoryError("no room"), after=1)
    with pytest.raises(MemoryError, match="no room"):
        llm.generate("abc", replace(WARM, n=3))
    assert len(llm.generate("abc", replace(WARM, n=3))[0].choices) == 3


def test_the_accounts_are_checked_when_the_engine_falls_idle(llm, monkeypatch):
    checked, real = [], llm.engine.cache.check
    monkeypatch.setattr(llm.engine.cache, "check", lambda in_use: checked.append((list(in_use), real(in_use))))
    with llm.engine.lock:
        submitted(llm, ("abc",))
        submitted(llm, ("def",), replace(GREEDY, max_tokens=4))
    llm.engine.settle()
    assert checked == [([], None)]


# --- aborts at any moment


def test_abort_of_a_request_that_was_never_submitted_returns(llm):
    request = llm.engine.request([1, 2], GREEDY)
    assert within(20, lambda: llm.engine.abort(request))
    assert [chunk.finish_reason for _, chunk in llm.engine.run([request])] == ["abort"]  # and if it is submitted after all


def test_an_interrupt_while_waiting_ends_the_request(llm, monkeypatch):
    stream = llm.stream("abc", LONG)
    next(stream)
    monkeypatch.setattr(threading.Event, "wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            pass
    monkeypatch.undo()
    llm.engine.settle()
    assert llm.engine.cache.live == []


def test_a_stream_closed_under_the_lock_does_not_wait_for_itself(llm):
    """The collector may run a generator's end at any allocation, also right after the lock was acquired."""
    forgotten = llm.stream("abc", LONG)
    next(forgotten)

    def work():
        with llm.engine.lock:
            forgotten.close()

    assert within(20, work)
    llm.engine.settle()


def test_the_engines_own_thread_does_not_wait_for_itself(llm, monkeypatch):
    refused = []
    forward = llm.engine.runner.forward

    def asking(batch):
        if not refused:
            refused.append(outcome(llm.stream("x", GREEDY)))
        return forward(batch)

    monkeypatch.setattr(llm.engine.runner, "forward", asking)
    assert llm.generate("abc", replace(GREEDY, max_tokens=1))[0].finish_reason == "length"
    assert str(refused[0]) == "this is the engine's own thread: what it calls may abort requests, not wait for them"


def test_samples_that_had_not_begun_are_aborted_each(make_llm, model, monkeypatch):
    llm = make_llm(model, max_batch=1)
    params = replace(WARM, n=3)
    waiting = llm.stream("abc", params)
    llm.abort()
    assert sorted(chunk.index for chunk in waiting if chunk.finish_reason == "abort") == [0, 1, 2]
    llm.engine.scheduler.chunk = 2
    forward = llm.engine.runner.forward

    def aborting(batch):  # in the middle of the prompt
        llm.abort()
        return forward(batch)

    monkeypatch.setattr(llm.engine.runner, "forward", aborting)
    with llm.engine.lock:
        (reading,) = submitted(llm, ("abcdef",), params)
    llm.engine.settle()
    assert sorted(chunk.index for chunk in reading.outbox if chunk.output.finish_reason == "abort") == [0, 1, 2]
    assert reading.finished


def test_what_has_ended_is_not_aborted_again(llm, monkeypatch):
    logits = llm.engine.runner.logits

    def aborting(*rows):  # as another thread may, while the last token is chosen
        llm.abort()
        return logits(*rows)

    monkeypatch.setattr(llm.engine.runner, "logits", aborting)
    chunks = list(llm.stream("abc", SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)))
    assert [chunk.finish_reason for chunk in chunks] == ["length"]


# --- the thread


def test_a_forgotten_engine_ends_its_thread(model):
    llm = LLM(model)
    llm.generate("abc", GREEDY)
    thread, engine = llm.engine.worker._thread, weakref.ref(llm.engine)
    assert thread.is_alive()
    llm.engine.settle()
    del llm
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
    assert engine() is None
