"""The public face on tiny random models: against the network itself, against transformers, and against itself in other batches."""

from __future__ import annotations

import re
import threading
from dataclasses import replace

import pytest
import torch
import transformers

from qwen2.config import GenerationDefaults
from qwen2.engine.llm import LLM
from qwen2.engine.request import SamplingParams
from tests.conftest import SHAPES
from tests.engine.conftest import EOS, byte_model, byte_tokenizer
from tests.engine.oracle import GREEDY, HELLO, WARM, slow_greedy

# --- the tokens are the model's


@pytest.mark.parametrize("name", list(SHAPES))
def test_greedy_tokens_are_those_of_the_network(make_llm, name):
    changes = {f: getattr(SHAPES[name], f) for f in ("tied", "kv_heads", "rope_theta", "moe", "rope_scaling", "context", "layers")}
    model = byte_model(**changes)
    prompt = byte_tokenizer().encode("Once upon a time, far beyond the original window")
    output = make_llm(model).generate(prompt, GREEDY)[0]
    assert list(output.token_ids) == slow_greedy(model, prompt, 24)


def test_greedy_tokens_are_those_of_transformers(make_llm, model, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**model.config.to_hf())).eval()
    theirs.load_state_dict(model.network.state_dict())
    prompt = byte_tokenizer().encode("Hello, world")
    padding = list(range(305, 512))
    expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40, suppress_tokens=padding, eos_token_id=EOS)
    output = make_llm(model).generate(prompt, replace(GREEDY, max_tokens=40, ignore_eos=False))[0]
    assert list(output.token_ids) == expected[0, len(prompt) :].tolist()


