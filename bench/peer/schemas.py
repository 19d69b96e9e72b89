"""What bench/grammar.py measures with: schemas of growing size, JSON texts that they describe, and a probe for each keyword."""

from __future__ import annotations

from typing import Any


def strict(**properties: Any) -> dict[str, Any]:
    """An object that has these properties and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
PERSON = strict(name=TEXT, age={"type": "integer", "minimum": 0, "maximum": 150}, email={"type": "string", "format": "email"})
ORDER = strict(
    id={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{6}$"},
    state={"enum": ["open", "paid", "sent", "zur\u00fcck", "\u53d6\u6d88"]},
    customer=PERSON,
    lines={"type": "array", "items": strict(article=TEXT, count=WHOLE, price={"type": "number", "minimum": 0}), "minItems": 1},
    note={"anyOf": [TEXT, {"type": "null"}]},
)
TREE = {
    "$defs": {"node": strict(label=TEXT, children={"type": "array", "items": {"$ref": "#/$defs/node"}})},
    "$ref": "#/$defs/node",
}


def wide(count: int) -> dict[str, Any]:
    return strict(**{f"field_{i}": [TEXT, WHOLE, {"type": "boolean"}, {"enum": ["a", "b", i]}][i % 4] for i in range(count)})


SCHEMAS: dict[str, Any] = {
    "any object": {"type": "object"},
    "three fields": PERSON,
    "an order": ORDER,
    "recursive": TREE,
    "50 fields": wide(50),
    "500 fields": wide(500),
    "enum of 200": {"enum": [f"value {i * 7919}" for i in range(200)]},
    "enum of 3,000": {"enum": [f"value {i * 7919}" for i in range(3000)]},
    "20 objects to choose from": {"anyOf": [strict(kind={"const": f"kind {i}"}, data=wide(i)) for i in range(20)]},
    "100 objects to choose from": {"anyOf": [strict(kind={"const": f"kind {i}"}, data=wide(i % 8)) for i in range(100)]},
}

TEXTS: list[tuple[Any, Any]] = [
    (PERSON, {"name": "Zo\u00eb M\u00fcller-L\u00fcdenscheidt", "age": 41, "email": "zoe.mueller@example.org"}),
    (
        ORDER,
        {
            "id": "AB-123456",
            "state": "\u53d6\u6d88",
            "customer": {"name": "Ada Lovelace", "age": 36, "email": "ada@example.org"},
            "lines": [
                {"article": f"A long description of article {i}, with all its qualities", "count": i, "price": 9.75} for i in range(8)
            ],
            "note": 'Leave it with the neighbours, please; "they" know.\nThank you',
        },
    ),
    (TREE, {"label": "root", "children": [{"label": f"leaf {i}", "children": []} for i in range(12)]}),
    ({"type": "object"}, {"a": [1, 2.5, None, True, {"b": "\U0001f600 text"}], "c": {"d": {"e": "f " * 60}}}),
    (wide(50), {f"field_{i}": ["some words of text", 17 * i, True, "a"][i % 4] for i in range(50)}),
]

ONE = {"a": {"type": "integer"}}
FEATURES: list[tuple[str, Any, str, str]] = [  # keyword, schema, a valid text, an invalid one
    ("type", {"type": "integer"}, "1", '"a"'),
    ("enum, other scripts", {"enum": ["\u00e9", "\u65e5\u672c", "\U0001f600"]}, '"\u65e5\u672c"', '"e"'),
    ("const, an object", {"const": {"a": [1, 2]}}, '{"a": [1, 2]}', '{"a": [1]}'),
    ("pattern", {"type": "string", "pattern": "^a+$"}, '"aa"', '"ab"'),
    ("pattern, not anchored", {"type": "string", "pattern": "b"}, '"abc"', '"ac"'),
    ("pattern, look-ahead", {"type": "string", "pattern": "^(?=a)[ab]$"}, '"a"', '"b"'),
    ("pattern with maxLength", {"type": "string", "pattern": "^a*$", "maxLength": 3}, '"aaa"', '"aaaa"'),
    ("minLength, maxLength", {"type": "string", "minLength": 2, "maxLength": 3}, '"\u00e9\u00e9"', '"\u00e9"'),
    ("format date", {"type": "string", "format": "date"}, '"2020-01-31"', '"2020-13-31"'),
    ("format email", {"type": "string", "format": "email"}, '"a@b.de"', '"ab"'),
    ("format uuid", {"type": "string", "format": "uuid"}, '"123e4567-e89b-12d3-a456-426614174000"', '"x"'),
    ("format unknown", {"type": "string", "format": "colour"}, '"red"', '"x"'),
    ("minimum, maximum of integers", {"type": "integer", "minimum": 3, "maximum": 17}, "12", "20"),
    ("minimum, maximum of numbers", {"type": "number", "minimum": 0.5, "maximum": 2}, "1.5", "2.1"),
    ("exclusiveMinimum", {"type": "integer", "exclusiveMinimum": 0}, "1", "0"),
    ("multipleOf", {"type": "integer", "multipleOf": 7}, "14", "15"),
    ("items", {"type": "array", "items": {"type": "integer"}}, "[1]", '["a"]'),
    ("prefixItems", {"type": "array", "prefixItems": [{"type": "integer"}], "items": False}, "[1]", "[1, 2]"),
    ("minItems, maxItems", {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}, "[1, 2]", "[1]"),
    ("uniqueItems", {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "[1, 2]", "[1, 1]"),
    ("contains", {"type": "array", "contains": {"type": "integer"}}, "[1]", '["a"]'),
    ("required", {"type": "object", "properties": ONE, "required": ["a"]}, '{"a": 1}', "{}"),
    ("required, not declared", {"type": "object", "required": ["x"]}, '{"x": 1}', "{}"),
    ("additionalProperties false", {"type": "object", "properties": ONE, "additionalProperties": False}, '{"a": 1}', '{"b": 1}'),
    ("additionalProperties a schema", {"type": "object", "additionalProperties": {"type": "integer"}}, '{"b": 1}', '{"b": "x"}'),
    (
        "patternProperties",
        {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
        '{"xa": 1}',
        '{"xa": "s"}',
    ),
    ("propertyNames", {"type": "object", "propertyNames": {"pattern": "^a"}}, '{"a": 1}', '{"b": 1}'),
    ("minProperties", {"type": "object", "minProperties": 1}, '{"a": 1}', "{}"),
    ("maxProperties", {"type": "object", "maxProperties": 1}, '{"a": 1}', '{"a": 1, "b": 1}'),
    ("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}, '{"a": 1, "b": 1}', '{"a": 1}'),
    ("unevaluatedProperties", {"type": "object", "properties": ONE, "unevaluatedProperties": False}, '{"a": 1}', '{"b": 1}'),
    ("anyOf", {"anyOf": [{"type": "integer"}, {"type": "boolean"}]}, "true", '"a"'),
    ("oneOf, options apart", {"oneOf": [{"type": "integer"}, {"type": "boolean"}]}, "true", '"a"'),
    ("oneOf, options overlap", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "1.5", "1"),
    ("allOf", {"allOf": [{"minimum": 3}, {"type": "integer", "maximum": 5}]}, "4", "6"),
    ("not", {"not": {"type": "string"}}, "1", '"a"'),
    ("if, then", {"if": {"type": "string"}, "then": {"minLength": 3}}, '"abc"', '"a"'),
    ("$ref", {"$defs": {"a": {"type": "integer"}}, "$ref": "#/$defs/a"}, "1", '"a"'),
    ("$ref with siblings", {"$defs": {"a": {"type": "integer"}}, "$ref": "#/$defs/a", "minimum": 3}, "4", "1"),
    ("$ref, recursive", {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False}, '{"a": {}}', '{"a": 1}'),
    ("$anchor", {"$defs": {"x": {"$anchor": "q", "type": "integer"}}, "$ref": "#q"}, "1", '"a"'),
    ("$dynamicRef", {"$dynamicAnchor": "n", "type": "object", "additionalProperties": {"$dynamicRef": "#n"}}, '{"a": {}}', '{"a": 1}'),
    ("contentEncoding", {"type": "string", "contentEncoding": "base64"}, '"YQ=="', '"!"'),
    ("a keyword that is none", {"type": "string", "minLenght": 2}, '"ab"', '"a"'),
    ("bounds that exclude all", {"type": "integer", "minimum": 5, "maximum": 3}, "4", "4"),
]
