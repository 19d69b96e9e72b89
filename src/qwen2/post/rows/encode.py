"""Records as ids and mask, through the one renderer: what chat and server would read for the same conversation, to the token.

The mask is True exactly on what an assistant samples: its text, its calls and the token that ends its turn, never the prompt. Of a
plain text all tokens are learned, and the end of the text with them; how it is divided into rows is the caller's (examples.py).

A conversation longer than a row is an error of its own (`TooLongError`), which the caller counts. Only where it was asked for is it cut,
and then at its left: what remains are the renderer's last ids, and the last answer is among them whole, with something of what it
answers before it. Earlier answers that the cut goes through, or of whose prompt it leaves nothing, are not learned, and counted.

    encode(template, Example([...], None, "a.jsonl:1")).mask
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from qwen2.post.rows.records import Example, PlainText

if TYPE_CHECKING:
    from qwen2.tokenizer import ChatTemplate


class Encoded(NamedTuple):
    """Ids of a record, which of them are learned, how many were cut off at the left; what it asks, before any cut; answers lost by it.

    What it asks are the ids up to the first answer that the file wants learned; all of them where nobody asked, as in a text.
    """

    ids: list[int]
    mask: list[bool]
    cut: int
    prompt: list[int]
    lost: int = 0


class TooLongError(ValueError):
    """More tokens than a row has, or nothing left to learn once it were cut."""


def encode(
    template: ChatTemplate, record: Example | PlainText, length: int | None = None, cut: bool = False, last: bool = False
) -> Encoded:
    """Ids and mask of a record, a conversation's of at most `length` tokens where given; `last`: only its last answer is learned.

    Raises TooLongError where it has more (`cut`: where its last answer has), ValueError where the template refuses it.
    """
    if isinstance(record, PlainText):
        ids = [*template.tokenizer.encode(record.text), end_of_text(template)]
        return Encoded(ids, [True] * len(ids), 0, ids)
    rendered = template.render(record.messages, record.tools, add_generation_prompt=False)
    ids, mask = rendered.ids, list(rendered.mask)
    spans = answers(mask)
    turns = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
    meant = [turn for turn in turns if turn not in record.untrained and (not last or turn == turns[-1])]
    if len(meant) < len(turns):
        if len(turns) != len(spans):
            raise ValueError(f"the template writes {len(turns)} answers as {len(spans)}; which are meant cannot be told apart")
        for turn, (start, end) in zip(turns, spans, strict=True):
            if turn not in meant:
                mask[start:end] = [False] * (end - start)
    over = 0 if length is None else max(len(mask) - length, 0)
    kept = _fitted(template, mask, over, cut) if over else mask
    turn, start = next(((turn, start) for turn, (start, _) in zip(turns, spans, strict=False) if turn not in record.untrained), (0, 0))
    asked = any(message["role"] == "user" for message in record.messages[:turn])
    lost = len(answers(mask)) - len(answers(kept)) if over else 0
    return Encoded(ids[over:], kept, over, ids[:start] if asked else ids, lost)


def answers(mask: list[bool]) -> list[tuple[int, int]]:
    """Where each run of True begins and ends."""
    found, at = [], 0
    for value, run in groupby(mask):
        size = len(list(run))
        if value:
            found.append((at, at + size))
        at += size
    return found


def _fitted(template: ChatTemplate, mask: list[bool], over: int, cut: bool) -> list[bool]:
    """The mask of what remains without the first `over` tokens. TooLongError where that may not be, or leaves nothing to learn."""
    room = len(mask) - over
    if not cut:
        raise TooLongError(f"{len(mask):,} tokens, a row has {room:,}")
    spans, opens = answers(mask), opening(template)
    start = spans[-1][0] if spans else 0
    if over >= start - opens:
        raise TooLongError(f"its last answer alone has {len(mask) - start:,} tokens and {opens:,} that open it, a row has {room:,}")
    kept = list(mask)
    for start, end in spans:
        if over >= start - opens:
            kept[start:end] = [False] * (end - start)
    return kept[over:]


def opening(template: ChatTemplate) -> int:
    """Tokens that stand between what is asked and an answer: those in which the prompts of two questions end alike."""
    ends = [template.render([{"role": "user", "content": word}]).ids[::-1] for word in ("a", "b")]
    return next((i for i, (one, other) in enumerate(zip(*ends, strict=False)) if one != other), min(map(len, ends)))


def end_of_text(template: ChatTemplate) -> int:
    """The token that ends a document: <|endoftext|>, or what the vocabulary has in its place. ValueError where there is none."""
    tokenizer = template.tokenizer
    found = tokenizer.control.get("<|endoftext|>", tokenizer.pad if tokenizer.pad is not None else next(iter(tokenizer.eos), None))
    if found is None:
        raise ValueError("this vocabulary has no token that ends a text, which plain texts need; train on conversations alone")
    return found


def end_of_turn(template: ChatTemplate) -> int | None:
    """The control token with which an answer ends in this template; None where it ends with none."""
    rendered = template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], add_generation_prompt=False)
    last = [id for id, sampled in zip(rendered.ids, rendered.mask, strict=True) if sampled][-1]
    return last if template.tokenizer.is_control(last) else None
