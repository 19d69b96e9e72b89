"""Steps that break off: whoever was admitted hears of it, what waits is unharmed, nothing hangs, and the next request is right."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

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


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("part", "name"), PLACES)
def test_lack_of_memory_fails_the_batch_and_no_token_is_wrong(make_llm, model, monkeypatch, part, name, late):
    llm = make_llm(model, max_batch=2)
    expected = [llm.tokenizer.decode(slow_greedy(model, llm.tokenizer.encode(text), 24)) for text in ("abc", "defg", "hi", "jk")]
    streams = [llm.stream(text, GREEDY) for text in ("abc", "defg")]
    begun = [str(next(stream)) for stream in streams]
    waiting = {}
    threads = [threading.Thread(target=lambda t=t: waiting.update({t: outcome(llm.stream(t, GREEDY))})) for t in ("hi", "jk")]
    break_once(monkeypatch, getattr(llm.engine, part), name, MemoryError("no room"), late=late)
    for thread in threads:
        thread.start()
    found = [outcome(stream) for stream in streams]
    for thread in threads:
        thread.join()
    for got, start, text in zip([*found, waiting["hi"], waiting["jk"]], [*begun, "", ""], expected, strict=True):
        assert isinstance(got, MemoryError) or start + got == text
    llm.engine.check()
    assert llm.engine.scheduler.idle
    for text, right in zip(("abc", "defg", "hi", "jk"), expected, strict=True):
        assert llm.generate(text, GREEDY)[0].text == right


@pytest.mark.parametrize("name", ["forward", "logits"])
def test_those_of_the_batch_fail_and_those_that_wait_do_not(make_llm, model, monkeypatch, name):
    llm = make_llm(model, max_batch=2)
    streams = [llm.stream(text, GREEDY) for text in ("abc", "defg")]
    for stream in streams:
        next(stream)
    waiting = llm.engine.request(llm.tokenizer.encode("hi"), GREEDY)
    llm.engine._submit(waiting)
    break_once(monkeypatch, llm.engine.runner, name, MemoryError("no room"))
    assert [str(outcome(stream)) for stream in streams] == ["no room", "no room"]
    assert (waiting.error, waiting.finished) == (None, False)
    assert llm.engine.cache.kept == []  # half-written
    while not waiting.finished:
        llm.engine._turn([])
    assert list(waiting.outbox[-1].output.token_ids) == slow_greedy(model, waiting.prompt, 24)


def test_a_prompt_that_finds_no_memory_fails_in_place_of_those_that_wait(llm, monkeypatch):
    break_once(monkeypatch, llm.engine.cache, "open", MemoryError("no room"))
    first, second = (llm.engine.request(llm.tokenizer.encode(text), GREEDY) for text in ("ab", "cd"))
    for request in (first, second):
        llm.engine._submit(request)
    llm.engine._turn([second])
    assert (str(first.error), first.finished, second.error) == ("no room", True, None)
    assert [chunk.finish_reason for _, chunk in llm.engine.run([llm.engine.request([1], GREEDY)])][-1] == "length"
    assert second.finished


@pytest.mark.parametrize(("part", "name"), PLACES)
def test_an_interrupt_is_raised_here_and_told_to_the_others(llm, model, monkeypatch, part, name):
    mine, other = llm.stream("abc", GREEDY), llm.stream("def", GREEDY)
    next(mine), next(other)
    third = llm.stream("ghi", GREEDY) if name == "open" else mine  # a prompt to admit
    break_once(monkeypatch, getattr(llm.engine, part), name, KeyboardInterrupt())
    assert isinstance(outcome(third), KeyboardInterrupt)
    assert str(outcome(other)) == "the step was broken off by KeyboardInterrupt; ask again"
    llm.engine.check()
    output = llm.generate("def", GREEDY)[0]
    assert list(output.token_ids) == slow_greedy(model, llm.tokenizer.encode("def"), 24)


def test_samples_fail_together(llm, monkeypatch):
    break_once(monkeypatch, llm.engine.cache, "fork", MemoryError("no room"), after=1)
    with pytest.raises(MemoryError, match="no room"):
        llm.generate("abc", replace(WARM, n=3))
    assert len(llm.generate("abc", replace(WARM, n=3))[0].choices) == 3


def test_nothing_to_read_is_never_scheduled(llm):
    stream = llm.stream("abc", GREEDY)
    next(stream)
    answer = llm.engine.scheduler.running[0]
    answer.cache.advance([answer.tokens[-1]])
    with pytest.raises(AssertionError, match=r"^request 0: nothing to read"):
        next(stream)


def test_the_accounts_are_checked_when_the_engine_falls_idle(llm, monkeypatch):
    checked = []
    monkeypatch.setattr(llm.engine.cache, "check", lambda in_use: checked.append(list(in_use)))
    first, second = llm.stream("abc", GREEDY), llm.stream("def", replace(GREEDY, max_tokens=4))
    next(first), list(second)
    assert checked == []
    list(first)
    assert checked == [[]]
    llm.engine.cache.check = type(llm.engine.cache).check.__get__(llm.engine.cache)


# --- aborts at any moment


def within(seconds, work):
    """Run work in a thread and say whether it ended."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def test_abort_of_a_request_that_was_never_submitted_returns(llm):
    request = llm.engine.request([1, 2], GREEDY)
    assert within(20, lambda: llm.engine.abort(request))
    assert [chunk.finish_reason for _, chunk in llm.engine.run([request])] == ["abort"]  # and if it is submitted after all


