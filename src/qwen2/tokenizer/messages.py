"""The shape of a conversation: OpenAI's dictionaries in, checked turns out. Nothing unknown passes.

    {"role": "system" | "user" | "assistant" | "tool", "content": str, "name": str, "tool_calls": [...], "tool_call_id": str}

A tool call is {"id", "type": "function", "function": {"name", "arguments"}} with the arguments as an object or as JSON text. A tool
is {"type": "function", "function": {"name", "description", "parameters"}}. The chat formats of Qwen have no place for `name` of a
person or for ids: results belong to calls by their order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as shown
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id"}
TEXT_PART = ("type", "text", "cache_control", "annotations")  # the latter two: notes for other servers' caches, and of answers
NAME = re.compile(r"[\w.-]{1,64}")  # of a tool: stands in prompts without quotes, so no spaces or signs


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for. `arguments` is the text of a JSON object, as the model wrote it; `cut`: of its beginning."""

    name: str
    arguments: str
    cut: bool = False


@dataclass(frozen=True)
class Message:
    """Model text, understood: what it says, what it calls, and why a piece that looks like a call is none (it is in `content`)."""

    content: str
    tool_calls: list[ToolCall] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Turn:
    """One checked message."""

    role: str
    content: str
    calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    call_ids: tuple[str | None, ...] = ()


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Check a conversation; ValueError names the message and what is wrong with it."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise ValueError(f"messages is a list of objects with role and content, got {type(messages).__name__}")
    turns = [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if not turns:
        raise ValueError("messages is empty; a conversation has at least one message")
    return turns


def _read_message(message: Mapping[str, Any], at: str) -> Turn:
    if not isinstance(message, Mapping):
        raise ValueError(f"{at} is {type(message).__name__}, not an object with role and content")
    unknown = [key for key in message if key not in MESSAGE_KEYS]
    if unknown:
        raise ValueError(f"{at} has the unknown key {shown(unknown[0])}; known are {', '.join(sorted(MESSAGE_KEYS))}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{at}: unknown role {shown(role)}; roles are {', '.join(ROLES)}")
    if message.get("tool_calls") and role != "assistant":
        raise ValueError(f"{at}: only an assistant has tool_calls, not {role!r}")
    if message.get("tool_call_id") is not None and role != "tool":
        raise ValueError(f"{at}: only a tool result has a tool_call_id, not {role!r}")
    raw_calls = message.get("tool_calls") or []
    if not isinstance(raw_calls, list | tuple):
        raise ValueError(f"{at}.tool_calls is {type(raw_calls).__name__}, not a list")
    calls = [_read_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(raw_calls)]
    content = message.get("content")
    if content is None and calls:
        content = ""
    return Turn(
        role=role,
        content=_content(content, f"{at}.content"),
        calls=tuple(call for call, _ in calls),
        name=_optional_text(message.get("name"), f"{at}.name"),
        tool_call_id=_optional_text(message.get("tool_call_id"), f"{at}.tool_call_id"),
        call_ids=tuple(id for _, id in calls),
    )


def _read_call(call: object, at: str) -> tuple[ToolCall, str | None]:
    if not isinstance(call, Mapping):
        raise ValueError(f"{at} is {type(call).__name__}, not an object with a function")
    unknown = [key for key in call if key not in {"id", "type", "function", "index"}]  # an index is left over from a stream
    if unknown:
        raise ValueError(f"{at} has the unknown key {shown(unknown[0])}; known are function, id, index, type")
    if call.get("type", "function") != "function":
        raise ValueError(f"{at}.type is {shown(call['type'])}; only 'function' is known")
    function = call.get("function")
    if not isinstance(function, Mapping) or set(function) - {"index"} != {"name", "arguments"}:
        raise ValueError(f"{at}.function is an object with exactly name and arguments")
    name = _name(function["name"], f"{at}.function.name")
    arguments = _arguments(function["arguments"], f"{at}.function.arguments")
    return ToolCall(name, arguments), _optional_text(call.get("id"), f"{at}.id")


def _arguments(value: object, at: str) -> str:
    """JSON text of an object. Text is kept as it is, so that what the model wrote is read back as the very same tokens."""
    if isinstance(value, Mapping):
        return dump_json(value, at)
    if not isinstance(value, str):
        raise ValueError(f"{at} is {type(value).__name__}; arguments are an object or its JSON text")
    check_object(value, at)
    return value.strip()


def check_object(text: str, at: str) -> None:
    """ValueError unless the text is one JSON object."""
    try:
        is_object = isinstance(STRICT_JSON.decode(text), dict)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{at} is not JSON: {error}") from None
    if not is_object:
        raise ValueError(f"{at} is not a JSON object")


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON value")


# Only for validity: numbers stay text, so that a thousand digits cost nothing and NaN is refused.
STRICT_JSON = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_refuse_constant)


def members(text: str) -> dict[str, tuple[object, str]]:
    """The members of a JSON object, each with its value and the value's own text."""
    check_object(text, "the call")
    found: dict[str, tuple[object, str]] = {}
    at = 1
    while (at := skip_space(text, at)) < len(text) and text[at] != "}":
        key, at = STRICT_JSON.raw_decode(text, at)
        start = skip_space(text, skip_space(text, at) + 1)  # over the colon
        value, at = STRICT_JSON.raw_decode(text, start)
        found[key] = (value, text[start:at])
        at = skip_space(text, at)
        at += text[at : at + 1] == ","
    return found


def skip_space(text: str, at: int) -> int:
    """Where JSON goes on at or behind `at`."""
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Check tool definitions; an empty list is no tools. `strict` is for whoever holds the model to it, not for the model to read."""
    if tools is None:
        return []
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Iterable):
        raise ValueError(f"tools is a list of objects with type and function, got {type(tools).__name__}")
    checked = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise ValueError(f'tools[{i}] is not {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}')
        _name(function.get("name"), f"tools[{i}].function.name")
        _optional_text(function.get("description"), f"tools[{i}].function.description")
        if function.get("strict") not in (None, True, False):
            raise ValueError(f"tools[{i}].function.strict is {shown(function['strict'])}, not true or false")
        checked.append(json.loads(dump_json(tool, f"tools[{i}]")))
        checked[-1]["function"].pop("strict", None)
    return checked


def dump_json(value: object, at: str) -> str:
    """JSON as the reference's templates write it: no escapes for other scripts, `, ` and `: ` between."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{at} cannot be written as JSON: {error}") from None


def _name(value: object, at: str) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(f"{at} is {shown(value)}; a tool's name is 1 to 64 letters, digits, '_', '-' or '.'")
    return value


def _content(value: object, at: str) -> str:
    """Text, or OpenAI's list of text parts, a line each."""
    if not isinstance(value, list):
        return _text(value, at)
    for i, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text" or "text" not in part:
            raise ValueError(f'{at}[{i}] is not a text part, {{"type": "text", "text": ...}}: these models read text only')
        if unknown := [key for key in part if key not in TEXT_PART]:
            raise ValueError(f"{at}[{i}] has the unknown key {shown(unknown[0])}; known are {', '.join(TEXT_PART)}")
    return "\n".join(_text(part["text"], f"{at}[{i}].text") for i, part in enumerate(value))


def _text(value: object, at: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{at} is {type(value).__name__}, not text")
    return value


def _optional_text(value: object, at: str) -> str | None:
    return None if value is None else _text(value, at)