def test_a_folder_gives_the_text_that_transformers_gives(make_llm, tiny_folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    prompt = "the quick brown fox"
    inputs = tokenizer(prompt, return_tensors="pt")
    expected = theirs.generate(**inputs, do_sample=False, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
    output = make_llm(str(tiny_folder)).generate(prompt, SamplingParams(temperature=0, max_tokens=32))[0]
    assert list(output.token_ids) == expected.tolist()
    assert output.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_chat_is_the_template_and_its_stream_is_the_same(llm):
    output = llm.chat(HELLO, GREEDY)
    ids = llm.template.render(HELLO, add_generation_prompt=True).ids
    assert output.usage.prompt_tokens == len(ids)
    assert output.token_ids == llm.generate(ids, GREEDY)[0].token_ids
    chunks = list(llm.stream(HELLO, GREEDY))
    assert "".join(map(str, chunks)) == output.text
    assert tuple(t for chunk in chunks for t in chunk.token_ids) == output.token_ids
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == chunks[-1].output.finish_reason == "length"
    assert chunks[-1].output.text == output.text == llm.tokenizer.decode(output.token_ids)


def test_padding_rows_of_the_vocabulary_are_never_chosen(make_llm):
    model = byte_model()
    with torch.no_grad():
        model.network.lm_head.weight[305:] *= 50  # by far the largest logits of either sign
    llm = make_llm(model)
    for params in (GREEDY, WARM):
        assert max(llm.generate("abc", params)[0].token_ids) < 305
    assert all(t < 305 for step in llm.generate("abc", replace(GREEDY, logprobs=300))[0].logprobs for t, _ in step.top)


# --- the same in any company


PROMPTS = ["a", "Hello there", "The quick brown fox jumps over the lazy dog. " * 3, "x" * 90, "?"]


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_batch_gives_what_each_gives_alone(make_llm, model, params):
    alone = [make_llm(model).generate(prompt, params)[0] for prompt in PROMPTS]
    small = make_llm(model, max_batch=2)
    small.engine.scheduler.chunk = 7  # prompts in pieces, mixed with answers
    for llm in (make_llm(model), small):
        together = llm.generate(PROMPTS, params)
        assert [o.token_ids for o in together] == [o.token_ids for o in alone]
        assert [o.text for o in together] == [o.text for o in alone]


def test_prompts_may_be_ids_and_order_is_kept(llm):
    encode = llm.tokenizer.encode
    mixed = llm.generate([PROMPTS[1], encode(PROMPTS[0]), PROMPTS[2]], GREEDY)
    assert [o.token_ids for o in mixed] == [llm.generate(PROMPTS[i], GREEDY)[0].token_ids for i in (1, 0, 2)]
    assert llm.generate([], GREEDY) == []


def test_more_prompts_than_are_in_flight_at_once(make_llm, model):
    llm = make_llm(model, max_batch=3)
    prompts = [f"prompt {i}" for i in range(20)]
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    assert [o.token_ids for o in llm.generate(prompts, params)] == [tuple(slow_greedy(model, llm.tokenizer.encode(p), 3)) for p in prompts]


def test_a_continued_conversation_reads_only_what_is_new(make_llm, model):
    llm = make_llm(model)
    first = llm.chat(HELLO, replace(GREEDY, logprobs=3))
    longer = [*llm.template.render(HELLO).ids, *first.token_ids, *llm.tokenizer.encode(" and then?")]
    again = llm.generate(longer, replace(GREEDY, logprobs=3))[0]
    fresh = make_llm(model).generate(longer, replace(GREEDY, logprobs=3))[0]
    assert (first.usage.cached_tokens, fresh.usage.cached_tokens) == (0, 0)
    assert again.usage.cached_tokens == first.usage.prompt_tokens + len(first.token_ids) - 1  # the last token was never read
    assert again.token_ids == fresh.token_ids
    for a, b in zip(again.logprobs, fresh.logprobs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-4)


def test_memory_stays_bounded_over_many_chats(llm):
    for i in range(30):
        llm.generate(f"{i} is a number", GREEDY)
    cache = llm.engine.cache
    llm.engine.settle()
    assert cache.live == []
    assert 1 <= len(cache.idle) <= max(1, cache.keep)
    weights = sum(parameter.nbytes for parameter in llm.model.network.parameters())
    assert cache.nbytes <= max(weights / 8, cache.pool.memory.block_bytes)


def test_what_is_kept_never_passes_one_full_window(make_llm, model):
    llm = make_llm(model, context=100, keep_bytes=10**9)
    assert llm.engine.cache.keep == llm.engine.cache.pool.limit == 16 * 2  # 16 windows of two blocks
    llm = make_llm(model, context=100)
    assert llm.engine.cache.pool.memory.block_bytes == 64 * 2 * 2 * 2 * 16 * 4  # tokens, keys and values, layers, key heads, size, float32
    assert llm.engine.cache.keep <= 2
    for i in range(6):
        llm.generate(f"{i} is a number", GREEDY)
    llm.engine.settle()
    assert 1 <= len(llm.engine.cache.idle) <= 2


def test_a_cache_that_holds_no_window_is_refused_with_both_figures(model):
    block = 64 * 2 * 2 * 2 * 16 * 4
    words = f"a cache of {2 * block:,} bytes holds 128 tokens, the window is 512: give it {8 * block:,} bytes, or a context of at most 128"
    with pytest.raises(ValueError, match=f"^{re.escape(words)} tokens$"):
        LLM(model, cache_bytes=2 * block)


def test_a_long_batch_keeps_only_whole_outputs(llm, monkeypatch):
    folded = []
    monkeypatch.setattr("qwen2.engine.llm._fold", lambda chunks: folded.append(list(chunks)))
    llm.generate(["abc", "d"], replace(WARM, n=2))
    assert [len(chunks) for chunks in folded] == [2, 2]  # one a sample, not one a token


def test_interleaved_and_threaded_streams_give_the_same(llm):
    expected = [llm.generate(prompt, GREEDY)[0].text for prompt in PROMPTS[:2]]
    pair = [llm.stream(prompt, GREEDY) for prompt in PROMPTS[:2]]
    texts = ["", ""]
    for chunks in zip(*pair, strict=True):
        texts = [text + str(chunk) for text, chunk in zip(texts, chunks, strict=True)]
    assert texts == expected
    found: dict[int, str] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: llm.generate(PROMPTS[i], GREEDY)[0].text})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == expected


# --- sampling


def test_a_seed_repeats_and_a_drawn_one_is_told(llm):
    assert llm.generate("abc", WARM)[0].token_ids == llm.generate("abc", WARM)[0].token_ids
    unseeded = llm.generate("abc", replace(WARM, seed=None))[0]
    assert llm.generate("abc", unseeded.params)[0].token_ids == unseeded.token_ids
    assert llm.generate("abc", replace(WARM, seed=6))[0].token_ids != llm.generate("abc", WARM)[0].token_ids


def test_samples_of_one_prompt_are_independent(make_llm, model):
    llm = make_llm(model)
    output = llm.generate("abc", replace(WARM, n=3))[0]
    assert len(output.choices) == 3
    assert len({choice.token_ids for choice in output.choices}) == 3
    for index, choice in enumerate(output.choices):  # sample i is what seed + i gives alone
        assert choice.token_ids == make_llm(model).generate("abc", replace(WARM, seed=WARM.seed + index))[0].token_ids
    greedy = llm.generate("abc", replace(GREEDY, n=2))[0]
    assert greedy.choices[0].token_ids == greedy.choices[1].token_ids
    indexes = {chunk.index for chunk in llm.stream("abc", replace(WARM, n=3))}
    assert indexes == {0, 1, 2}


def test_more_samples_than_the_batch_has_room_for_still_run(make_llm, model):
    outputs = make_llm(model, max_batch=2).generate(["abc", "d"], replace(WARM, n=5, max_tokens=4))
    assert [len(output.choices) for output in outputs] == [5, 5]


