"""Calls that an answer must have, or may have only in one form: what a request says about them, and the grammar that follows from it.

A forced call is the whole answer. Else text is free, and only a call that is begun is held to the tools: those that are strict to
their schemas, the others to any JSON object; with one call at most the answer ends behind it. Name and arguments are one grammar,
so that neither can miss the other, written as the model's chat format writes calls. The brackets of Qwen2.5's are tokens where the
vocabulary has them, and forced calls have those. In free text the same letters spelled out open a call as well, and close it: a
reader could not tell them apart, and models that were shown them in a question do spell them. An answer that is a call in plain JSON
(tokenizer/plain.py) is one of a strict tool where the grammar would have allowed it in the model's own format, and else a text.

Left out: a text after a call of Qwen2's format, which has no end of its own; a form for the text beside the calls; a longest call.
A schema bounds what it names: where it allows properties of any name, lists without maxItems or texts without maxLength, a model that
goes on with them ends at max_tokens or at the window, with "length" and the arguments so far, as any answer does.

    ToolChoice("required", parallel=False)                # tool_choice of llm.chat, llm.stream, llm.ask
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from qwen2.engine.constraint import Constraint, ConstraintError, enforced, meant
from qwen2.tokenizer import BETWEEN, DIALECTS, NAME, read_tools

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from qwen2.engine.grammar import Compiled
    from qwen2.tokenizer import Dialect

MOST_CALLS = 32  # forced ones in a row: small models tend to repeat themselves
LEAD = ": "  # what the model writes first after a result, where the prompt ends in the midst of its turn
Schema = Mapping[str, Any]


@dataclass(frozen=True)
class ToolChoice:
    """Whether an answer must call: `required` any of the tools, or the one that is named. `parallel`: more than one call."""

    mode: Literal["auto", "required"] = "auto"
    name: str | None = None
    parallel: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "required"):
            raise ValueError(f"tool_choice {self.mode!r:.80}: must be auto or required; for none leave the tools out")

    @property
    def forced(self) -> bool:
        """Whether the answer is nothing but calls."""
        return self.mode == "required" or self.name is not None


def constraint(tools: Sequence[Schema] | None, choice: ToolChoice, form: str | None, goes_on: bool) -> Constraint | None:
    """What holds an answer to the tools; None where it is free. ValueError names the tool that cannot be enforced.

    `form`: how the model writes calls (`ChatTemplate.calls`). `goes_on`: whether the conversation ends with a tool's result.
    """
    read_tools(tools)
    functions = [tool["function"] for tool in tools or ()]
    names = [function["name"] for function in functions]
    if choice.forced and not names:
        raise ValueError("tool_choice asks for a call: give tools to choose from")
    if choice.name is not None and choice.name not in names:
        raise ValueError(f"tool_choice names the function {choice.name!r:.80}, which is not among the tools: {', '.join(names)}")
    held = choice.forced or any(function.get("strict") for function in functions)
    if not names or (not held and (choice.parallel or form is None)):
        return None
    if form is None:
        raise ValueError("this model's chat template does not say how calls are written: leave strict and tool_choice out")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise ValueError(f"two tools have the name {twice!r}: which one is called could not be told")
    schemas = {one["name"]: _schema(one, choice.forced) for one in functions if choice.name in (None, one["name"])}
    lead = LEAD + BETWEEN if goes_on and DIALECTS[form].lead else ""
    return Constraint.call(schemas, form, choice.forced, choice.parallel, lead)


def _schema(function: Schema, forced: bool) -> Schema | None:
    """That of a tool's arguments. Forced calls are held to it unless the tool says otherwise, others only if it says so.

    A keyword that cannot be enforced is an error for a tool that says so, and is left out of a forced call's schema, as is a pattern
    that cannot be compiled: there the call was asked for, and not that each word of its schema holds.
    """
    strict, schema = function.get("strict"), function.get("parameters")
    if strict is False or not (strict or forced):
        return None
    schema = {} if schema is None else schema
    if not isinstance(schema, Mapping):
        raise ValueError(f"tool {function['name']!r}: its parameters must be a JSON schema, an object, got {schema!r:.80}")
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise ValueError(f"tool {function['name']!r}: arguments are an object, and the type of its parameters is {kind!r:.80}")
    return {**(meant(schema) if strict else enforced(schema, compiles)), "type": "object"}


def compiles(pattern: str) -> bool:
    """Whether the library has this regular expression. It is only read, which takes a fraction of a millisecond whatever it says."""
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema({"type": "string", "pattern": pattern})
    except ValueError:
        return False
    return not LLMatcher(_bytes(), grammar, log_level=0).is_error()


@cache
def _bytes() -> LLTokenizer:
    """A vocabulary of single bytes."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def fits(functions: Mapping[str, Schema], form: Compiled, dialect: str) -> Callable[[str, str], bool]:
    """Whether a call in plain JSON is one that the grammar of the answer, which is free, allows; `functions` by name.

    It is put into the model's format first, properties in their schema's order: that and white space are the grammar's, not the schema's.
    """
    way = DIALECTS[dialect]
    head, middle, tail = way.write

    def fit(name: str, arguments: str) -> bool:
        if not functions[name].get("strict"):
            return True
        value = _ordered(json.loads(arguments), functions[name].get("parameters"))
        text = "".join((way.open, head, name, middle, json.dumps(value, ensure_ascii=False), tail, way.close or ""))
        matcher = form.matcher(())
        return all(map(matcher.take, form.vocabulary.encode(text))) and matcher.state.is_accepting()

    return fit


