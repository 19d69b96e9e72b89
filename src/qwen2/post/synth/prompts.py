"""Prompts from JSON lines or a JSON array: what is asked, what answers are judged by, and where each comes from.

What is asked is `messages` (up to the last turn of a person; an assistant's behind it is the answer, where no column is), `prompt` (a
text or messages), `question`, `problem`, or `instruction` with `input`; `--prompt-column` and `--answer-column` name others. `source`,
`language` and `id` are kept for the summary and the rows; what a checker looks at is its own business (checkers.py). Other columns are
named once. Left out: conversations with tools.

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

from qwen2.post.rows.formats import question
from qwen2.post.rows.turns import WEIGHTS
from qwen2.tokenizer.messages import read_messages

if TYPE_CHECKING:
    from qwen2.post.checks.checkers import Checker

ASKING = ("messages", "prompt", "question", "problem", "instruction")
KEPT = {"source", "language", "id", "input", "system"}


@dataclass(frozen=True)
class Prompt:
    """One prompt. `key` is made of its messages alone, and the seed of its answers of the key, whatever else is in the file."""

    key: str
    messages: list[dict[str, Any]]
    row: dict[str, Any]  # the whole row, for the checker
    source: str
    language: str
    where: str  # file:line

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
    prompts, keys, columns, first = Prompts(), set[str](), set[str](), ""
    for where, row in _rows(paths):
        try:
            if isinstance(row, ValueError):
                raise row
            prompt = _prompt(where, row, system, prompt_column, answer_column)
            checker.prepare(prompt.row)
        except ValueError as error:
            first = first or f"{where}: {error}"
            prompts.broken[str(error)] += 1
            continue
        columns |= row.keys()
        prompts.repeated += prompt.key in keys
        if prompt.key not in keys:
            keys.add(prompt.key)
            prompts.found.append(prompt)
    if first and not skip_broken:
        raise ValueError(f"{first} (rows that are broken: {prompts.broken.total():,}; mend them, or leave them out with --skip-broken)")
    if not prompts.found:
        raise ValueError(f"{', '.join(map(str, paths))}: no prompts" + (f"; {first}" if first else ""))
    known = {*ASKING, *KEPT, "answer", prompt_column, answer_column}
    prompts.unused = () if not checker.uses else tuple(sorted(columns - known - checker.uses))
    return prompts


def _rows(paths: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Every row with its place; in place of one that is none, why."""
    for path in paths:
        with open(path, "rb") as file:
            is_array = file.read(64).lstrip().startswith(b"[")
            file.seek(0)
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


def _prompt(where: str, row: dict[str, Any], system: str | None, prompt_column: str | None, answer_column: str | None) -> Prompt:
    row = dict(row)
    if answer_column is not None:
        if answer_column not in row:
            raise ValueError(f"the column {answer_column} is missing")
        row["answer"] = row[answer_column]
    messages = _messages(row, prompt_column)
    if messages[-1].get("role") == "assistant":
        row.setdefault("answer", messages[-1].get("content"))
        messages = messages[:-1]
    own = row.get("system")
    before = own if isinstance(own, str) and own else system
    if before is not None and (not messages or messages[0].get("role") != "system"):
        messages = [{"role": "system", "content": before}, *messages]
    turns = read_messages(messages)
    if turns[-1].role not in ("user", "tool"):
        raise ValueError(f"the last message is the {turns[-1].role}'s: nothing is asked")
    if not turns[-1].content.strip():
        raise ValueError("an empty prompt")
    return Prompt(key_of(messages), messages, row, _named(row, "source"), _named(row, "language"), where)


def _messages(row: dict[str, Any], prompt_column: str | None) -> list[dict[str, Any]]:
    names = ASKING if prompt_column is None else (prompt_column,)
    name = next((name for name in names if name in row), None)
    if name is None:
        has = f"; it has {', '.join(sorted(row))}" if row else ""
        raise ValueError(f"nothing is asked: a row needs {' or '.join(names)}{has}")
    asked = row[name]
    if isinstance(asked, list) and asked and all(isinstance(message, dict) for message in asked):
        return [{key: value for key, value in message.items() if key not in WEIGHTS} for message in asked]  # training's business
    if not isinstance(asked, str):
        raise ValueError(f"{name} is {type(asked).__name__}: must be a text or a list of messages")
    more = row.get("input") if name == "instruction" else None
    return [{"role": "user", "content": question(asked, more) if isinstance(more, str) else asked}]


def _named(row: dict[str, Any], name: str) -> str:
    value = row.get(name, "")
    return value if isinstance(value, str) else json.dumps(value)


def key_of(messages: Sequence[dict[str, Any]]) -> str:
    """What tells prompts apart, whatever file and line they stand in."""
    text = json.dumps(messages, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
