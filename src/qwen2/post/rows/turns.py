"""The turns of a conversation, however a tool's files write them, as OpenAI's messages.

Known are objects with role and content (OpenAI, ms-swift, Axolotl), from and value (ShareGPT), both sides in one object (human and
assistant: Firefly, ms-swift; input and output: XTuner), pairs [question, answer] (histories of LLaMA-Factory and ms-swift), and bare
texts in turn (UltraChat). A call is an assistant's message with `tool_calls`, a turn of a role of its own whose text is JSON, or a
part of a content; calls that follow each other or an answer belong to one turn.

What is left out: reasoning beside an answer, for which Qwen2's formats have no place (it is named among the unused columns), and
images, audio and video (a `RowError`).

    turns([{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}], "conversations", Counter())[0]
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from qwen2.post.rows.records import Messages, Tools
from qwen2.tokenizer.messages import dump_json

ROLES = {
    **dict.fromkeys(("system", "developer", "system_prompt"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "usr"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "function_response", "tool_result", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "call"),
}
SIDES = (("human", "assistant"), ("user", "assistant"), ("input", "output"), ("query", "response"), ("question", "answer"))
WEIGHTS = ("weight", "loss_weight", "loss_scale", "loss", "train", "training")  # of an answer: whether it is learned
MEANT = {**dict.fromkeys(("true", "1", "1.0"), True), **dict.fromkeys(("false", "0", "0.0"), False)}  # by a value or its text
MEDIA = ("images", "image", "videos", "video", "audios", "audio", "image_url", "input_audio", "video_url", "audio_url")
KEPT = ("role", "from", "content", "value", "name", "tool_calls", "tool_call_id", "function_call")

NO_KNOWN_FORMAT, UNKNOWN_ROLE, BROKEN = "no known format", "an unknown role", "not well-formed"
HAS_MEDIA = "images, audio or video, which these models do not read"


class RowError(ValueError):
    """Why a row is not used: the kind of reason, and what is the matter with this one."""

    def __init__(self, why: str, detail: str = "") -> None:
        super().__init__(f"{why}: {detail}" if detail else why)
        self.why, self.detail = why, detail


def turns(given: Any, at: str, unused: Counter[str]) -> tuple[Messages, tuple[int, ...]]:
    """Messages, and the indices of those that are not to be learned. RowError where they cannot be read."""
    if isinstance(given, str):
        given = parsed(given, at)
    if isinstance(given, Mapping):
        given = [given]
    if not isinstance(given, list):
        raise RowError(NO_KNOWN_FORMAT, f"{at} is {type(given).__name__}, not a list of turns")
    messages: Messages = []
    untrained: list[int] = []
    for i, item in enumerate(given):
        for role, message, learned in _read(item, i, f"{at}[{i}]", unused):
            if role == "call" and messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
            else:
                messages.append(message)
            if not learned and message["role"] == "assistant" and len(messages) - 1 not in untrained:
                untrained.append(len(messages) - 1)
    return messages, tuple(untrained)


def _read(item: Any, i: int, at: str, unused: Counter[str]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Role (or "call"), message, and whether it is learned, of each turn that an item of the list holds."""
    if isinstance(item, str):
        yield from _side("assistant" if i % 2 else "user", item, at)
    elif isinstance(item, list | tuple) and len(item) == 2:
        yield from _side("user", item[0], at)
        yield from _side("assistant", item[1], at)
    elif not isinstance(item, Mapping):
        raise RowError(NO_KNOWN_FORMAT, f"{at} is {type(item).__name__}, not a turn")
    elif "role" in item or "from" in item:
        yield _turn({key: value for key, value in item.items() if value is not None}, at, unused)
    else:
        sides = next((pair for pair in SIDES if pair[1] in item), None)
        if sides is None:
            raise RowError(NO_KNOWN_FORMAT, f"{at} has neither role and content, nor from and value, nor human and assistant")
        note(unused, at, item.keys() - {"system", *sides})
        if item.get("system"):
            yield from _side("system", item["system"], at)
        if sides[0] == "human" or item.get(sides[0]):
            yield from _side("user", item.get(sides[0]), at)
        yield from _side("assistant", item[sides[1]], at)