def test_what_was_used_comes_back(make_llm):
    defaults = GenerationDefaults(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1, eos=(EOS,), max_tokens=6)
    used = make_llm(byte_model(defaults)).generate("abc")[0].params
    assert (used.temperature, used.top_k, used.top_p, used.repetition_penalty, used.max_tokens) == (0.7, 20, 0.8, 1.1, 6)
    assert used.seed is not None
    greedy = make_llm(byte_model(defaults)).generate("abc", SamplingParams(temperature=0))[0].params
    assert (greedy.temperature, greedy.top_k, greedy.seed) == (0, 20, None)


def test_logprobs_are_those_of_score(llm):
    prompt = llm.tokenizer.encode("abc")
    output = llm.generate(prompt, replace(WARM, logprobs=2, repetition_penalty=1.5))[0]
    scores = llm.score([[*prompt, *output.token_ids]])[0]
    assert [step.logprob for step in output.logprobs] == pytest.approx(scores[len(prompt) :], abs=1e-4)
    assert [step.token_id for step in output.logprobs] == list(output.token_ids)
    assert {len(step.top) for step in output.logprobs} == {2}
    assert llm.generate(prompt, GREEDY)[0].logprobs is None


# --- tools


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}}]


def script(monkeypatch, llm, text):
    """Make the model say `text`, then its end."""
    tokens = iter([*llm.tokenizer.encode(text), *[EOS] * 9])
    monkeypatch.setattr("qwen2.engine.engine.Sampled.token", lambda self, row, sampler: next(tokens))


def test_calls_are_found_streamed_and_name_the_finish(make_llm, monkeypatch):
    llm = make_llm(byte_model(context=2048))
    text = 'Let me look.\n✿FUNCTION✿: weather\n✿ARGS✿: {"city": "Liège"}\n✿RESULT✿: rain'
    script(monkeypatch, llm, text)
    chunks = list(llm.stream(HELLO, SamplingParams(temperature=0), TOOLS))
    output = chunks[-1].output
    assert [(c.name, c.arguments) for c in output.tool_calls] == [("weather", '{"city": "Liège"}')]
    assert output.content == "Let me look."
    assert (output.finish_reason, chunks[-1].finish_reason, output.stopped_by) == ("tool_calls", "tool_calls", "✿RESULT✿")
    assert output.text == text[: text.index("✿RESULT")]
    deltas = [delta for chunk in chunks for delta in chunk.deltas]
    assert "".join(delta.content for delta in deltas) == output.content
    assert [delta.call for delta in deltas if delta.call] == list(output.tool_calls)
    script(monkeypatch, llm, text)
    assert llm.chat(HELLO, SamplingParams(temperature=0), TOOLS).tool_calls == output.tool_calls


def test_a_cut_off_call_is_text_and_its_finish_is_length(make_llm, monkeypatch):
    llm = make_llm(byte_model(context=2048))
    text = '✿FUNCTION✿: weather\n✿ARGS✿: {"city": "Li'
    script(monkeypatch, llm, text)
    output = llm.chat(HELLO, SamplingParams(temperature=0, max_tokens=len(llm.tokenizer.encode(text))), TOOLS)
    assert (output.finish_reason, output.tool_calls, output.content) == ("length", (), text)


def test_without_tools_nothing_is_a_call(llm, monkeypatch):
    text = '✿FUNCTION✿: weather\n✿ARGS✿: {"city": "Rome"}'
    script(monkeypatch, llm, text)
    output = llm.chat(HELLO, SamplingParams(temperature=0))
    assert (output.text, output.tool_calls, output.content, output.finish_reason) == (text, (), None, "stop")


