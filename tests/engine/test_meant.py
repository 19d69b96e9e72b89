"""Schemas as pydantic and OpenAPI write them: what is an annotation, what is enforced, and what a forced call leaves out."""

from __future__ import annotations

import json
import uuid
from decimal import Decimal
from pathlib import Path

import pydantic
import pytest
from llguidance import LLMatcher, LLTokenizer

from qwen2.engine import grammar as grammar_module
from qwen2.engine.calls import ToolChoice, compiles, constraint
from qwen2.engine.constraint import FORMATS, Constraint, enforced, meant
from qwen2.engine.grammar import JSON_OPTIONS, Grammars
from tests.engine.conftest import EOS, byte_tokenizer

OTHERS = ["path", "password", "binary", "uuid4", "uri-reference", "int32", "json-pointer", "colour", "regex"]


@pytest.fixture(scope="module")
def grammars():
    return Grammars(byte_tokenizer(), 305)


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    """No process for each grammar."""
    monkeypatch.setattr(grammar_module, "_try", lambda kind, grammar: None)


def allows(grammars, form, text):
    """Whether an answer of this form may be this text."""
    matcher = grammars.compiled(form).matcher([EOS])
    return all(map(matcher.take, text.encode())) and matcher.state.is_accepting()


def test_the_formats_that_are_enforced_are_those_of_the_library():
    library = LLTokenizer("byte")
    for name in (*FORMATS, *OTHERS):
        made = LLMatcher.grammar_from_json_schema({"type": "string", "format": name}, overrides=JSON_OPTIONS)
        assert LLMatcher(library, made, log_level=0).is_error() == (name not in FORMATS), name


MEANT = [
    ({"type": "string", "format": "path"}, {"type": "string"}),
    ({"type": "string", "format": "date"}, {"type": "string", "format": "date"}),
    ({"type": "string", "nullable": True}, {"type": ["string", "null"]}),
    ({"type": ["string", "null"], "nullable": True}, {"type": ["string", "null"]}),
    ({"type": "string", "nullable": False}, {"type": "string"}),
    ({"$ref": "#/$defs/a", "nullable": True}, {"$ref": "#/$defs/a"}),
    ({"x-order": 1, "items": {"x-a": {}, "format": "int32"}}, {"items": {}}),
    ({"anyOf": [{"x-a": 1}], "uniqueItems": False}, {"anyOf": [{}]}),
    ({"properties": {"x-a": {"type": "null"}, "nullable": {}, "format": {"x-b": 1}}}, {"properties": {"x-a": {"type": "null"}, "nullable": {}, "format": {}}}),
    ({"enum": [{"x-a": 1}], "const": {"nullable": True}}, {"enum": [{"x-a": 1}], "const": {"nullable": True}}),
    ({"nullable": "yes", "uniqueItems": True, "not": {}}, {"nullable": "yes", "uniqueItems": True, "not": {}}),
    (True, True),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "plain"), MEANT)
def test_what_a_schema_means(schema, plain):
    assert meant(schema) == plain
    assert meant(plain) == plain


def test_annotations_change_no_form(grammars):
    plain = {"type": "object", "properties": {"a": {"type": ["string", "null"]}}, "required": ["a"], "additionalProperties": False}
    noted = {**plain, "x-guidance": {"lenient": True, "whitespace_flexible": False}, "externalDocs": {"url": "x"}}
    noted["properties"] = {"a": {"type": "string", "nullable": True, "format": "password", "x-order": 1, "contentMediaType": "text/x"}}
    form = Constraint.json_schema(noted)
    assert form.parsed() == {
        **plain,
        "externalDocs": {"url": "x"},
        "properties": {"a": {**plain["properties"]["a"], "contentMediaType": "text/x"}},
    }
    for text, right in (('{"a": null}', True), ('{"a": "x"}', True), ('{"a": 1}', False), ("{}", False)):
        assert allows(grammars, form, text) == allows(grammars, Constraint.json_schema(plain), text) == right


class Order(pydantic.BaseModel):
    """What tools are made of."""

    where: Path
    secret: pydantic.SecretStr
    key: uuid.UUID
    data: bytes
    price: Decimal
    tags: set[str]


ARGUMENTS = '{"where": "/tmp", "secret": "s", "key": "123e4567-e89b-12d3-a456-426614174000", "data": "x", "price": 1.5, "tags": ["a"], "one": 5}'  # fmt: skip


def tool(strict=None):
    schema = Order.model_json_schema()
    schema["properties"]["one"] = {"oneOf": [{"type": "integer"}, {"type": "number"}], "anyOf": [{"type": "number"}]}
    schema["required"].append("one")
    return {"type": "function", "function": {"name": "order", "parameters": schema, "strict": strict}}


def test_pydantics_schemas_can_be_called_where_a_call_is_forced(grammars):
    held = constraint([tool()], ToolChoice("required", parallel=False), "hermes", goes_on=False)
    matcher = grammars.compiled(held).matcher([EOS])
    text = f'\n{{"name": "order", "arguments": {ARGUMENTS}}}\n'
    assert all(map(matcher.take, [303, *text.encode(), 304]))
    assert matcher.complete
    assert not allows(
        grammars, Constraint.json_schema(enforced(tool()["function"]["parameters"], compiles)), ARGUMENTS.replace("1.5", "[]")
    )
    with pytest.raises(ValueError, match="tool 'order': json_schema at #/properties/tags: the keyword 'uniqueItems' would not be enforced"):
        constraint([tool(strict=True)], ToolChoice(), "hermes", goes_on=False)


def test_a_strict_tools_arguments_stay_an_object():
    strict = {"type": "function", "function": {"name": "a", "strict": True, "parameters": {"type": "object", "nullable": True}}}
    for choice in (ToolChoice(), ToolChoice("required")):
        assert constraint([strict], choice, "hermes", goes_on=False).parsed()["tools"] == {"a": {"type": "object"}}


def test_what_cannot_be_enforced_is_left_out_of_a_forced_call():
    schema = {
        "propertyNames": {"pattern": "a"},
        "patternProperties": {"^a$": {"pattern": "(?!a)"}, "(?=b)": {}},
        "properties": {"a": {"oneOf": [{"pattern": "a$b"}, {"pattern": "^ab$"}]}},
    }
    left = {"patternProperties": {"^a$": {}}, "properties": {"a": {"anyOf": [{}, {"pattern": "^ab$"}]}}}
    assert enforced(schema, compiles) == left
    assert enforced({"oneOf": [{}], "anyOf": [True], "allOf": [{}]}, compiles) == {"anyOf": [True], "allOf": [{}, {"anyOf": [{}]}]}
    deep = json.loads('{"items": ' * 900 + "{}" + "}" * 900)
    with pytest.raises(ValueError, match=r"tool .a.: json_schema .*64 levels"):
        constraint([{"type": "function", "function": {"name": "a", "parameters": deep}}], ToolChoice("required"), "hermes", goes_on=False)


@pytest.mark.parametrize("pattern", ["^a$", r"\d+(\.\d+)?", "(a{1,1000}){1,1000}", "^(?i)abc", "a|" * 5000 + "b", ""])
def test_patterns_that_compile(pattern):
    assert compiles(pattern)


@pytest.mark.parametrize("pattern", [r"(a)\1", "(?=a)", "(?<!a)b", r"\bword\b", "a^b", "(", r"\Z", "[a&&b]", "(?:" * 3000 + ")" * 3000])
def test_patterns_that_do_not(pattern):
    assert not compiles(pattern)
