"""Constraints on an answer's form, and what is refused before any library sees them.

A constraint is a value: its kind and its text. Checked here, without a tokenizer and without the library: sizes, nesting, and that a
JSON schema uses only keywords that are enforced, or that say nothing about validity. A keyword that would be ignored is refused, since
an answer that does not validate is worse than none. The library enforces the rest or says why it cannot (grammar.py).

Schemas of pydantic and OpenAPI are read as these mean them: a `format` that is none of FORMATS is an annotation, as JSON Schema has
it, `x-...` is one, and `nullable` adds null to a type.

What deviates from JSON Schema, each to the strict side: properties come in the schema's order, numbers with bounds without an
exponent, whole numbers without a fraction (1, not 1.0); references stay inside the schema; the FORMATS are enforced.

    SamplingParams(constraint=Constraint.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}}))
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, NoReturn, get_args

Kind = Literal["json_object", "json_schema", "regex", "grammar", "choice", "call"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MOST_BYTES = 2**16  # of a constraint's text: a schema of this size compiles in a second
MOST_CALL_BYTES = 2**18  # of all tools' schemas together
MOST_DEPTH = 64  # objects and lists inside each other
MOST_CHOICES = 4096
MOST_MULTIPLE = 10_000  # states of the automaton that counts remainders; a million take half a minute to build

# What a schema's keywords hold: a schema, a list of schemas, schemas by name, "items" either of the first two, or a plain value.
HOLDS = {
    **dict.fromkeys(("additionalItems", "additionalProperties"), "schema"),
    **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), "list"),
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), "names"),
    "items": "items",
    **dict.fromkeys(("$ref", "const", "enum", "type", "minItems", "maxItems", "required", "minProperties", "maxProperties"), "value"),
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), "value"),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), "value"),
}
SAY_NOTHING = {  # about what is valid: names and notes; `discriminator` (OpenAPI) only says where in a oneOf to look
    *("$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default", "examples", "example"),
    *("readOnly", "writeOnly", "deprecated", "discriminator", "externalDocs", "xml"),
    *("contentEncoding", "contentMediaType", "contentSchema"),
}
FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))
# A grammar's strings, expressions and comments, which are not looked into, and what is refused outside of them.
QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\\n])+/')
UNFIT = {
    r"%json\b": "%json: white space in it would be unbounded; ask for kind json_schema",
    r"%llguidance\b": "%llguidance: unknown options would be ignored; leave it out",
    r"<": "<...>: control tokens are not a grammar's to write; put text into quotes",
    r"\[[^\]]*\b(temperature|max_tokens|stop)\b": "temperature, max_tokens and stop of a rule would not be obeyed; leave them out",
}


class ConstraintError(ValueError):
    """A constraint that cannot be kept to; the request that has it ends, no other."""


@dataclass(frozen=True)
class Constraint:
    """The form that an answer must have. Made by the methods named like the kinds; ValueError where it cannot be enforced."""

    kind: Kind
    text: str = ""  # a JSON schema, a regular expression, a grammar, the choices as a JSON list, or of `call` the fields as JSON

    def __post_init__(self) -> None:
        """Refuse what is too large, unknown or not enforced."""
        if self.kind not in KINDS:
            raise ValueError(f"constraint kind {self.kind!r:.80}: must be one of {', '.join(KINDS)}")
        if not isinstance(self.text, str):
            raise ValueError(f"constraint {self.kind}: its text must be a string, got {type(self.text).__name__}")
        size = len(self.text.encode("utf-8", "replace"))
        most = MOST_CALL_BYTES if self.kind == "call" else MOST_BYTES
        if size > most:
            raise ValueError(f"{self.kind} of {size:,} bytes: at most {most:,} are allowed; make it smaller")
        if self.kind == "json_object" and self.text:
            raise ValueError("json_object takes no text; for a schema use kind json_schema")
        if self.kind in ("regex", "grammar") and not self.text:
            raise ValueError(f"{self.kind} is empty: an answer needs at least one token")
        if self.kind == "json_schema":
            schema = self.parsed()
            _check_depth(schema, "#", 1)
            check_schema(schema, "#")
        elif self.kind == "grammar":
            _check_grammar(self.text)
        elif self.kind == "choice":
            _check_choices(self.parsed())
        elif self.kind == "call":
            _check_call(self.parsed())

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def json_schema(cls, schema: str | bool | Mapping[str, Any]) -> Constraint:
        """A JSON text that validates against the schema, given as text or as the object itself."""
        return cls("json_schema", schema if isinstance(schema, str) else _dumped("json_schema", schema))

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """A text that matches as a whole, in the syntax of Rust's regex crate: no look-around, no references back."""
        return cls("regex", pattern)

    @classmethod
    def grammar(cls, lark: str) -> Constraint:
        """A text of a context-free grammar in Lark's notation, whose first rule is `start`."""
        return cls("grammar", lark)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Constraint:
        """One of these texts."""
        return cls("choice", _dumped("choice", list(texts)))

    @classmethod
    def call(
        cls, tools: Mapping[str, Mapping[str, Any] | None], form: str, forced: bool, parallel: bool = True, lead: str = ""
    ) -> Constraint:
        """Calls of these tools, each with the schema of its arguments, None for any object, written in one of the tokenizer's dialects.

        `forced`: nothing but calls, and at least one; else text in which every call that is begun is one of these. `parallel`:
        more than one. `lead`: what may stand before a forced call.
        """
        asked = {"form": form, "forced": forced, "parallel": parallel, "lead": lead, "tools": dict(tools)}
        return cls("call", _dumped("call", asked))

    @classmethod
    def read(cls, value: object) -> Constraint:
        """From a constraint, or from its two fields as JSON has them."""
        if isinstance(value, Constraint):
            return value
        if not isinstance(value, Mapping) or "kind" not in value or not value.keys() <= {"kind", "text"}:
            raise ValueError(f"constraint {value!r:.80}: must be a Constraint, or a kind and a text")
        return cls(**value)

    def parsed(self) -> Any:
        """The schema as it is meant, or the choices, or the fields of a call."""
        try:
            value = json.loads(self.text, parse_constant=_not_json)
            if self.kind == "call" and isinstance(value, dict) and isinstance(value.get("tools"), dict):
                return value | {"tools": {name: meant(schema) for name, schema in value["tools"].items()}}
            return meant(value) if self.kind == "json_schema" else value
        except RecursionError:
            raise ValueError(f"{self.kind}: nested too deep to be read; at most {MOST_DEPTH} levels are allowed") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.kind} is not JSON: {error}") from None