def test_an_interrupt_before_a_request_is_submitted_ends_the_run(llm, monkeypatch):
    break_once(monkeypatch, llm.engine, "_submit", KeyboardInterrupt())
    found = []
    assert within(20, lambda: found.append(outcome(llm.stream("abc", GREEDY))))
    assert isinstance(found[0], KeyboardInterrupt)


def test_a_stream_closed_as_the_lock_is_taken_does_not_wait_for_itself(llm):
    """The collector may run a generator's end at any allocation, also right after the lock was acquired."""
    forgotten = llm.stream("abc", GREEDY)
    next(forgotten)

    def work():
        with llm.engine.lock:
            forgotten.close()

    assert within(20, work)
    assert llm.engine.scheduler.idle


def test_a_stream_closed_inside_a_sweep_is_left_to_it(llm, monkeypatch):
    forgotten, mine = llm.stream("abc", GREEDY), llm.stream("def", GREEDY)
    next(forgotten), next(mine)
    retire = llm.engine.scheduler.retire

    def collecting():
        forgotten.close()
        assert len(llm.engine.scheduler.running) == 2  # not swept under the hands of the sweep going on
        retire()

    monkeypatch.setattr(llm.engine.scheduler, "retire", collecting)
    mine.close()
    monkeypatch.undo()
    llm.abort()
    assert llm.engine.scheduler.idle


def test_a_request_from_inside_a_step_is_refused(llm, monkeypatch):
    refused = []
    begun = llm.stream("abc", GREEDY)
    next(begun)
    forward = llm.engine.runner.forward

    def asking(batch):  # as a signal's handler might
        refused.extend(outcome(stream) for stream in (begun, llm.stream("x", GREEDY)) if len(refused) < 2)
        return forward(batch)

    monkeypatch.setattr(llm.engine.runner, "forward", asking)
    assert llm.generate("abc", replace(GREEDY, max_tokens=1))[0].finish_reason == "length"
    words = "this thread is in the middle of a step: a signal's handler may abort requests, not run them"
    assert [str(error) for error in refused] == [words, words]


def test_samples_that_had_not_begun_are_aborted_each(make_llm, model):
    llm = make_llm(model, max_batch=1)
    params = replace(WARM, n=3)
    waiting = llm.stream("abc", params)
    llm.abort()
    assert sorted(chunk.index for chunk in waiting if chunk.finish_reason == "abort") == [0, 1, 2]
    llm.engine.scheduler.chunk = 2
    reading = llm.engine.request(llm.tokenizer.encode("abcdef"), params)
    llm.engine._submit(reading)
    llm.engine._turn([reading])
    llm.abort()
    assert sorted(chunk.index for chunk in reading.outbox if chunk.output.finish_reason == "abort") == [0, 1, 2]
    assert reading.finished


def test_what_has_ended_is_not_aborted_again(llm, monkeypatch):
    logits = llm.engine.runner.logits

    def aborting(hidden, rows):  # as another thread may, while the last token is chosen
        llm.abort()
        return logits(hidden, rows)

    monkeypatch.setattr(llm.engine.runner, "logits", aborting)
    chunks = list(llm.stream("abc", SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)))
    assert [chunk.finish_reason for chunk in chunks] == ["length"]
