"""What a row is, told by its keys: the formats of the field's tools as data, each row judged by itself.

A bare list of turns is a conversation; a row with a role is a turn alone, and no text.

A row is a preference where it has two answers (chosen and rejected, under whatever names), else a conversation where it has a list of
turns (turns.py), else a prompt with an answer, else a text. A conversation in which only an assistant speaks is a text too, as ms-swift
writes pre-training data. What cannot be used is `Skipped` with the reason; columns that nothing was made of are counted by name.

Two texts under `output`, beside an instruction or a prompt, are a preference too, the better one first: so older ranking files of
LLaMA-Factory have it. Any other list of texts as an answer says of none of them what it is, and is skipped.

What is left out: Axolotl's template-free segments (there is one renderer, and it writes the format), and columns of other names, as a
dataset_info.json may give them.

    record({"instruction": "Add.", "input": "1+1", "output": "2"}, "sums.jsonl:1", Counter())
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from qwen2.post.rows.records import Example, Messages, PlainText, Preference, Record, Skipped, Tools
from qwen2.post.rows.turns import BROKEN, HAS_MEDIA, MEANT, MEDIA, NO_KNOWN_FORMAT, ROLES, RowError, text, tools, turns
from qwen2.tokenizer.messages import read_messages, read_tools

CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
PAIRS = (  # better, worse
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("chosen_messages", "rejected_messages"),
    ("preferred_output", "non_preferred_output"),
)
WORSE = ("rejected_response", "rejected_messages")  # ms-swift: the better answer is that of the row without it
PROMPTS = ("instruction", "prompt", "query", "question", "problem", "article", "message_1", "input")
CONTEXTS = ("input", "context", "article")  # what an instruction is about, written behind it
ANSWERS = ("output", "response", "completion", "solution", "answer", "target", "generation", "revision", "summary", "message_2")
SYSTEMS = ("system", "system_prompt")
TEXTS = ("text", "content")
LABELS = ("label", "kto_tag")
RANKED = (("instruction", "prompt"), "output")  # of LLaMA-Factory's older files: what is answered, and the answers, the better one first
HUMAN = re.compile(r"\n\n(Human|Assistant): ?")  # of HH-RLHF

NO_ANSWER, EMPTY_ANSWER, NO_PROMPT = "no assistant turn", "an empty answer", "no prompt"
EQUAL, EMPTY_TEXT = "chosen and rejected are equal", "an empty text"
OTHER_PROMPT = "a prompt that its two conversations do not begin with"
ANSWERED, WEIGHTLESS = "a prompt that ends with another answer", "a chosen answer with the weight 0"
SEVERAL, HALF = "a list of texts as an answer", "half a character"


class Row:
    """A row's values by key, and which of them were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        known = {key.lower() if key.isupper() else key: value for key, value in values.items()}
        self.values = {key: value for key, value in known.items() if value is not None}
        self.used: set[str] = set()

    def has(self, keys: tuple[str, ...]) -> str | None:
        """The first of the keys that the row has."""
        return next((key for key in keys if key in self.values), None)

    def take(self, *keys: str) -> Any:
        """The value of the first of the keys that the row has, None where it has none."""
        key = self.has(keys)
        if key is None:
            return None
        self.used.add(key)
        return self.values[key]


def record(values: Any, where: str, unused: Counter[str]) -> Record:
    """What a row is; `unused` counts the columns that nothing was made of."""
    if isinstance(values, list) and any(isinstance(one, Mapping) and ("role" in one or "from" in one) for one in values):
        values = {"messages": values}
    if not isinstance(values, Mapping):
        return Skipped(NO_KNOWN_FORMAT, where, f"a row is an object, this one is {type(values).__name__}")
    row = Row(values)
    found: Counter[str] = Counter()
    try:
        if any(row.values.get(key) for key in MEDIA):
            raise RowError(HAS_MEDIA)
        _rename(row)
        made = _preference(row, where, found) or _conversation(row, where, found) or _answered(row, where, found) or _text(row, where)
        if made is None:
            raise RowError(*_nothing(row))
        _whole(made)
    except RowError as error:
        return Skipped(error.why, where, error.detail)
    except ValueError as error:
        return Skipped(BROKEN, where, str(error))
    unused.update(found)
    unused.update(row.values.keys() - row.used)
    return made


def is_turn(value: Any) -> bool:
    """Whether it is a turn of a conversation alone, and no row."""
    if not isinstance(value, Mapping) or any(value.get(key) is not None for key in (*CONVERSATIONS, *PROMPTS, *ANSWERS)):
        return False
    role = value.get("role", value.get("from"))
    return isinstance(role, str) and role.lower() in ROLES


