"""Schemas that hypothesis draws: satisfiable ones of every keyword that is enforced."""

from __future__ import annotations

from hypothesis import strategies as st

NAMES = ["a", "name", "\u00e4ge", "\u65e5\u672c", 'quo"te', "back\\slash", "with blank", "\U0001f600", ""]
PATTERNS = ["^a+$", "b", "^[A-Z]{2}-[0-9]{3}$", "^(?:yes|no)$", "^\\d{1,4}$", "^\\w+@\\w+\\.(de|com)$", "[\u00e0-\u00ff]"]
FORMATS = ["date", "time", "date-time", "email", "ipv4", "uuid"]
VALUES = st.one_of(
    st.integers(-99, 99), st.booleans(), st.none(), st.sampled_from(NAMES), st.sampled_from([1.5, -0.25, [1, "x"], {"k": [None]}])
)


@st.composite
def bounded(draw):
    low = draw(st.integers(-1000, 1000))
    names = draw(st.sampled_from([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")]))
    return {"type": draw(st.sampled_from(["integer", "number"])), names[0]: low, names[1]: low + draw(st.integers(2, 500))}


@st.composite
def lengths(draw):
    low = draw(st.integers(0, 4))
    return {"type": "string", "minLength": low, "maxLength": low + draw(st.integers(0, 5))}


LEAVES = st.one_of(
    bounded(),
    lengths(),
    st.sampled_from([{"type": name} for name in ("integer", "number", "string", "boolean", "null")]),
    st.builds(lambda pattern: {"type": "string", "pattern": pattern}, st.sampled_from(PATTERNS)),
    st.builds(lambda name: {"type": "string", "format": name}, st.sampled_from(FORMATS)),
    st.builds(lambda of: {"type": "integer", "multipleOf": of, "minimum": 0}, st.integers(1, 50)),
    st.builds(lambda values: {"enum": values}, st.lists(VALUES, min_size=1, max_size=6)),
    st.builds(lambda value: {"const": value}, VALUES),
    st.just({"type": ["integer", "null"]}),
    st.just({"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]}),
    st.just({"allOf": [{"minimum": 3}, {"type": "integer", "maximum": 9}]}),
    st.just({"$ref": "#/$defs/leaf"}),
    st.just({"$ref": "#/$defs/leaf", "description": "beside it", "maxLength": 3}),
)


@st.composite
def objects(draw, inner):
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=4))
    schema = {"type": "object", "properties": {name: draw(inner) for name in names}}
    schema["required"] = [name for name in names if draw(st.booleans())]
    schema["additionalProperties"] = draw(st.one_of(st.just(False), inner))
    return schema


@st.composite
def arrays(draw, inner):
    low = draw(st.integers(0, 3))
    schema = {"type": "array", "items": draw(inner), "minItems": low, "maxItems": low + draw(st.integers(0, 2))}
    if draw(st.booleans()):
        schema["prefixItems"] = [draw(inner)]
    return schema


def choices(inner):
    return st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3))


TREES = st.recursive(LEAVES, lambda inner: st.one_of(objects(inner), arrays(inner), choices(inner)), max_leaves=8)
SCHEMAS = st.builds(lambda tree: {"$defs": {"leaf": {"type": "string", "maxLength": 6}}, "anyOf": [tree]}, TREES)

PLACES = {
    "type": "object",
    "properties": {"place": {"enum": ["Rome", "Troms\u00f8"]}, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
    "required": ["place", "days"],
    "additionalProperties": False,
}  # arguments of a tool
