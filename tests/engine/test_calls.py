"""Calls that are forced, and strict ones that are not: that every one is valid, that answers end, and that nothing else changes."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from qwen2.engine import grammar as grammar_module
from qwen2.engine.calls import MOST_CALLS, ToolChoice, constraint
from qwen2.engine.constraint import Constraint, ConstraintError
from qwen2.engine.grammar import BLANKS, Grammars
from qwen2.tokenizer import DIALECTS, Parts, StreamParser, Tokenizer, ToolCall, closed, fold
from qwen2.tokenizer.alphabet import CHAR_OF_BYTE
from tests.engine.conftest import EOS, byte_tokenizer
from tests.engine.schemas import LEAVES, arrays, choices, objects

V = 305
MOST_TOKENS = 6000
OPEN, CLOSE = 303, 304  # the brackets, where they are tokens
FLOWER = "\u273fFUNCTION\u273f:"


def spelled_tokenizer() -> Tokenizer:
    """The same without brackets: they are text."""
    control = {"<|endoftext|>": 300, "<|im_start|>": 301, "<|im_end|>": EOS}
    return Tokenizer.from_parts(Parts({char: byte for byte, char in CHAR_OF_BYTE.items()}, [], control, eos=(EOS,), pad=300))


# How calls are written: the dialect, whether its brackets are tokens
WAYS = {"hermes": ("hermes", byte_tokenizer), "hermes spelled": ("hermes", spelled_tokenizer), "qwen2": ("qwen2", byte_tokenizer)}


@pytest.fixture(scope="module")
def ways():
    return {way: (form, Grammars(make(), make().vocab_size)) for way, (form, make) in WAYS.items()}


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    """No process for each grammar, which would take minutes; what it refuses is tested with one."""
    monkeypatch.setattr(grammar_module, "_try", lambda kind, grammar: None)


def random_rows(seed, size, prefer="", script=()):
    """Rows of random logits, after a beginning that is wanted, that prefer some characters.

    They like what closes what is open and what patterns wait for: one letter that has to stand somewhere in a text would take chance
    alone hundreds of tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    bonus = torch.zeros(size)
    bonus[list(b'"}]b@.\xc3')] = 2.5
    bonus[EOS] = 3.0
    bonus[list(prefer.encode())] = 100.0
    for token in script:
        yield torch.nn.functional.one_hot(torch.tensor(token), size).float()
    for _ in range(MOST_TOKENS):
        yield torch.randn(size, generator=generator) + bonus


def write(matcher, rows, tokenizer):
    """The text of an answer that takes the largest allowed logit of each row; None where it does not end."""
    decoder, text = tokenizer.decoder(), ""
    for row in rows:
        logits, ids = matcher.narrow(row)
        token = int(logits.argmax()) if ids is None else int(ids[logits.argmax()])
        if token == EOS:
            return text + decoder.flush()
        assert token < 256 or token in (OPEN, CLOSE), "a control token, or one that stands for nothing"
        text += decoder.push(token)
        matcher.accept(token)
        if matcher.complete:
            return text + decoder.flush()
    return None


def parsed(text, form):
    """The whole; cut at every character, and given in pieces, it is the same."""
    whole = StreamParser(DIALECTS[form])
    message = fold([*whole.push(text), *whole.flush()])
    for in_pieces in (False, True):
        parser = StreamParser(DIALECTS[form], in_pieces)
        deltas = [*[delta for char in text for delta in parser.push(char)], *parser.flush()]
        assert fold(deltas) == message
        if in_pieces:
            assert [delta.begins for delta in deltas if delta.begins is not None] == [call.name for call in message.tool_calls]
            assert "".join(delta.arguments for delta in deltas) == "".join(call.arguments for call in message.tool_calls)
    return message


def check(message, tools):
    assert not message.problems
    for call in message.tool_calls:
        Draft202012Validator(tools[call.name] or {"type": "object"}).validate(json.loads(call.arguments))


# --- every call is valid

