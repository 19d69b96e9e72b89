"""Records as the examples of a run: encoded once, in flat arrays; what was left out and why, counted; a share held out.

A text longer than a row becomes pieces that overlap by one token, so that every token but the first is learned once. Whether an
example is held out follows from the tokens of what it asks alone: the same ones in every run, and answers to one prompt never on both
sides.

    found = collect(read(["data.jsonl"]), template, SftSettings(length=512))
    found.examples.row([0, 3])                              # one row of two examples
"""

# n examples, N tokens of all of them

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from qwen2.data.batches import IGNORE, Row
from qwen2.post.rows.account import Account, is_held
from qwen2.post.rows.encode import Encoded, TooLongError, encode
from qwen2.post.rows.packing import PackedRows
from qwen2.post.rows.reading import Reading
from qwen2.post.rows.records import Example, PlainText, Preference, Record, Skipped

if TYPE_CHECKING:
    from qwen2.post.finetuning.settings import SftSettings
    from qwen2.tokenizer import ChatTemplate

TOO_LONG, UNWANTED, NOTHING, REFUSED = (
    "longer than a row",
    "an unwanted answer (label false)",
    "nothing to learn",
    "refused by the template",
)


class Examples:
    """Ids and masks of all examples, end to end; `where` each came from."""

    def __init__(self) -> None:
        self.tokens, self.mask, self.ends = array("i"), bytearray(), array("q")
        self.where: list[str] = []
        self.texts: list[int] = []  # which of them are texts

    def add(self, ids: Sequence[int], mask: Sequence[bool], where: str, text: bool = False) -> None:
        """One more."""
        if text:
            self.texts.append(len(self))
        self.tokens.extend(ids)
        self.mask.extend(mask)
        self.ends.append(len(self.tokens))
        self.where.append(where)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each (n,) int64."""
        return np.diff(np.frombuffer(self.ends, np.int64), prepend=0) if len(self) else np.empty(0, np.int64)

    @property
    def targets(self) -> int:
        """Tokens that are learned, of all examples together: a first one never is."""
        starts = [0, *self.ends[:-1]] if len(self) else []
        return sum(self.mask) - sum(self.mask[start] for start in starts)

    def an_epoch(self, text_epochs: int) -> tuple[int, int]:
        """Tokens of an epoch, and how many of them are learned, on the average where texts are spread over so many."""
        lengths, left_out = self.lengths, 1 - 1 / text_epochs
        texts = int(lengths[self.texts].sum())
        return round(int(lengths.sum()) - left_out * texts), round(self.targets - left_out * (texts - len(self.texts)))

    def rows(self, settings: SftSettings) -> PackedRows:
        """The rows of a run."""
        s = settings
        return PackedRows(self.lengths, s.length, s.packing, s.seed, self.texts, s.text_epochs)

    def example(self, index: int) -> tuple[list[int], list[bool]]:
        """Ids and mask of one."""
        span = slice(self.ends[index - 1] if index else 0, self.ends[index])
        return list(self.tokens[span]), [bool(value) for value in self.mask[span]]

    def row(self, indices: Sequence[int]) -> Row:
        """These examples as one row: labels are each example's next tokens where they are learned, its last token has none."""
        tokens, labels = [], []
        for index in indices:
            span = slice(self.ends[index - 1] if index else 0, self.ends[index])
            ids = np.frombuffer(self.tokens[span], np.int32).astype(np.int64)
            learned = np.frombuffer(self.mask[span], np.uint8)[1:] > 0
            tokens.append(ids)
            labels.append(np.append(np.where(learned, ids[1:], IGNORE), IGNORE))
        return Row(np.concatenate(tokens), np.concatenate(labels), tuple(len(ids) for ids in tokens))

    def sha256(self) -> str:
        """Of ids, masks and borders: what a resumed run has to find again."""
        digest = hashlib.sha256()
        for part in (self.tokens, self.mask, self.ends):
            digest.update(part)
        return digest.hexdigest()


@dataclass
class Collected(Account):
    """The examples of a run, those that are held out, and an account of every row that was read."""

    examples: Examples = field(default_factory=Examples)
    held_out: Examples = field(default_factory=Examples)
    prompts: list[Example] = field(default_factory=list)  # held-out conversations, for samples
    first: list[Example] = field(default_factory=list)  # conversations of the data, where none is held out
    kinds: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """The account, for people."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())
        said = f"{kinds or 'nothing'} read; {len(self.examples):,} examples to learn from, {len(self.held_out):,} held out"
        return [said, *self.losses("conversations cut at the left of the prompt")]


KINDS = {Example: "conversations", Preference: "preferences (the chosen answer is learned)", PlainText: "texts"}


def collect(
    records: Iterable[Record],
    template: ChatTemplate,
    settings: SftSettings,
    evaluation: Iterable[Record] | None = None,
    reading: Reading | None = None,
) -> Collected:
    """All records as examples; those of `evaluation` are held out, and of the others the share that the settings say.

    ValueError where there is nothing to learn from, or nothing held out where that was asked for.
    """
    found, reading = Collected(), Reading() if reading is None else reading
    work = partial(encoded, template, settings)
    for records_of, held in ((records, False), (() if evaluation is None else evaluation, True)):
        for record, made in reading(work, records_of):
            _take(found, record, made, settings, held)
    if not len(found.examples):
        raise ValueError(f"there is nothing to learn from: {'; '.join(found.lines())}")
    if evaluation is not None and not len(found.held_out):
        raise ValueError(f"nothing of the data for evaluation can be used: {'; '.join(found.lines())}")
    if settings.eval_share and not len(found.held_out):
        raise ValueError(f"eval_share {settings.eval_share:g} of {len(found.examples):,} examples holds none out: take a larger share")
    return found


def encoded(template: ChatTemplate, settings: SftSettings, record: Record) -> Encoded | Skipped:
    """A record as ids and mask, or why it is left out."""
    if isinstance(record, Skipped):
        return record
    example = record.example() if isinstance(record, Preference) else record
    if isinstance(example, Example) and example.label is False:
        return Skipped(UNWANTED, record.where)
    try:
        made = encode(template, example, settings.length, settings.too_long == "cut", settings.last_turn)
    except TooLongError as error:
        return Skipped(TOO_LONG, record.where, str(error))
    except ValueError as error:
        return Skipped(REFUSED, record.where, str(error))
    return made if any(made.mask[1:]) else Skipped(NOTHING, record.where)


def _take(found: Collected, record: Record, made: Encoded | Skipped, settings: SftSettings, held: bool) -> None:
    """Put a record where it belongs."""
    if isinstance(made, Skipped):
        found.skip(made.why, made.where, made.detail)
        return
    example = record.example() if isinstance(record, Preference) else record
    found.kinds[KINDS[type(record)]] += 1
    found.cut += made.cut > 0
    found.cut_tokens += made.cut
    found.cut_answers += made.lost
    held = held or is_held(made.prompt, settings.eval_share)
    place = found.held_out if held else found.examples
    for ids, mask in pieces(made, settings.length):
        place.add(ids, mask, record.where, isinstance(example, PlainText))
    kept = found.prompts if held else found.first
    if isinstance(example, Example) and len(kept) < settings.samples:
        kept.append(example)


def pieces(made: Encoded, length: int) -> Iterable[tuple[list[int], list[bool]]]:
    """Ids and mask in parts of at most `length`, each beginning with the token that the one before ends with."""
    for start in range(0, max(len(made.ids) - 1, 1), length - 1):
        yield made.ids[start : start + length], made.mask[start : start + length]