def _side(role: str, value: Any, at: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    yield role, {"role": role, "content": text(value, f"{at} ({role})")}, True


def _turn(item: Mapping[str, Any], at: str, unused: Counter[str]) -> tuple[str, dict[str, Any], bool]:
    """A turn with a role of its own."""
    given = item.get("role", item.get("from"))
    role = ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        raise RowError(UNKNOWN_ROLE, f"{at} is of {given!r}; known are {', '.join(ROLES)}")
    if any(item.get(key) for key in MEDIA):
        raise RowError(HAS_MEDIA, at)
    if item.get("train_detail"):
        raise RowError("parts of an answer with a loss of their own", f"{at}: whole answers are learned, or not")
    note(unused, at, item.keys() - {*KEPT, *WEIGHTS})
    content = item.get("content", item.get("value"))
    if role == "call":
        return role, {"role": "assistant", "content": "", "tool_calls": calls(content, at)}, learned(item, at)
    said, called = _content(content, role, at, unused)
    message: dict[str, Any] = {"role": role, "content": said}
    if role == "tool":
        message |= {key: str(item[key]) for key in ("name", "tool_call_id") if key in item}
    if role == "assistant":
        called += calls(item["tool_calls"], at) if item.get("tool_calls") else []
        called += [_call(parsed(item["function_call"], at), at)] if item.get("function_call") else []
    if called:
        message["tool_calls"] = called
    return role, message, role != "assistant" or learned(item, at)  # others are not learned, whatever their weight


def _content(value: Any, role: str, at: str, unused: Counter[str]) -> tuple[str, list[dict[str, Any]]]:
    """Text, and the calls that are parts of it."""
    if not isinstance(value, list) or (role == "tool" and not all(isinstance(part, Mapping) and "type" in part for part in value)):
        if role == "tool" and isinstance(value, Mapping | list):
            return dump_json(value, at), []
        return ("" if value is None else text(value, at)), []
    texts: list[str] = []
    called: list[dict[str, Any]] = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        held = part.get("text", part.get("value")) if isinstance(part, Mapping) else None
        if kind in MEDIA:
            raise RowError(HAS_MEDIA, at)
        if kind == "text":
            texts.append(text(held, at))
        elif kind in ("tool_call", "tool_calls", "function_call"):
            called += calls(held, at)
        elif kind in ("reasoning", "thinking"):
            note(unused, at, {kind})
        else:
            raise RowError(BROKEN, f"{at}: a part of its content is neither text nor a call")
    return "\n".join(texts), called


def learned(item: Mapping[str, Any], at: str) -> bool:
    """Whether an answer's loss counts. RowError for a weight between 0 and 1, which there is no place for."""
    for key in WEIGHTS:
        value = item.get(key)
        if value is None or value == "":
            continue
        known = MEANT.get(str(value).strip().lower())
        if known is None:
            raise RowError("a weight between 0 and 1", f"{at}: {key} is {value!r}; answers are learned (1) or not (0)")
        return known
    return True


def calls(value: Any, at: str) -> list[dict[str, Any]]:
    """The calls of a turn of their own: JSON of one or of several."""
    found = parsed(value, at)
    return [_call(call, at) for call in (found if isinstance(found, list) else [found])]


def _call(call: Any, at: str) -> dict[str, Any]:
    """One call in OpenAI's shape."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(BROKEN, f"{at}: a call is an object with name and arguments")
    arguments = function.get("arguments", function.get("parameters"))
    made = {"type": "function", "function": {"name": function["name"], "arguments": {} if arguments is None else arguments}}
    return made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def tools(value: Any, at: str) -> Tools | None:
    """Tool definitions: a list or its JSON text, of OpenAI's objects or of bare functions; None where there is none."""
    if not value:
        return None
    found = parsed(value, at)
    found = [found] if isinstance(found, Mapping) else found
    if not isinstance(found, list):
        raise RowError(BROKEN, f"{at} is {type(found).__name__}, not a list of tools")
    listed = [parsed(tool, f"{at}[{i}]") for i, tool in enumerate(found)]
    whole = [dict(tool) if isinstance(tool, Mapping) and "function" in tool else {"type": "function", "function": tool} for tool in listed]
    return whole or None


def parsed(value: Any, at: str) -> Any:
    """The value, or what it says where it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(BROKEN, f"{at} is text that is not JSON: {error}") from None


def text(value: Any, at: str) -> str:
    """A text, or a number as one. RowError for what is neither, and for NaN and infinity, which files have where nothing was said."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not isfinite(value):
        raise RowError(BROKEN, f"{at} is {value}, neither text nor a number")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise RowError(BROKEN, f"{at} is {type(value).__name__}, not text")


def note(unused: Counter[str], at: str, keys: Any) -> None:
    """Count keys that nothing was made of, under the name that they have in every row."""
    place = at.partition("[")[0]
    unused.update(f"{place}[].{key}" for key in keys)