def check_schema(schema: Any, where: str) -> None:
    """ValueError at the first place that cannot be enforced. `where` is a JSON pointer."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(f"json_schema at {where}: a schema is an object, true or false, got {schema!r:.80}")
    for name, value in schema.items():
        place = f"{where}/{name}"
        if name not in HOLDS and name not in SAY_NOTHING:
            raise ValueError(f"json_schema at {where}: the keyword {name!r:.80} would not be enforced; leave it out")
        for key, inner in _inner(HOLDS.get(name, "value"), value, place).items():
            check_schema(inner, f"{place}{key}")
    _check_values(schema, where)


def meant(schema: Any) -> Any:
    """A schema without annotations that are written as keywords, and with what OpenAPI has for JSON Schema's."""

    def plainly(schema: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in schema.items() if not name.startswith("x-")}
        if isinstance(kept.get("format"), str) and kept["format"] not in FORMATS:
            del kept["format"]
        if kept.get("uniqueItems") is False:
            del kept["uniqueItems"]
        types = kept.get("type")
        if kept.get("nullable") is True and isinstance(types, (str, list)):  # without a type it adds nothing (OpenAPI 3.0.3)
            types = types if isinstance(types, list) else [types]
            kept["type"] = types if "null" in types else [*types, "null"]
        if isinstance(kept.get("nullable"), bool):
            del kept["nullable"]
        return kept

    return _changed(schema, plainly)


def enforced(schema: Any, compiles: Callable[[str], bool]) -> Any:
    """A schema with as much of it as can be enforced. `compiles`: whether a pattern can be.

    Of the options of a `oneOf` more than one may hold, where it could not be told otherwise.
    """

    def possible(schema: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in schema.items() if name in HOLDS or name in SAY_NOTHING}
        if isinstance(kept.get("pattern"), str) and not compiles(kept["pattern"]):
            del kept["pattern"]
        if isinstance(kept.get("patternProperties"), dict):
            kept["patternProperties"] = {name: value for name, value in kept["patternProperties"].items() if compiles(name)}
        if isinstance(kept.get("oneOf"), list):
            either = {"anyOf": kept.pop("oneOf")}
            kept |= either if "anyOf" not in kept else {"allOf": [*kept.get("allOf", ()), either]}
        return kept

    try:
        return _changed(meant(schema), possible)
    except RecursionError:
        raise ValueError(f"json_schema: nested too deep to be read; at most {MOST_DEPTH} levels are allowed") from None