def _ordered(value: Any, schema: object) -> Any:
    """A value whose objects have their properties in the schema's order, where it names them plainly, and others behind them."""
    if not isinstance(schema, Mapping):
        return value
    if isinstance(value, list):
        return [_ordered(item, schema.get("items")) for item in value]
    named = schema.get("properties")
    if not isinstance(value, dict) or not isinstance(named, Mapping):
        return value
    return {key: _ordered(value[key], named.get(key)) for key in (*(k for k in named if k in value), *(k for k in value if k not in named))}


# --- the grammar


def lark(asked: Mapping[str, Any], brackets: Mapping[str, str], options: Mapping[str, Any]) -> str:
    """The grammar of a `Constraint.call` with the fields `asked`. `brackets`: how those that are tokens are referred to in a grammar.

    `options`: the library's, for schemas.
    """
    if asked["form"] not in DIALECTS:
        raise ConstraintError(f"call: form {asked['form']!r:.80}: must be one of {', '.join(DIALECTS)}")
    dialect = DIALECTS[asked["form"]]
    opens = brackets.get(dialect.open)
    more = ""
    if asked["parallel"] and (asked["forced"] or dialect.close is None):
        more = f" ({_quoted(BETWEEN)} call){{0,{MOST_CALLS - 1}}}"
    if more:  # a model may think better of it, or go on to where the results would follow, which ends the answer
        more += f" ({' | '.join(_quoted(BETWEEN + stop) for stop in ('', *dialect.stops[:1]))})?"
    close = None if dialect.close is None else brackets.get(dialect.close)
    spelled = "" if dialect.close is None else _quoted(dialect.close)
    opening = _quoted(dialect.open) if opens is None else opens
    rules = [*_body(asked["tools"], dialect, options), f"call: {opening} body {spelled if close is None else close}"]
    if asked["forced"]:
        lead = f"({_quoted(asked['lead'])})? " if asked["lead"] else ""
        return "\n".join([*rules, f"start: {lead}call{more}", ""])
    rules.append(f"TEXT: /(?s:.+)/ & ~/(?s:.*){re.escape(dialect.open)}(?s:.*)/")  # opens no call
    either = f"({close} | {spelled})" if close is not None else spelled
    rules.append(f"opened[lazy]: /(?s:.*)/ {_quoted(dialect.open)}")  # the text before a call and what opens it, the shortest there is
    begun = f"opened body {either}" if opens is None else f"(opened body {either} | TEXT? call)"
    again = asked["parallel"] and dialect.close is not None
    return "\n".join([*rules, f"start: ({begun})* TEXT?" if again else f"start: TEXT? | {begun}{more}", ""])


def _body(tools: Mapping[str, Schema | None], dialect: Dialect, options: Mapping[str, Any]) -> list[str]:
    """Rules for what stands between the brackets."""
    head, middle, tail = dialect.write
    rules, calls = [], []
    for i, (name, schema) in enumerate(tools.items()):
        if not NAME.fullmatch(name):
            raise ConstraintError(f"call: {name!r:.80} is not the name of a tool")
        rules.append(f"arguments_{i}: %json {_quoted({**(schema or {'type': 'object'}), 'x-guidance': options})}")
        calls.append(f"{_quoted(head + name + middle)} arguments_{i}")
    return [*rules, f"body: ({' | '.join(calls)}) {_quoted(tail) if tail else ''}"]


def _quoted(value: object) -> str:
    """A text or a schema as the notation has it: as JSON."""
    return json.dumps(value, ensure_ascii=False)
