"""Prompts from JSON lines or a JSON array: what is asked, what answers are judged by, and where each comes from.

What is asked is what training on the row reads before the answer (rows/formats.py): conversations of every kind, or `prompt`,
`question`, `instruction` and the like, with `history`, `input` or `context`, `system` and `tools`. The row's own answer, its last turn
or the better one of two, is left away, and is what is compared with where there is no column `answer`; `--prompt-column` and
`--answer-column` name others. `source`, `language` and `id` are kept for the summary and the rows; what a checker looks at is its own
business (checkers.py). Other columns are named once. Left out: files other than JSON, and rows that are texts.

    found = read_prompts([Path("sums.jsonl")], checker)
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2.post.rows.formats import ANSWERS, CONTEXTS, CONVERSATIONS, PAIRS, PROMPTS, WORSE, record
from qwen2.post.rows.readers import MARK
from qwen2.post.rows.records import Messages, PlainText, Preference, Skipped, Tools
from qwen2.post.rows.turns import turns
from qwen2.tokenizer.messages import read_messages

if TYPE_CHECKING:
    from qwen2.post.checks.checkers import Checker

ASKING = ("messages", "prompt", "question", "problem", "instruction")  # the usual ones
KEPT = {"source", "language", "id", "answer"}
OTHERS = frozenset(PROMPTS) - frozenset(CONTEXTS)  # what asks, beside a column that is named
OPEN = {"role": "assistant", "content": "?"}  # in the place of an answer, which a row that is learned from has


@dataclass(frozen=True)
class Prompt:
    """One prompt. `key` is made of its messages alone, and the seed of its answers of the key, whatever else is in the file."""

    key: str
    messages: list[dict[str, Any]]
    row: dict[str, Any]  # the whole row, for the checker
    source: str
    language: str
    where: str  # file:line
    tools: Tools | None = None  # which may be called

    @property
    def judged_by(self) -> str:
        """What tells rows apart that ask the same, such as by another answer."""
        return hashlib.blake2b(json.dumps(self.row, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass
class Prompts:
    """The prompts of some files, and what became of the rest of their rows."""

    found: list[Prompt] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)  # rows by what is wrong with them, where they are left out
    repeated: int = 0  # prompts that came before
    unused: tuple[str, ...] = ()  # columns that nobody looks at


def read_prompts(
    paths: Sequence[Path],
    checker: Checker,
    system: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    skip_broken: bool = False,
) -> Prompts:
    """Read and check all rows. `system` is put before each prompt that has none.

    Raises FileNotFoundError or ValueError: for a file without prompts, and for the first row that is broken unless those are left out.
    """
    prompts, keys, unused, first = Prompts(), set[str](), Counter[str](), ""
    for where, row in _rows(paths):
        try:
            if isinstance(row, ValueError):
                raise row
            prompt = _prompt(where, row, system, prompt_column, answer_column, unused)
            checker.prepare(prompt.row)
        except ValueError as error:
            first = first or f"{where}: {error}"
            prompts.broken[str(error)] += 1
            continue
        prompts.repeated += prompt.key in keys
        if prompt.key not in keys:
            keys.add(prompt.key)
            prompts.found.append(prompt)
    if first and not skip_broken:
        raise ValueError(f"{first} (rows that are broken: {prompts.broken.total():,}; mend them, or leave them out with --skip-broken)")
    if not prompts.found:
        raise ValueError(f"{', '.join(map(str, paths))}: no prompts" + (f"; {first}" if first else ""))
    prompts.unused = () if not checker.uses else tuple(sorted(unused.keys() - {*KEPT, answer_column} - checker.uses))
    return prompts


def _rows(paths: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Every row with its place; in place of one that is none, why."""
    for path in paths:
        with open(path, "rb") as file:
            begin = file.read(64)
            is_array = begin.removeprefix(MARK).lstrip().startswith(b"[")
            file.seek(len(MARK) if begin.startswith(MARK) else 0)
            rows = _array(path, file.read()) if is_array else file
            for number, row in enumerate(rows, start=1):
                if not isinstance(row, bytes) or row.strip():
                    yield f"{path}:{number}", _object(row)


def _array(path: Path, data: bytes) -> list[Any]:
    try:
        rows: list[Any] = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: begins as a JSON array and is none: {error}") from None
    return rows