INNER = st.recursive(LEAVES, lambda inner: st.one_of(objects(inner), arrays(inner), choices(inner)), max_leaves=5)
PARAMETERS = st.builds(lambda schema: {"$defs": {"leaf": {"type": "string", "maxLength": 6}}, **schema}, objects(INNER))
TOOL_NAMES = ["get", "get_all", "a-b.c", "\u5929\u6c14", "x" * 64]
TOOLS = st.lists(st.tuples(st.sampled_from(TOOL_NAMES), PARAMETERS), min_size=1, max_size=3, unique_by=lambda pair: pair[0]).map(dict)
MANY = settings(
    max_examples=500,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def fixed(schema):
    """Whether every object of a schema has the properties that are named and no other."""
    if isinstance(schema, list):
        return all(map(fixed, schema))
    if not isinstance(schema, dict):
        return True
    return all(map(fixed, schema.values())) and (schema.get("type") != "object" or schema["additionalProperties"] is False)


class Ends:
    """How many answers ended. Those of fixed properties must; an object of any names may go on for as long as a model likes."""

    def __init__(self):
        self.count = Counter()

    def saw(self, text, tools):
        kind = "any" if None in tools.values() or not fixed(list(tools.values())) else "fixed"
        assert text is not None or kind == "any", "it does not end"
        self.count[kind] += 1
        self.count["endless"] += text is None
        return text is not None

    def check(self):
        assert self.count["fixed"] > 10
        assert self.count["endless"] <= self.count["any"] // 50


def test_500_forced_answers_are_valid_calls(ways):
    ends = Ends()

    @MANY
    @given(tools=TOOLS, way=st.sampled_from(list(WAYS)), parallel=st.booleans(), seed=st.integers(0, 999))
    def every(tools, way, parallel, seed):
        form, grammars = ways[way]
        held = grammars.compiled(Constraint.call(tools, form, forced=True, parallel=parallel)).matcher([EOS])
        text = write(held, random_rows(seed, grammars.vocab), grammars.tokenizer)
        if ends.saw(text, tools):
            message = parsed(text, form)
            check(message, tools)
            assert not message.content
            assert 1 <= len(message.tool_calls) <= (MOST_CALLS if parallel else 1)

    every()
    ends.check()


def test_calls_that_a_model_begins_are_valid(ways):
    """After a text with all that looks like a call and is none, a call is opened; then the model does as it likes.

    Also where the bracket is a token and the model spells it, as it was in the question.
    """
    ends, begins = Ends(), [*WAYS, "hermes by letters"]
    text = 'Hm \u273f </tool_call> <tool_ \u273fARGS\u273f: {"\n'

    @settings(MANY, max_examples=200)
    @given(tools=TOOLS, loose=st.booleans(), way=st.sampled_from(begins), parallel=st.booleans(), seed=st.integers(0, 999))
    def every(tools, loose, way, parallel, seed):
        token, way = way == "hermes", way.removesuffix(" by letters")
        form, grammars = ways[way]
        tools = tools | ({"loose": None} if loose else {})
        script = [*text.encode(), *([OPEN] if token else DIALECTS[form].open.encode())]
        held = grammars.compiled(Constraint.call(tools, form, forced=False, parallel=parallel)).matcher([EOS])
        answer = write(held, random_rows(seed, grammars.vocab, script=script), grammars.tokenizer)
        if ends.saw(answer, tools):
            message = parsed(answer, form)
            assert message.content.startswith(text[:-1])
            assert len(message.tool_calls) == 1 if not parallel else message.tool_calls
            check(message, tools)

    every()
    ends.check()


@pytest.mark.parametrize("way", WAYS)
def test_text_beside_strict_tools_is_free(ways, way):
    """Every token of text is allowed, and the answer may end anywhere; once the opening of a call is spelled, it is one."""
    form, grammars = ways[way]
    held = grammars.compiled(Constraint.call({"get": {"type": "object"}}, form, forced=False)).matcher([EOS])
    for byte in (" " * (2 * BLANKS) + "Well <tool_call \u273fFUNCTION\u273f \u00e9\U0001f600 {}").encode():
        allowed = held.allowed()
        assert allowed[byte]
        assert not held.complete
        held.accept(byte)
    allowed = held.allowed()
    assert allowed[EOS]
    assert allowed[:128].all()
    for byte in b"<tool_call":
        held.accept(byte)
    allowed = held.allowed()
    assert allowed[EOS]
    assert allowed[ord(">")]
    assert len(allowed) <= OPEN or bool(allowed[OPEN]) == (way == "hermes")
    if form == "hermes":
        held.accept(ord(">"))
        assert [chr(token) for token in held.allowed().nonzero()[0]] == ["\n"]


def test_a_grammar_that_is_not_of_calls_reaches_no_bracket(ways):
    """Not even as what some other text is not."""
    allowed = ways["hermes"][1].compiled(Constraint.grammar("start: X\nX: ~/a/")).matcher([EOS]).allowed()
    assert allowed[:128].all()
    assert not allowed[256:EOS].any()
    assert not allowed[OPEN:].any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("forced", [True, False], ids=["forced", "free"])
@pytest.mark.parametrize("blanks", [" ", "\n", " \n\t\r"], ids=["blank", "line", "all"])
def test_a_model_that_always_prefers_blanks_ends_its_call(ways, way, forced, blanks):
    form, grammars = ways[way]
    schema = {"type": "object", "properties": {"place": {"type": "string"}, "n": {"type": "integer"}}, "required": ["place", "n"]}
    script = () if forced else [OPEN] if way == "hermes" else DIALECTS[form].open.encode()
    for seed in range(3):
        held = grammars.compiled(Constraint.call({"get": schema, "any": None}, form, forced, parallel=False)).matcher([EOS])
        text = write(held, random_rows(seed, grammars.vocab, prefer=blanks, script=script), grammars.tokenizer)
        assert text is not None, "it does not end"
        check(parsed(text, form), {"get": schema, "any": None})
        assert re.search(rf"\s{{{BLANKS + 1}}}", text) is None


def test_numbers_and_letters_of_all_kinds(ways):
    """What is written is what was wanted, to the letter."""
    wanted = {
        "i": -12345678901234567890,
        "x": -0.5,
        "e": 1.5e300,
        "s": 'Zo\u00eb "\u65e5\u672c" \\ \U0001f600 </tool_call> <tool_call> \u273fFUNCTION\u273f:\n',
    }
    schema = {
        "type": "object",
        "properties": {"i": {"type": "integer"}, "x": {"type": "number"}, "e": {"type": "number"}, "s": {"type": "string"}},
        "required": list(wanted),
    }
    arguments = json.dumps(wanted, ensure_ascii=False)
    for form, grammars in ways.values():
        dialect = DIALECTS[form]
        before, between, after = dialect.write
        call = [before + "\u5929\u6c14" + between + arguments + after]
        brackets = [OPEN, CLOSE] if grammars.vocabulary().brackets else [dialect.open, dialect.close or ""]
        held = grammars.compiled(Constraint.call({"\u5929\u6c14": schema}, form, True, False)).matcher([EOS])
        if form == "qwen2":
            brackets = [dialect.open, ""]
        decoder, text = grammars.tokenizer.decoder(), ""
        for part in (brackets[0], *call, brackets[1]):
            for token in [part] if isinstance(part, int) else part.encode():
                assert held.take(token), (text, token)
                text += decoder.push(token)
        assert held.complete
        assert parsed(text, form).tool_calls == [ToolCall("\u5929\u6c14", arguments)]


@pytest.mark.parametrize("form", DIALECTS)
def test_a_call_in_pieces_that_is_cut_anywhere_stays_what_it_began_as(form):
    dialect = DIALECTS[form]
    before, between, after = dialect.write
    arguments = '{"a": "}\\"{", "b": [1, {"c": "\\\\"}], "d": {}}'
    text = f"Look.\n{dialect.open}{before}get{between}{arguments}{after}{dialect.close or ''}"
    for end in range(len(text) + 1):
        parser = StreamParser(dialect, in_pieces=True)
        deltas = [*[delta for char in text[:end] for delta in parser.push(char)], *parser.flush()]
        message = fold(deltas)
        name = text.index(between) + len(between)
        if end <= name:
            assert (message.content, message.tool_calls) == (text[:end], [])
            continue
        (call,) = message.tool_calls
        assert (message.content, call.name) == ("Look.", "get")
        assert call.arguments == "".join(delta.arguments for delta in deltas) == text[name:end][: len(arguments)]
        assert call.cut == (end < name + len(arguments))
        assert isinstance(json.loads(closed(call.arguments)), dict)


# --- what is asked for


def tool(name="get", strict=None, **parameters):
    return {"type": "function", "function": {"name": name, "parameters": parameters, **({} if strict is None else {"strict": strict})}}


def test_what_a_choice_means():
    ints = {"properties": {"a": {"type": "integer"}}}
    tools = [tool("one", True, **ints), tool("two"), tool("three", False, **ints)]
    held = {"type": "object", **ints}

    def meant(choice, form, goes_on):
        return constraint(tools, choice, form, goes_on).parsed()

    every = {"one": held, "two": {"type": "object"}, "three": None}
    assert meant(ToolChoice("required"), "hermes", True) == Constraint.call(every, "hermes", forced=True).parsed()
    named = Constraint.call({"two": {"type": "object"}}, "qwen2", True, False, lead=": \n")
    assert meant(ToolChoice(name="two", parallel=False), "qwen2", True) == named.parsed()
    strict = {"one": held, "two": None, "three": None}
    assert meant(ToolChoice(), "hermes", False) == Constraint.call(strict, "hermes", forced=False).parsed()
    assert constraint(tools[1:], ToolChoice(), "hermes", goes_on=False) is None
    assert constraint(tools[1:], ToolChoice(parallel=False), None, goes_on=False) is None
    single = Constraint.call({"two": None, "three": None}, "hermes", forced=False, parallel=False)
    assert constraint(tools[1:], ToolChoice(parallel=False), "hermes", goes_on=False) == single
    for choice in (ToolChoice(), ToolChoice(parallel=False)):
        assert constraint(None, choice, "hermes", goes_on=False) is None


def test_after_a_result_qwen2s_calls_begin_as_they_were_learned(ways):
    """The prompt ends within the model's turn."""
    _, grammars = ways["qwen2"]
    form = constraint([tool()], ToolChoice("required", parallel=False), "qwen2", goes_on=True)
    for lead in ("", ": \n"):
        held = grammars.compiled(form).matcher([EOS])
        text = write(held, random_rows(1, V, script=(lead + FLOWER).encode()), grammars.tokenizer)
        assert text.startswith(lead + FLOWER)
        assert [call.name for call in parsed(text, "qwen2").tool_calls] == ["get"]


REFUSED = [
    ([], ToolChoice("required"), "tool_choice asks for a call: give tools to choose from"),
    ([tool("a"), tool("b")], ToolChoice(name="c"), "tool_choice names the function 'c', which is not among the tools: a, b"),
    ([tool("a"), tool("a")], ToolChoice("required"), "two tools have the name 'a': which one is called could not be told"),
    ([tool("a", type="array")], ToolChoice("required"), "tool 'a': arguments are an object, and the type of its parameters is 'array'"),
    ([tool("b"), tool("a", True, uniqueItems=True)], ToolChoice(), "tool 'a': json_schema at #: the keyword 'uniqueItems' would not be enforced; leave it out"),
    ([tool("a", True, properties={"x": {"enum": ["y" * 70_000]}})], ToolChoice(), "tool 'a': json_schema of 70,"),
    ([{"type": "function", "function": {"name": "a", "strict": "yes"}}], ToolChoice(), "tools[0].function.strict is 'yes', not true or false"),
    ([{"type": "function", "function": {"name": "a", "parameters": []}}], ToolChoice("required"), "tool 'a': its parameters must be a JSON schema, an object, got []"),
]  # fmt: skip


@pytest.mark.parametrize(("tools", "choice", "message"), REFUSED, ids=[m[:40] for _, _, m in REFUSED])
def test_what_is_refused_at_once(tools, choice, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        constraint(tools, choice, "hermes", goes_on=False)
    assert "\n" not in str(caught.value)


def test_other_refusals():
    with pytest.raises(ValueError, match="tool_choice 'any': must be auto or required"):
        ToolChoice("any")
    with pytest.raises(ValueError, match="chat template does not say how calls are written"):
        constraint([tool()], ToolChoice("required"), None, goes_on=False)
    with pytest.raises(ValueError, match="call: must have the fields form, forced, parallel, lead, tools"):
        Constraint("call", '{"tools": {}}')
    with pytest.raises(ValueError, match="call: there are no tools"):
        Constraint.call({}, "hermes", forced=True)
    with pytest.raises(ValueError, match="tool 'a': its parameters must be a JSON schema, an object, got True"):
        Constraint.call({"a": True}, "hermes", forced=True)
    with pytest.raises(ValueError, match="call of 3"):
        Constraint.call({f"t{i}": {"enum": ["x" * 60_000]} for i in range(5)}, "hermes", forced=True)
    grammars = Grammars(byte_tokenizer(), V)
    with pytest.raises(ConstraintError, match=re.escape("call: 'a b' is not the name of a tool")):
        grammars.compiled(Constraint.call({"a b": None}, "hermes", forced=True))
    with pytest.raises(ConstraintError, match=re.escape("call: form 'xml': must be one of hermes, qwen2")):
        grammars.compiled(Constraint.call({"a": None}, "xml", forced=True))