def _changed(schema: Any, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Any:
    """A schema, and all within it, after a change of keywords."""
    if not isinstance(schema, dict):
        return schema
    kept = change(schema)
    for name, value in kept.items():
        holds = HOLDS.get(name, "value")
        if holds == "names" and isinstance(value, dict):
            kept[name] = {key: _changed(inner, change) for key, inner in value.items()}
        elif holds in ("list", "items") and isinstance(value, list):
            kept[name] = [_changed(inner, change) for inner in value]
        elif holds in ("schema", "items"):
            kept[name] = _changed(value, change)
    return kept


def _inner(holds: str, value: Any, place: str) -> dict[str, Any]:
    """The schemas that a keyword holds, by the rest of their pointers."""
    if holds == "schema" or (holds == "items" and not isinstance(value, list)):
        return {"": value}
    if holds in ("list", "items"):
        if not isinstance(value, list):
            raise ValueError(f"json_schema at {place}: must be a list of schemas, got {value!r:.80}")
        return {f"/{i}": inner for i, inner in enumerate(value)}
    if holds == "names":
        if not isinstance(value, dict):
            raise ValueError(f"json_schema at {place}: must be schemas by name, got {value!r:.80}")
        return {f"/{name}": inner for name, inner in value.items()}
    return {}


def _check_values(schema: Mapping[str, Any], where: str) -> None:
    """The keywords whose values decide whether they are enforced, or at what cost."""
    reference = schema.get("$ref", "#")
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise ValueError(f"json_schema at {where}/$ref: {reference!r:.80} leads out of the schema; refer to a place in it, as #/$defs/name")
    multiple = schema.get("multipleOf", 1)
    if isinstance(multiple, (int, float)) and not isinstance(multiple, bool) and _digits(multiple) > MOST_MULTIPLE:
        raise ValueError(f"json_schema at {where}/multipleOf: {multiple!r:.80} without its point is above {MOST_MULTIPLE:,}; round it")
    least, required = schema.get("minProperties", 0), schema.get("required", ())
    if isinstance(least, int) and isinstance(required, (list, tuple)) and least > len(required) + 1:  # free keys may be the same twice
        raise ValueError(f"json_schema at {where}/minProperties: {least!r:.80} is enforced up to one more than are required; name them")


def _digits(number: float) -> float:
    """A decimal without its point: 0.25 is 25."""
    if isinstance(number, float) and not math.isfinite(number):
        return math.inf
    _, digits, exponent = Decimal(repr(number)).normalize().as_tuple()
    figures = "".join(map(str, digits)) + "0" * max(0, min(20, int(exponent)))
    return int(figures) if len(figures) <= 20 else math.inf


def _check_depth(value: Any, where: str, depth: int) -> None:
    """ValueError where objects and lists lie too deep, enumerated values included; never deeper itself than the limit."""
    if isinstance(value, (dict, list)):
        if depth > MOST_DEPTH:
            raise ValueError(f"json_schema at {where:.80}...: nested deeper than {MOST_DEPTH} levels; make it flatter, or use $ref")
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_depth(inner, f"{where}/{key}", depth + 1)


def _check_grammar(text: str) -> None:
    outside = QUOTED.sub(" ", text)
    for pattern, why in UNFIT.items():
        if re.search(pattern, outside):
            raise ValueError(f"grammar: {why}")


def _check_choices(choices: Any) -> None:
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("choice: must be a list of texts of at least one character")
    if not 1 <= len(choices) <= MOST_CHOICES:
        raise ValueError(f"choice of {len(choices):,} texts: from 1 to {MOST_CHOICES:,} are allowed")


def _check_call(asked: Any) -> None:
    """The fields of `Constraint.call`."""
    types = {"form": str, "forced": bool, "parallel": bool, "lead": str, "tools": dict}
    if not isinstance(asked, dict) or {name: type(value) for name, value in asked.items()} != types:
        raise ValueError(f"call: must have the fields {', '.join(types)}, as Constraint.call writes them")
    if not asked["tools"]:
        raise ValueError("call: there are no tools to call")
    for name, schema in asked["tools"].items():
        if schema is None:
            continue
        try:
            if not isinstance(schema, dict):
                raise ValueError(f"its parameters must be a JSON schema, an object, got {schema!r:.80}")
            _check_depth(schema, "#", 1)
            check_schema(schema, "#")
            size = len(json.dumps(schema, ensure_ascii=False).encode("utf-8", "replace"))
            if size > MOST_BYTES:
                raise ValueError(f"json_schema of {size:,} bytes: at most {MOST_BYTES:,} are allowed; make it smaller")
        except ValueError as error:
            raise ValueError(f"tool {name!r}: {error}") from None


def _dumped(kind: str, value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError(f"{kind}: nested too deep to be written; at most {MOST_DEPTH} levels are allowed") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind} is not JSON: {error}") from None


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