def _object(row: Any) -> dict[str, Any] | ValueError:
    try:
        row = json.loads(row) if isinstance(row, bytes) else row
    except (ValueError, RecursionError) as error:
        return ValueError(f"no JSON: {error}")
    if not isinstance(row, dict):
        return ValueError("no JSON object")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return ValueError("half a character: a lone surrogate, which UTF-8 cannot write")
    return row


def _prompt(
    where: str, row: dict[str, Any], system: str | None, prompt_column: str | None, answer_column: str | None, unused: Counter[str]
) -> Prompt:
    row = dict(row)
    if answer_column is not None:
        if answer_column not in row:
            raise ValueError(f"the column {answer_column} is missing")
        row["answer"] = row[answer_column]
    messages, tools = _asked(row, prompt_column, unused)
    if system is not None and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    read = read_messages(messages)
    if read[-1].role not in ("user", "tool"):
        raise ValueError(f"the last message is the {read[-1].role}'s: nothing is asked")
    if not read[-1].content.strip():
        raise ValueError("an empty prompt")
    return Prompt(key_of(messages, tools), messages, row, _named(row, "source"), _named(row, "language"), where, tools)


def _asked(row: dict[str, Any], prompt_column: str | None, unused: Counter[str]) -> tuple[Messages, Tools | None]:
    """Messages and tools as training on this row reads them, up to the answer, which becomes the row's, where the row has no other."""
    given = {name.lower() if name.isupper() else name: value for name, value in row.items() if value is not None}
    if prompt_column is not None:
        if prompt_column not in row:
            raise ValueError(f"nothing is asked: a row needs {prompt_column}{_has(row)}")
        given = {name: value for name, value in given.items() if name not in (*CONVERSATIONS, *OTHERS, prompt_column)}
        unused.update(row.keys() & {*CONVERSATIONS, *OTHERS} - {prompt_column})
        given["prompt"] = row[prompt_column]
    listed = next((name for name in CONVERSATIONS if name in given), None)
    is_pair = any(given.keys() >= {*pair} for pair in PAIRS) or (listed is not None and any(name in given for name in WORSE))
    if not is_pair:
        if listed is None and not any(name in given for name in PROMPTS):
            raise ValueError(f"nothing is asked: a row needs {' or '.join(ASKING)}{_has(row)}")
        answers = [name for name in ANSWERS if name in given]
        _answer(row, [given.pop(name) for name in answers][:1])
        unused.update(answers[1:] if "answer" not in answers else {*answers} - {"answer"})
        if listed is None:
            given["output"] = OPEN["content"]
        else:
            found, _ = turns(given[listed], listed, unused)
            _answer(row, [found.pop()] if found and found[-1]["role"] == "assistant" else [])
            given[listed] = [*found, OPEN]
    made = record(given, "", unused)
    if isinstance(made, Skipped):
        of = "" if prompt_column is None else f" (the prompt is the column {prompt_column})"
        raise ValueError(f"{made.why}: {made.detail}{of}" if made.detail else f"{made.why}{of}")
    if isinstance(made, PlainText):
        raise ValueError("only the assistant speaks: nothing is asked")
    if isinstance(made, Preference):
        _answer(row, made.chosen[-1:])
        return made.messages, made.tools
    messages = made.messages[:-1]
    if listed is None and messages and messages[-1]["role"] == "assistant":
        _answer(row, [messages.pop()])
    return messages, made.tools


def _answer(row: dict[str, Any], found: Sequence[Any]) -> None:
    """Make what was found the row's answer, unless it has one: a text or a number, or the last of messages."""
    for value in found:
        last = value[-1] if isinstance(value, list) and value else value
        said = last.get("content") if isinstance(last, dict) else last
        if isinstance(said, str | int | float):
            row.setdefault("answer", said)


def _has(row: dict[str, Any]) -> str:
    return f"; it has {', '.join(sorted(row))}" if row else ""


def _named(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def key_of(messages: Sequence[dict[str, Any]], tools: Tools | None = None) -> str:
    """What tells prompts apart, whatever file and line they stand in."""
    text = json.dumps({"messages": messages, "tools": tools} if tools else messages, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