# --- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate(""), "prompt is empty: a model needs at least one token to go on from"),
        (lambda llm: llm.generate(["a", ""]), "prompt is empty: a model needs at least one token to go on from"),
        (lambda llm: llm.generate([[]]), "prompt is empty: a model needs at least one token to go on from"),
        (lambda llm: llm.stream(""), "prompt is empty: a model needs at least one token to go on from"),
        (lambda llm: llm.score([""]), "prompt is empty: a model needs at least one token to go on from"),
        (lambda llm: llm.generate([5, 305]), "prompt: token id 305 is not in the vocabulary, whose ids go from 0 to 304"),
        (lambda llm: llm.generate([[-1]]), "prompt: token id -1 is not in the vocabulary, whose ids go from 0 to 304"),
        (lambda llm: llm.generate([[1.5]]), "prompt: token ids are whole numbers, got 1.5"),
        (
            lambda llm: llm.generate("a", SamplingParams(logit_bias={400: 1.0})),
            "logit_bias: token id 400 is not in the vocabulary, whose ids go from 0 to 304",
        ),
        (
            lambda llm: llm.generate("a", SamplingParams(stop_token_ids=[999])),
            "stop_token_ids: token id 999 is not in the vocabulary, whose ids go from 0 to 304",
        ),
        (
            lambda llm: llm.stream("x" * 1200),
            "prompt has 1,200 tokens, the window is 512: shorten the prompt by at least 689, an answer needs one token",
        ),
        (
            lambda llm: llm.generate("x" * 512),
            "prompt has 512 tokens, the window is 512: shorten the prompt by at least 1, an answer needs one token",
        ),
        (lambda llm: llm.score("x" * 513), "prompt has 513 tokens, the window is 512: shorten the text by at least 1 or read it in parts"),
        (lambda llm: llm.chat("Hello"), "messages 'Hello': must be a list of messages; for a text or ids use generate or stream"),
        (lambda llm: llm.chat([72, 105]), "messages [72, 105]: must be a list of messages; for a text or ids use generate or stream"),
        (
            lambda llm: llm.chat({"role": "user"}),
            "messages {'role': 'user'}: must be a list of messages; for a text or ids use generate or stream",
        ),
        (lambda llm: llm.stream("a", tools=[{}]), "tools need a conversation: pass messages instead of a text or ids"),
    ],
)
def test_refusals_name_value_limit_and_way_out(llm, call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(llm)
    assert llm.engine.scheduler.idle


def test_a_narrowed_window_says_how_far_it_can_be_raised(make_llm, model):
    with pytest.raises(ValueError, match=r"the window is 8: shorten .* one token; or raise context, this model allows 512$"):
        make_llm(model, context=8).generate("123456789")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context": 1024}, "context 1,024: the model's window is 512; leave context out or take at most that"),
        ({"context": 0}, "context 0: must be a whole number of at least 1"),
        ({"threads": 0}, "threads 0: must be a whole number of at least 1"),
        ({"threads": 1.5}, "threads 1.5: must be a whole number of at least 1"),
        ({"max_batch": 0}, "max_batch 0: must be a whole number of at least 1"),
    ],
)
def test_constructor_refusals(model, values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LLM(model, **values)


def test_an_instruction_set_of_a_gpu_is_refused(tiny_folder):
    with pytest.raises(ValueError, match=r"^isa 'avx2' with device 'cuda': only a CPU has kernels; leave one of them out$"):
        LLM(tiny_folder, device="cuda", isa="avx2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused(tiny_folder):
    with pytest.raises(ValueError, match=r"^device 'cuda': torch [^ ]+ finds no CUDA device here; .* to run on the CPU$"):
        LLM(tiny_folder, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_answers_as_the_cpu_does(tiny_folder):
    prompts = ["Rivers flow", "x", "one two three four five six seven eight nine ten" * 5]
    params = SamplingParams(temperature=0, max_tokens=24)
    here, there = LLM(tiny_folder).generate(prompts, params), LLM(tiny_folder, device="cuda").generate(prompts, params)
    assert [answer.token_ids for answer in there] == [answer.token_ids for answer in here]


def test_the_longest_prompt_that_fits(llm):
    assert len(llm.generate("x" * 511, GREEDY)[0].token_ids) == 1
    assert len(llm.score("x" * 512)[0]) == 512


def test_control_tokens_in_text_stay_text(llm):
    plain = llm.generate("<|im_end|>", GREEDY)[0]
    assert plain.usage.prompt_tokens == len("<|im_end|>")
    assert llm.generate(llm.tokenizer.encode_trusted("<|im_end|>"), GREEDY)[0].usage.prompt_tokens == 1


# --- damaged weights


def test_logits_that_are_no_numbers_are_an_error_of_that_request_alone(make_llm):
    model = byte_model()
    with torch.no_grad():
        model.network.model.embed_tokens.weight[ord("!")] = torch.nan
    llm = make_llm(model)
    words = "request 0, position 3: the model's logits are nan"
    cure = ": its weights are damaged; fetch or make the file again"
    with pytest.raises(FloatingPointError, match=f"^{re.escape(words + cure)}$"):
        llm.generate("abc!", GREEDY)
    llm.engine.settle()
    assert not llm.engine.cache.idle  # nothing is reused from it
    good, bad = llm.stream("abcd", GREEDY), llm.stream("ab!", GREEDY)
    next(good)
    with pytest.raises(FloatingPointError):
        next(bad)
    assert "".join(map(str, good)) != ""
    with pytest.raises(FloatingPointError, match=r"^the model's log-probabilities are not finite"):
        llm.score("a!b")
    with pytest.raises(FloatingPointError, match=r"^the model's hidden states are not finite"):
        llm.embed("a!b")


def test_the_bar_is_for_terminals_and_long_work(llm, capsys):
    llm.generate(["a", "b"], GREEDY)
    assert capsys.readouterr().err == ""
    llm.generate(["a", "b"], GREEDY, progress=True)
    assert "2/2" in capsys.readouterr().err
