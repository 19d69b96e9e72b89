"""How answers end: at an end token, a stop string, a limit, or because nobody listens any more; and what is freed then."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from qwen2.config import GenerationDefaults
from qwen2.engine.request import SamplingParams
from tests.engine.conftest import byte_tokenizer
from tests.engine.oracle import GREEDY, HELLO, WARM, slow_greedy

LONG = replace(GREEDY, max_tokens=400)

# --- ends


def test_eos_ends_and_is_not_text(make_llm, model):
    prompt = byte_tokenizer().encode("abc")
    fourth = slow_greedy(model, prompt, 4)[-1]
    first = slow_greedy(model, prompt, 4).index(fourth)
    llm = make_llm(replace(model, generation=GenerationDefaults(eos=(fourth,))))
    output = llm.generate(prompt, SamplingParams(max_tokens=9))[0]
    assert (output.finish_reason, output.stopped_by, len(output.token_ids)) == ("stop", fourth, first + 1)
    assert output.text == llm.tokenizer.decode(output.token_ids[:-1])
    on = llm.generate(prompt, SamplingParams(max_tokens=9, ignore_eos=True))[0]
    assert (on.finish_reason, list(on.token_ids)) == ("length", slow_greedy(model, prompt, 9))
    asked = llm.generate(prompt, SamplingParams(max_tokens=9, ignore_eos=True, stop_token_ids=[fourth]))[0]
    assert (asked.finish_reason, asked.token_ids) == ("stop", output.token_ids)


def test_a_stop_string_ends_the_text_before_it(llm):
    free = llm.generate("tell", replace(WARM, max_tokens=60))[0]
    stop = free.text[5:8]
    output = llm.generate("tell", replace(WARM, max_tokens=60, stop=stop))[0]
    assert output.text == free.text[: free.text.index(stop)]
    assert (output.finish_reason, output.stopped_by) == ("stop", stop)
    assert free.token_ids[: len(output.token_ids)] == output.token_ids
    streamed = [str(chunk) for chunk in llm.stream("tell", replace(WARM, max_tokens=60, stop=stop))]
    assert "".join(streamed) == output.text


def test_text_held_back_is_shown_when_the_answer_ends(llm):
    free = llm.generate("tell", replace(WARM, max_tokens=12))[0]
    output = llm.generate("tell", replace(WARM, max_tokens=12, stop=free.text[-1] + "\x00never"))[0]
    assert (output.text, output.finish_reason) == (free.text, "length")


def test_without_max_tokens_the_window_is_the_end(make_llm, model):
    llm = make_llm(model, context=40)
    output = llm.generate("abcdef", SamplingParams(ignore_eos=True))[0]
    assert (len(output.token_ids), output.params.max_tokens, output.finish_reason) == (34, 34, "length")
    assert list(output.token_ids) == slow_greedy(model, llm.tokenizer.encode("abcdef"), 34)
    assert len(llm.generate("abcdef", SamplingParams(ignore_eos=True, max_tokens=99))[0].token_ids) == 34


# --- abort


def test_a_closed_stream_frees_its_sequence(llm):
    stream = llm.stream(HELLO, LONG)
    next(stream)
    assert len(llm.engine.cache.live) == 1
    stream.close()
    llm.engine.settle()
    assert llm.engine.cache.live == []
    llm.stream(HELLO, GREEDY)  # never begun: nothing to free
    assert llm.engine.scheduler.idle


def test_abort_ends_what_runs_what_waits_and_what_has_not_begun(make_llm, model):
    llm = make_llm(model, max_batch=1)
    running, waiting, unbegun = (llm.stream(prompt, LONG) for prompt in ("abc", "def", "ghi"))
    chunks, found = [next(running)], []
    with llm.engine.lock:  # nobody steps
        thread = threading.Thread(target=lambda: found.extend(waiting))
        thread.start()
        while not llm.engine.inbox:
            time.sleep(0.001)
        llm.abort()
    thread.join()
    chunks += running
    assert chunks[-1].finish_reason == "abort"
    assert chunks[-1].output.text == "".join(map(str, chunks))
    assert found[-1].output.token_ids == ()
    assert [chunk.finish_reason for chunk in (*found, *unbegun)] == ["abort", "abort"]
    llm.engine.settle()
    assert llm.engine.cache.live == []
    assert llm.generate("abc", GREEDY)[0].finish_reason == "length"  # what is asked for later runs


def test_abort_from_another_thread_in_the_middle_of_an_answer(make_llm, model):
    llm = make_llm(model)
    stream = llm.stream("abc", SamplingParams(temperature=0, ignore_eos=True))
    next(stream)
    thread = threading.Thread(target=llm.abort)
    thread.start()
    thread.join()
    assert [chunk.finish_reason for chunk in stream][-1] == "abort"


def test_a_stream_closed_inside_a_step_is_freed_by_it(llm, monkeypatch):
    forgotten, kept = llm.stream("abc", LONG), llm.stream("def", LONG)
    next(forgotten), next(kept)
    forward, closed = llm.engine.runner.forward, threading.Event()

    def collecting(batch):  # as the garbage collector may, anywhere
        forgotten.close()
        closed.set()
        return forward(batch)

    monkeypatch.setattr(llm.engine.runner, "forward", collecting)
    closed.wait()
    next(kept), next(kept)
    with llm.engine.lock:
        assert len(llm.engine.scheduler.running) == 1
    assert list(kept)[-1].finish_reason == "length"


def test_abort_of_several_samples_ends_them_all(llm):
    stream = llm.stream("abc", replace(WARM, n=3, max_tokens=400))
    first = [next(stream) for _ in range(3)]
    llm.abort()
    rest = list(stream)
    assert sorted(chunk.index for chunk in rest if chunk.finish_reason == "abort") == [0, 1, 2]
    assert {chunk.index for chunk in first} == {0, 1, 2}


def test_an_aborted_answer_is_continued_from_memory(llm):
    stream = llm.stream("a long enough prompt", LONG)
    next(stream)
    stream.close()
    assert llm.generate("a long enough prompt", GREEDY)[0].usage.cached_tokens == 19
