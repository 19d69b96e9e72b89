"""A model's answers with forced and strict calls: beside others, guessed, drawn, cut off; and a real model's."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from jsonschema import Draft202012Validator

from qwen2 import LLM, SamplingParams, kernels
from qwen2.config import tiny
from qwen2.engine import grammar as grammar_module
from qwen2.engine.calls import ToolChoice
from qwen2.engine.constraint import Constraint
from qwen2.tokenizer import ChatTemplate, fold
from qwen2.weights.export import to_gguf
from tests.conftest import tiny_model
from tests.engine.conftest import byte_model
from tests.engine.schemas import PLACES

MESSAGES = [{"role": "user", "content": "Weather?"}]
SUMS = {
    "type": "object",
    "properties": {"of": {"type": "array", "items": {"type": "number"}, "maxItems": 3}},
    "additionalProperties": False,
}
SCHEMAS = {"weather": PLACES, "sum": SUMS}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
STRICT = [{"type": "function", "function": {**one["function"], "strict": True}} for one in TOOLS]
REQUIRED = ToolChoice("required", parallel=False)
GREEDY = SamplingParams(temperature=0, max_tokens=300)
WARM = SamplingParams(temperature=1.0, seed=7, max_tokens=300)


@pytest.fixture(scope="module", params=["qwen2", "qwen2.5"])
def styled(request):
    """A tiny model that writes calls in each style; the brackets of the second are tokens."""
    model = byte_model(context=4096)
    return replace(model, template=ChatTemplate.of(model.tokenizer, request.param))


def check(output):
    assert output.finish_reason == "tool_calls"
    assert output.content == ""
    for call in output.tool_calls:
        Draft202012Validator(SCHEMAS[call.name]).validate(json.loads(call.arguments))


@pytest.mark.parametrize("params", [GREEDY, WARM, replace(WARM, n=4, top_k=9, logprobs=1), replace(WARM, repetition_penalty=1.3)], ids=["greedy", "drawn", "samples", "penalties"])  # fmt: skip
def test_forced_answers_call(make_llm, styled, params):
    llm = make_llm(styled)
    for choice, names in ((REQUIRED, set(SCHEMAS)), (ToolChoice(name="sum", parallel=False), {"sum"})):
        output = llm.chat(MESSAGES, params, TOOLS, choice)
        for one in output.choices:
            check(one)
            assert {call.name for call in one.tool_calls} <= names
            assert len(one.tool_calls) == 1
            assert params.logprobs is None or len(one.logprobs) == len(one.token_ids)
    several = llm.chat(MESSAGES, replace(params, max_tokens=2000), TOOLS, ToolChoice("required"))
    for one in several.choices:
        check(one)


def test_the_stream_folds_to_the_whole_in_pieces_or_not(make_llm, styled):
    """And a forced call is read as the same call that a model would have written freely."""
    llm = make_llm(styled)
    whole = llm.chat(MESSAGES, WARM, TOOLS, REQUIRED)
    for in_pieces in (False, True):
        asked = llm.ask(MESSAGES, WARM, TOOLS, REQUIRED, in_pieces=in_pieces)
        chunks = [asked.read(chunk) for _, chunk in llm.engine.run([asked.request])]
        deltas = [delta for chunk in chunks for delta in chunk.deltas]
        assert fold(deltas).tool_calls == list(whole.tool_calls)
        assert chunks[-1].output.tool_calls == whole.tool_calls
        assert sum(bool(delta.arguments) for delta in deltas) > 10 if in_pieces else not any(delta.arguments for delta in deltas)
    assert fold([*(parser := styled.template.parser()).push(whole.text), *parser.flush()]).tool_calls == list(whole.tool_calls)


def test_each_is_alone_as_in_a_batch_and_every_sample_as_alone(make_llm, styled):
    cases = [(params, tools, choice) for params in (GREEDY, WARM) for tools, choice in ((TOOLS, REQUIRED), (STRICT, ToolChoice()), (TOOLS, ToolChoice()), (TOOLS, ToolChoice("required")))]  # fmt: skip
    cases = [(replace(params, max_tokens=80), tools, choice) for params, tools, choice in cases]
    alone = [make_llm(styled).chat(MESSAGES, *case).token_ids for case in cases]
    llm = make_llm(styled)
    asked = [llm.ask(MESSAGES, *case) for case in cases]
    outputs = {}
    for request, chunk in llm.engine.run([one.request for one in asked]):
        if chunk.output is not None:
            outputs[request.id] = chunk.output
    assert [outputs[one.request.id].token_ids for one in asked] == alone
    samples = llm.chat(MESSAGES, replace(WARM, n=3), TOOLS, REQUIRED)
    for index, one in enumerate(samples.choices):
        assert llm.chat(MESSAGES, replace(WARM, seed=7 + index), TOOLS, REQUIRED).token_ids == one.token_ids


def test_strict_tools_change_no_text_without_a_call(make_llm, styled):
    llm = make_llm(styled)
    free, held = (llm.chat(MESSAGES, replace(GREEDY, max_tokens=40), tools) for tools in (TOOLS, STRICT))
    assert held.params.constraint is not None
    if free.text.isascii() and "<tool" not in free.text:  # whole characters, no control token
        assert held.token_ids == free.token_ids
    opened = llm.chat(MESSAGES, replace(WARM, logit_bias={303: 8.0, 302: 1.0}), STRICT)
    if styled.template.style == "qwen2.5":
        assert opened.tool_calls
    for call in opened.tool_calls:
        Draft202012Validator(SCHEMAS[call.name]).validate(json.loads(call.arguments))


@pytest.mark.skipif(kernels.isa() is None, reason="this installation has no kernels for this processor")
@pytest.mark.parametrize("params", [GREEDY, replace(WARM, temperature=0.3, n=2)], ids=["greedy", "drawn"])
def test_guesses_change_no_call(tmp_path, params):
    to_gguf(tiny_model(tiny(context=1024)), tmp_path / "model.gguf", "Q8_0")
    plain, guessing = LLM(tmp_path / "model.gguf", guesses=0), LLM(tmp_path / "model.gguf")
    said = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome", "days": 3}'}}]}]  # fmt: skip
    said += [{"role": "tool", "content": "sun", "tool_call_id": "a"}]
    for messages in (MESSAGES, said):
        for choice in (REQUIRED, ToolChoice("required")):
            ours, theirs = (llm.chat(messages, params, TOOLS, choice) for llm in (guessing, plain))
            assert [one.token_ids for one in ours.choices] == [one.token_ids for one in theirs.choices]
            for one in ours.choices:
                assert one.finish_reason == "length" or one.tool_calls
    assert guessing.engine.guessed_right > 20


def test_a_forced_call_that_is_cut_off(make_llm, styled):
    """In pieces it stays the call that it was; else it is text, as a free one would be. At every length."""
    llm = make_llm(styled)
    whole = llm.chat(MESSAGES, WARM, TOOLS, REQUIRED)
    (call,) = whole.tool_calls
    for most in range(1, len(whole.token_ids)):
        params = replace(WARM, max_tokens=most)
        asked = llm.ask(MESSAGES, params, TOOLS, REQUIRED, in_pieces=True)
        (output,) = [one for _, chunk in llm.engine.run([asked.request]) if (one := asked.read(chunk).output) is not None]
        assert output.finish_reason == "length"
        for got in output.tool_calls:
            assert got.name == call.name
            assert call.arguments.startswith(got.arguments)
            assert got.cut == (got.arguments != call.arguments)
        assert output.tool_calls or output.text.removesuffix("\ufffd") in whole.text
        text = llm.chat(MESSAGES, params, TOOLS, REQUIRED)
        assert text.finish_reason == "length"
        assert text.content == text.text if not text.tool_calls else text.tool_calls == (call,)


def test_what_cannot_be_held_is_refused_and_names_the_tool(make_llm, styled, monkeypatch):
    monkeypatch.setattr(grammar_module, "TRIAL_SECONDS", 1)
    llm = make_llm(styled)

    def refused(choice=REQUIRED, params=GREEDY, **parameters):
        tools = [*TOOLS, {"type": "function", "function": {"name": "odd", "parameters": parameters}}]
        with pytest.raises(ValueError) as caught:  # noqa: PT011: what it says is what is looked at
            llm.chat(MESSAGES, params, tools, choice)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refused(properties={"a": {"type": "strange"}}) == "tool 'odd': its parameters: Invalid type: strange"
    ahead = {"name": "odd", "strict": True, "parameters": {"properties": {"a": {"pattern": "(?=a)"}}}}
    with pytest.raises(ValueError, match=r"tool 'odd': its parameters: .*look-ahead"):
        llm.chat(MESSAGES, GREEDY, [{"type": "function", "function": ahead}])
    slow = {"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]}
    assert refused(properties={"a": slow}) == "tool 'odd': its parameters: not compiled within 1 s; make it simpler"
    assert refused(required=["a"], properties={"a": False}).startswith("tool 'odd': its parameters: Unsatisfiable schema")
    strict = [{"type": "function", "function": {"name": "odd", "strict": True, "parameters": {"dependentRequired": {}}}}]
    with pytest.raises(ValueError, match="tool 'odd': json_schema at #: the keyword 'dependentRequired'"):
        llm.chat(MESSAGES, GREEDY, strict, REQUIRED)
    assert "which is not among the tools: weather, sum, odd" in refused(ToolChoice(name="none"))
    form = replace(GREEDY, constraint=Constraint.json_object())
    assert "an answer cannot be held to a form and to calls" in refused(params=form)
    with pytest.raises(ValueError, match="tool_choice asks for a call: give tools"):
        llm.chat(MESSAGES, GREEDY, None, REQUIRED)
    with pytest.raises(ValueError, match="tools need a conversation"):
        list(llm.stream("text", GREEDY, None, REQUIRED))
    check(llm.chat(MESSAGES, GREEDY, TOOLS, REQUIRED))


def test_strict_is_not_for_the_model_to_read(llm):
    plain, strict = (llm.template.render(MESSAGES, tools=tools).text for tools in (TOOLS, STRICT))
    assert plain == strict
    assert "weather" in plain


PLAIN = [  # arguments in plain JSON, and whether they are those of a strict tool
    ("sum", '{"of": [1, 2.5]}', True),
    ("sum", '{\n    "of":   [ ]\n}', True),
    ("sum", "{}", True),
    ("sum", '{"of": [1, 2, 3, 4]}', False),
    ("sum", '{"of": ["1"]}', False),
    ("sum", '{"of": [1], "more": 2}', False),
    ("two", '{"b": "x", "a": {"d": [{"f": 1, "e": "\u00e9"}], "c": true}}', True),
    ("two", '{"a": {"c": true, "d": []}, "b": "x</tool_call>"}', True),
    ("two", '{"b": "x", "a": {"d": [{"f": 1, "e": 2}], "c": true}}', False),
    ("two", '{"b": "x"}', False),
]
TWO = {
    "type": "object",
    "properties": {
        "a": {
            "type": "object",
            "properties": {
                "c": {"type": "boolean"},
                "d": {"type": "array", "items": {"type": "object", "properties": {"e": {"type": "string"}, "f": {"type": "integer"}}}},
            },
            "required": ["c", "d"],
        },
        "b": {"type": "string"},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("choice", [ToolChoice(), ToolChoice(parallel=False)], ids=["many", "one"])
def test_plain_json_is_a_call_of_a_strict_tool_where_its_schema_holds(make_llm, styled, choice):
    two = {"type": "function", "function": {"name": "two", "parameters": TWO, "strict": True}}
    loose = {"type": "function", "function": {"name": "loose", "parameters": SUMS}}
    llm = make_llm(styled)

    def read(text):
        (parser,) = llm.ask(MESSAGES, GREEDY, [*STRICT, two, loose], choice, in_pieces=True).parsers
        return fold([*parser.push(text), *parser.flush()])

    for name, arguments, holds in [*PLAIN, ("loose", '{"of": "anything"}', True)]:
        schema = {**SCHEMAS, "two": TWO, "loose": {}}[name]
        assert Draft202012Validator(schema).is_valid(json.loads(arguments)) == holds, "the table is right"
        body = f'{{"name": "{name}", "arguments": {arguments}}}'
        for text in (body, f"```json\n{body}\n```"):
            message = read(text)
            assert [(call.name, call.arguments) for call in message.tool_calls] == ([(name, arguments)] if holds else [])
            assert message.content == ("" if holds else text)
    good, bad = (f'{{"name": "sum", "arguments": {{"of": {of}}}}}' for of in ("[1]", '"1"'))
    assert len(read(f"[{good}, {good}]").tool_calls) == (2 if choice.parallel else 0)
    assert not read(f"[{good}, {bad}]").tool_calls


def test_a_form_beside_tools_needs_no_format_of_calls(make_llm, styled):
    """A template that does not say how calls are written."""
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}"
    llm = make_llm(replace(styled, template=ChatTemplate.of(styled.tokenizer, source=source)))
    assert llm.template.calls is None
    output = llm.chat(MESSAGES, replace(GREEDY, constraint=Constraint.choice(["yes", "no"])), TOOLS)
    assert output.content in ("yes", "no")


QUESTIONS = [
    "What is the weather in {}?",
    "Tell me the forecast for {} for the next week, please.",
    "Is it raining in {}?",
    "Say hello to {}.",
]
CITIES = ["Rome", "Troms\u00f8", "\u6771\u4eac", "S\u00e3o Paulo", "New York"]
FORECAST = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "maxLength": 40},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "units": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["place", "days", "units"],
    "additionalProperties": False,
}


@pytest.mark.xdist_group("real model")
def test_the_real_models_calls_are_valid(coder):
    """Twenty questions: forced, and again with a strict tool that it may call or not, drawn, with a bias to open calls.

    Left to itself this model writes its calls between code fences.
    """
    llm = LLM(coder)
    eager = replace(WARM, logit_bias={llm.tokenizer.control["<tool_call>"]: 100.0})
    tool = {"type": "function", "function": {"name": "forecast", "description": "The weather of a place", "parameters": FORECAST}}
    strict = {"type": "function", "function": {**tool["function"], "strict": True}}
    asked = [
        llm.ask([{"role": "user", "content": question.format(city)}], replace(params, max_tokens=160), [tools], choice)
        for question in QUESTIONS
        for city in CITIES
        for params, tools, choice in ((GREEDY, tool, REQUIRED), (eager, strict, ToolChoice(parallel=False)))
    ]
    by_id = {one.request.id: one for one in asked}
    outputs = {}
    for request, chunk in llm.engine.run([one.request for one in asked]):
        read = by_id[request.id].read(chunk)
        if read.output is not None:
            outputs[request.id] = read.output
    forced, free = ([outputs[one.request.id] for one in asked[start::2]] for start in (0, 1))
    assert len(forced) == 20
    for output in forced:
        assert output.finish_reason == "tool_calls"
        (call,) = output.tool_calls
        Draft202012Validator(FORECAST).validate(json.loads(call.arguments))
    assert json.loads(forced[0].tool_calls[0].arguments)["place"].startswith("Rome")
    for output in free:
        for call in output.tool_calls:
            Draft202012Validator(FORECAST).validate(json.loads(call.arguments))
    assert all(len(output.tool_calls) == 1 for output in free)


@pytest.mark.xdist_group("real model")
def test_calls_that_the_real_model_fences_are_calls(coder):
    """What it writes when tools are offered and nothing holds it; streamed and whole alike; of strict tools too."""
    llm = LLM(coder)
    tool = {"type": "function", "function": {"name": "forecast", "description": "The weather of a place", "parameters": FORECAST}}
    asked = [{"role": "user", "content": "What will the weather be in Rome in 3 days, in celsius?"}]
    *pieces, last = llm.stream(asked, replace(GREEDY, max_tokens=160), [tool])
    assert last.output.text.startswith("```json")
    assert (last.output.finish_reason, last.output.content) == ("tool_calls", "")
    (call,) = last.output.tool_calls
    assert (call.name, json.loads(call.arguments)["place"]) == ("forecast", "Rome")
    assert not any(delta.content for piece in pieces for delta in piece.deltas)
    assert llm.chat(asked, replace(GREEDY, max_tokens=160), [tool]).tool_calls == (call,)
    strict = {"type": "function", "function": {**tool["function"], "strict": True}}
    for choice in (ToolChoice(), ToolChoice(parallel=False)):
        assert llm.chat(asked, replace(GREEDY, max_tokens=160), [strict], choice).tool_calls == (call,)
    cut = llm.chat(asked, replace(GREEDY, max_tokens=12), [tool])
    assert (cut.finish_reason, cut.content, cut.tool_calls) == ("length", cut.text, ())