def _rename(row: Row) -> None:
    """Give two ranked answers the names of a pair, and UltraChat's texts in turn that of a conversation."""
    said, others = row.values.get("data"), row.has((*CONVERSATIONS, *PROMPTS, *ANSWERS, *TEXTS))
    if others is None and isinstance(said, list) and len(said) > 1 and all(isinstance(one, str) for one in said):
        row.values["dialogue"] = row.values.pop("data")
    prompts, answers = RANKED
    given = row.values.get(answers)
    pair = isinstance(given, list) and len(given) == 2 and all(isinstance(one, str) for one in given)
    if pair and row.has(prompts) and row.has(tuple(key for both in PAIRS for key in both)) is None:
        row.values["chosen"], row.values["rejected"] = row.values.pop(answers)


def _whole(made: Record) -> None:
    """RowError where a text has half a surrogate pair: there are no bytes for it, and ids would be those of another character."""
    try:
        json.dumps(vars(made), ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise RowError(HALF, f"{error.object[error.start]!r} alone is a half of a surrogate pair, which UTF-8 cannot write") from None


def _nothing(row: Row) -> tuple[str, str]:
    """Why a row is none of all these."""
    if row.has(PROMPTS):
        return NO_ANSWER, f"a prompt, but none of {', '.join(ANSWERS)}"
    if "segments" in row.values:
        return NO_KNOWN_FORMAT, "segments are texts without a template: write them as messages"
    if "role" in row.values:
        return NO_KNOWN_FORMAT, "a row with a role is a turn alone: write the turns of a conversation as a list, on one line"
    keys = ", ".join(sorted(row.values)[:6])
    return NO_KNOWN_FORMAT, f"it has the keys {keys}" if keys else "it has no keys"


def _conversation(row: Row, where: str, unused: Counter[str]) -> Record | None:
    """A list of turns."""
    key = row.has(CONVERSATIONS)
    if key is None:
        return None
    messages, untrained = turns(row.take(key), key, unused)
    if messages and all(message["role"] == "assistant" and not message.get("tool_calls") for message in messages):
        return _document("\n\n".join(message["content"] for message in messages), where)
    before = _system(row, messages)
    return _example(row, before + messages, tuple(i + len(before) for i in untrained), where)


def _answered(row: Row, where: str, unused: Counter[str]) -> Record | None:
    """A prompt and an answer, which may be messages too."""
    answer = row.has(ANSWERS)
    if answer is None or (row.has(PROMPTS) is None and not isinstance(row.values[answer], list)):
        return None
    messages, untrained = _prompt(row, unused)
    said, more = _continuation(row.take(answer), answer, unused)
    if not messages and said[0]["role"] == "assistant":
        raise RowError(NO_PROMPT)
    messages = messages[: len(messages) - _said_again(messages, said)]
    untrained = tuple(i for i in untrained if i < len(messages))
    before = _system(row, messages + said)
    shift = len(before) + len(messages)
    marked = (*(i + len(before) for i in untrained), *(i + shift for i in more))
    return _example(row, before + messages + said, marked, where)


def _said_again(messages: Messages, said: Messages) -> int:
    """With how many of the prompt's last turns an answer begins that is the whole conversation."""
    start = bool(messages) and messages[0]["role"] != "system" == said[0]["role"]  # the answer's own system prompt comes before them
    counts = range(min(len(messages), len(said)), 0, -1)
    return next((count for count in counts if _plain(messages[-count:]) == _plain(said[start : start + count])), 0)


def _plain(messages: Messages) -> Messages:
    """Messages as they are compared: by their words, whatever space is around them."""
    return [{**message, "content": message["content"].strip()} for message in messages]


def _example(row: Row, messages: Messages, untrained: tuple[int, ...], where: str) -> Example:
    """A checked conversation."""
    checked(messages, defined := _tools(row))
    learned = [message for i, message in enumerate(messages) if message["role"] == "assistant" and i not in untrained]
    if not learned:
        raise RowError(NO_ANSWER, "every answer has the weight 0" if untrained else "")
    _not_empty(messages)
    return Example(messages, defined, where, _label(row), untrained)


def _preference(row: Row, where: str, unused: Counter[str]) -> Record | None:
    """Two answers to one prompt."""
    pair = next((pair for pair in PAIRS if all(key in row.values for key in pair)), None)
    if pair is not None:
        sides = _sides(row, pair, unused)
    elif row.has(WORSE) and (row.has(CONVERSATIONS) or (row.has(PROMPTS) and row.has(ANSWERS))):
        sides = _beside_a_worse(row, unused)
    else:
        return None
    messages, chosen, rejected, untrained = sides
    if not messages:
        raise RowError(NO_PROMPT)
    if chosen == rejected:
        raise RowError(EQUAL)
    if untrained:
        raise RowError(WEIGHTLESS)
    messages = _system(row, messages) + messages
    defined = _tools(row)
    for side in (chosen, rejected):
        if not side or side[0]["role"] != "assistant":
            raise RowError(NO_ANSWER, "what is chosen and what is rejected begin with an assistant's turn")
        checked(messages + side, defined)
        _not_empty(side)
    _not_empty(messages)
    return Preference(messages, chosen, rejected, defined, where)


Sides = tuple[Messages, Messages, Messages, bool]  # the prompt, what is chosen, what is rejected; whether a chosen answer has the weight 0


def _sides(row: Row, pair: tuple[str, str], unused: Counter[str]) -> Sides:
    """Two answers that have names of their own."""
    untrained: tuple[int, ...] = ()
    if all(isinstance(row.values[key], str) and row.values[key].startswith("\n\nHuman:") for key in pair):
        chosen, rejected = (_human(row.take(key)) for key in pair)
    else:
        chosen, untrained = _continuation(row.take(pair[0]), pair[0], unused)
        rejected = _continuation(row.take(pair[1]), pair[1], unused)[0]
    if chosen[0]["role"] == "assistant":
        messages = _before(_prompt(row, unused)[0], chosen, rejected)
        return messages, chosen, rejected, bool(untrained)
    said = _said_before(row, unused)
    if said and said[0]["role"] == "system" not in (chosen[0]["role"], rejected[0]["role"]):
        chosen, rejected, untrained = said[:1] + chosen, said[:1] + rejected, tuple(i + 1 for i in untrained)
    start = bool(said) and said[0]["role"] != "system" == chosen[0]["role"]
    if _plain(said) != _plain(chosen[start : start + len(said)]):
        raise RowError(OTHER_PROMPT)
    messages, better, worse = _apart(chosen, rejected)
    return messages, better, worse, any(i >= len(messages) for i in untrained)


def _said_before(row: Row, unused: Counter[str]) -> Messages:
    """The turns beside whole conversations, which those say again but for a system prompt. A question in words alone may be any of
    theirs: it is passed over."""
    key = row.has(CONVERSATIONS) or row.has(PROMPTS)
    given = None if key is None else row.values[key]
    row.take(*CONVERSATIONS), row.take(*PROMPTS)
    return turns(given, key, unused)[0] if key and isinstance(given, list) and given and all(map(is_turn, given)) else []


def _before(messages: Messages, chosen: Messages, rejected: Messages) -> Messages:
    """The prompt without the one of the two answers that it ends with."""
    for side in (chosen, rejected):
        if _plain(messages[-len(side) :]) == _plain(side):
            return messages[: -len(side)]
    if messages and messages[-1]["role"] == "assistant":
        raise RowError(ANSWERED, "it is neither the chosen nor the rejected one; a prompt ends before the answer")
    return messages


def _beside_a_worse(row: Row, unused: Counter[str]) -> Sides:
    """A conversation, or a prompt and its answer, with a worse answer beside it; that may be the whole conversation, as it went worse."""
    messages, untrained = _prompt(row, unused)
    if row.has(CONVERSATIONS) is None:
        answer = row.has(ANSWERS)
        assert answer is not None
        said, more = _continuation(row.take(answer), answer, unused)
        untrained = (*untrained, *(i + len(messages) for i in more))
        messages = messages + said
    if not messages or messages[-1]["role"] == "user":
        raise RowError(NO_ANSWER, "the conversation ends without the better answer")
    worse = row.has(WORSE)
    assert worse is not None
    rejected = _continuation(row.take(worse), worse, unused)[0]
    if rejected[0]["role"] == "assistant":
        start = next((i + 1 for i in range(len(messages) - 1, -1, -1) if messages[i]["role"] == "user"), len(messages))
        before, chosen = messages[:start], messages[start:]
    else:
        if messages and messages[0]["role"] == "system" != rejected[0]["role"]:
            rejected = messages[:1] + rejected
        before, chosen, rejected = _apart(messages, rejected)
    return before, chosen, rejected, any(i >= len(before) for i in untrained)


def _apart(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Two whole conversations as what they share, and how each goes on."""
    if chosen == rejected:
        raise RowError(EQUAL)
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    while shared and not all(shared < len(side) and side[shared]["role"] == "assistant" for side in (chosen, rejected)):
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _human(said: str) -> Messages:
    """The turns of a text of HH-RLHF."""
    _, *parts = HUMAN.split(said)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": words} for name, words in zip(parts[::2], parts[1::2], strict=True)]


def _prompt(row: Row, unused: Counter[str]) -> tuple[Messages, tuple[int, ...]]:
    """What comes before the answer: a conversation so far, or history, instruction and what it is about."""
    key = row.has(CONVERSATIONS)
    if key is not None:
        return turns(row.take(key), key, unused)
    key = row.has(PROMPTS)
    if key is None:
        return [], ()
    given = row.take(key)
    if isinstance(given, Mapping) and "messages" in given:  # OpenAI's preferences: {"messages": ..., "tools": ...}
        if given.get("tools"):
            row.values.setdefault("tools", given["tools"])
        return turns(given["messages"], key, unused)
    past, untrained = turns(row.take("history"), "history", unused) if row.values.get("history") else ([], ())
    if isinstance(given, list | Mapping):
        messages, more = turns(given, key, unused)
        first = bool(messages) and messages[0]["role"] == "system"  # which stays the first
        marked = (*(i + first for i in untrained), *(i + len(past) if i >= first else i for i in more))
        return messages[:first] + past + messages[first:], marked
    about = row.has(tuple(one for one in CONTEXTS if one != key))
    parts = [text(given, key)] + ([text(row.take(about), about)] if about is not None else [])
    asked = question(*parts)
    if not asked.strip():
        raise RowError(NO_PROMPT, f"{key} is empty")
    return [*past, {"role": "user", "content": asked}], untrained


def question(*parts: str) -> str:
    """An instruction and what it is about as one text, a line behind the other, as the field's tools join them."""
    return "\n".join(part for part in parts if part)


def _continuation(value: Any, at: str, unused: Counter[str]) -> tuple[Messages, tuple[int, ...]]:
    """An answer as messages: a text, a message or a list of them. RowError for a list of texts."""
    if isinstance(value, list) and any(isinstance(one, str) for one in value):
        more = "write the one to learn as a text, or a better and a worse one as chosen and rejected"
        raise RowError(SEVERAL, f"{at} is a list of {len(value):,}: {more}")
    if isinstance(value, list | Mapping):
        messages, untrained = turns(value, at, unused)
        if not messages:
            raise RowError(NO_ANSWER, f"{at} is empty")
        return messages, untrained
    return [{"role": "assistant", "content": text(value, at)}], ()


def _system(row: Row, messages: Messages) -> Messages:
    """The row's own system prompt, unless the conversation has one."""
    key = row.has(SYSTEMS)
    given = None if key is None else row.values[key]
    if given and messages and messages[0]["role"] == "system":
        return []  # and the column is one without use
    row.take(*SYSTEMS)
    if not given:
        return []
    return [{"role": "system", "content": text(given, "system")}]


def _tools(row: Row) -> Tools | None:
    return tools(row.take("tools", "functions"), "tools")


def _label(row: Row) -> bool | None:
    """Whether an answer is wanted: true or false, also as a number or a text; other labels, such as a class's name, are no such thing."""
    key = row.has(LABELS)
    given = None if key is None else row.values[key]
    known = MEANT.get(str(given).lower()) if isinstance(given, bool | int | float | str) else None
    if key is not None and known is not None:
        row.take(key)
    return known


def _text(row: Row, where: str) -> Record | None:
    key = row.has(TEXTS)
    if key is None or "role" in row.values or not isinstance(row.values[key], str):
        return None
    return _document(row.take(key), where)


def _document(words: str, where: str) -> PlainText:
    if not words.strip():
        raise RowError(EMPTY_TEXT)
    return PlainText(words, where)


def checked(messages: Messages, defined: Tools | None) -> None:
    """ValueError where the renderer's own checks would refuse it."""
    read_messages(messages)
    read_tools(defined)


def _not_empty(messages: Messages) -> None:
    """RowError where a person asks nothing, or an assistant neither says nor calls anything."""
    for i, message in enumerate(messages):
        if message["role"] == "user" and not message["content"].strip():
            raise RowError(NO_PROMPT, f"message {i + 1} of {len(messages)}, the user's, has no text")
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise RowError(EMPTY_ANSWER, f"message {i + 1} of {len(messages)}")
