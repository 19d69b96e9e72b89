"""Preferences as what a run reads: prompts with two answers each, encoded once; what was left out and why, counted; a share held out.

An item is a prompt with two answers, the chosen one first. For KTO it is a prompt with its one answer and, second, the answer of another
prompt, by which the divergence from the reference is estimated; and whether its own is wanted. A pair gives KTO two such items.

Ids are the renderer's: of the prompt as the server would have it, and of the whole conversation behind it, up to the last token that
an assistant samples. Which prompts are held out follows from their tokens alone, so that one prompt is never on both sides.

    found = collect(read(["pairs.jsonl"]), template, DpoSettings(length=512))
    found.items.groups[0].answers
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qwen2.post.preference.branches import Answer, Group
from qwen2.post.rows.account import Account, is_held
from qwen2.post.rows.encode import TooLongError, opening
from qwen2.post.rows.reading import Reading
from qwen2.post.rows.records import Example, Messages, PlainText, Preference, Record, Skipped, Tools

if TYPE_CHECKING:
    from qwen2.post.preference.settings import DpoSettings
    from qwen2.tokenizer import ChatTemplate

TOO_LONG, EQUAL, REFUSED = "longer than --length", "chosen and rejected are the same tokens", "refused by the template"
NO_PAIR, NO_LABEL, TEXT = "no pair: one answer alone", "no label: one answer, and nobody said whether it is wanted", "a text, no answer"
WEIGHTLESS = "a last answer with the weight 0"


@dataclass
class Items:
    """Prompts with two answers each; `wanted` says of KTO's first answers whether they are, and is empty for pairs."""

    groups: list[Group] = field(default_factory=list)
    wanted: list[bool] = field(default_factory=list)
    where: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def tokens(self) -> int:
        """How many are computed, of all together."""
        return sum(group.tokens for group in self.groups)

    def sha256(self) -> str:
        """Of ids, masks, borders and labels: what a resumed run, or a cache, has to find again."""
        digest = hashlib.sha256(array("b", self.wanted).tobytes())
        for group in self.groups:
            for ids in (group.prompt, *(answer.ids for answer in group.answers)):
                digest.update(len(ids).to_bytes(8, "little") + array("i", ids).tobytes())
            for answer in group.answers:
                digest.update(bytes(answer.mask))
        return digest.hexdigest()


@dataclass
class Collected(Account):
    """The items of a run, those that are held out, and an account of every row that was read."""

    items: Items = field(default_factory=Items)
    held_out: Items = field(default_factory=Items)
    read: int = 0
    one_prompt: bool = False  # of KTO: there is no answer to another one

    def lines(self) -> list[str]:
        """The account, for people."""
        what = "answers with a label" if self.items.wanted else "pairs"
        said = f"{self.read:,} rows read: {len(self.items):,} {what} to learn from, {len(self.held_out):,} held out"
        alone = ["all have the same prompt: the divergence is estimated from other answers to it"] if self.one_prompt else []
        return [said, *self.losses("prompts cut at the left"), *alone]


def collect(
    records: Iterable[Record],
    template: ChatTemplate,
    settings: DpoSettings,
    evaluation: Iterable[Record] | None = None,
    reading: Reading | None = None,
) -> Collected:
    """All records as items; those of `evaluation` are held out, and of the others the share that the settings say.

    ValueError where there is nothing to learn from, or `evaluation` is given and nothing of it can be used.
    """
    found, reading = Collected(), Reading() if reading is None else reading
    work = partial(encoded, template, settings)
    for records_of, held in ((records, False), (() if evaluation is None else evaluation, True)):
        for record, made in reading(work, records_of):
            found.read += 1
            _take(found, record, made, settings, held)
    if settings.loss == "kto":
        for items, others in ((found.items, found.held_out), (found.held_out, found.items)):
            mismatch(items, others, settings.length)
        found.one_prompt = len({bytes(array("i", group.prompt)) for group in (*found.items.groups, *found.held_out.groups)}) == 1
    if not len(found.items):
        raise ValueError(f"there is nothing to learn from: {'; '.join(found.lines())}")
    if evaluation is not None and not len(found.held_out):
        raise ValueError(f"nothing of the data for evaluation can be used: {'; '.join(found.lines())}")
    return found


class Encoded(NamedTuple):
    """A prompt with its answers, how many tokens were cut off at its left, and the prompt before that."""

    group: Group
    cut: int
    prompt: Sequence[int]


def encoded(template: ChatTemplate, settings: DpoSettings, record: Record) -> Encoded | Skipped:
    """A record as ids, or why it is left out."""
    if isinstance(record, Skipped):
        return record
    single = settings.loss == "kto"
    if isinstance(record, PlainText) or (isinstance(record, Example) and (not single or record.label is None)):
        return Skipped(TEXT if isinstance(record, PlainText) else NO_LABEL if single else NO_PAIR, record.where)
    if isinstance(record, Example) and len(prompt_of(record)) in record.untrained:
        return Skipped(WEIGHTLESS, record.where)
    try:
        group, cut = group_of(template, record, settings.length, settings.too_long == "cut")
    except TooLongError as error:
        return Skipped(TOO_LONG, record.where, str(error))
    except ValueError as error:
        return Skipped(REFUSED, record.where, str(error))
    if len(group.answers) == 2 and group.answers[0].ids == group.answers[1].ids:
        return Skipped(EQUAL, record.where)
    return Encoded(group, cut, template.render(prompt_of(record), record.tools).ids if cut else group.prompt)


def _take(found: Collected, record: Record, made: Encoded | Skipped, settings: DpoSettings, held: bool) -> None:
    """Put a record where it belongs."""
    if isinstance(made, Skipped):
        found.skip(made.why, made.where, made.detail)
        return
    assert isinstance(record, Example | Preference)
    group, single = made.group, settings.loss == "kto"
    found.cut += made.cut > 0
    found.cut_tokens += made.cut
    items = found.held_out if held or is_held(made.prompt, settings.eval_share) else found.items
    labels = [record.label] if isinstance(record, Example) else [True, False]
    for groups, label in (
        [(Group(group.prompt, (a,)), b) for a, b in zip(group.answers, labels, strict=True)] if single else [(group, None)]
    ):
        items.groups.append(groups)
        items.where.append(record.where)
        items.wanted += [] if label is None else [label]


def group_of(template: ChatTemplate, record: Preference | Example, length: int | None = None, cut: bool = False) -> tuple[Group, int]:
    """A pair's prompt and two answers, or an example's last answer and what is before it; and how many tokens were cut off the prompt.

    TooLongError where the longest has more than `length` tokens (`cut`: where nothing asked is left), ValueError where the template
    refuses it or writes the prompt differently once it is answered.
    """
    prompt = prompt_of(record)
    sides = [record.chosen, record.rejected] if isinstance(record, Preference) else [record.messages[len(prompt) : len(prompt) + 1]]
    before = template.render(prompt, record.tools).ids
    answers = tuple(answer_of(template, prompt, side, record.tools, before) for side in sides)
    longest = max(len(answer.ids) for answer in answers)
    over = 0 if length is None else len(before) + longest - length
    if over > 0 and not cut:
        raise TooLongError(f"{len(before) + longest:,} tokens, at most {length:,} are taken")
    if over > 0 and over >= len(before) - (opens := opening(template)):
        raise TooLongError(f"its longer answer alone has {longest:,} tokens and {opens:,} that open it, at most {length:,} are taken")
    return Group(array("i", before[max(over, 0) :]), answers), max(over, 0)


def prompt_of(record: Preference | Example) -> Messages:
    """What is answered: of an example what comes before its last answer."""
    if isinstance(record, Preference):
        return record.messages
    return record.messages[: max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")]


def answer_of(template: ChatTemplate, prompt: Messages, side: Messages, tools: Tools | None, before: list[int]) -> Answer:
    """What follows the prompt's ids `before`, up to the last token that an assistant samples."""
    whole = template.render([*prompt, *side], tools, add_generation_prompt=False)
    if whole.ids[: len(before)] != before:
        raise ValueError("the template writes the prompt differently once it is answered")
    ids, mask = whole.ids[len(before) :], list(whole.mask[len(before) :])
    while mask and not mask[-1]:  # what stands between turns
        mask.pop()
    if not mask:
        raise ValueError("an answer without a token that is sampled")
    return Answer(array("i", ids[: len(mask)]), bytes(mask))


def mismatch(items: Items, others: Items, length: int) -> None:
    """Give each item of KTO a second answer: one to the next prompt that is another, as much of it as fits into `length` tokens.

    Of a pair the chosen answer gets the next pair's chosen one, the rejected answer its rejected one: the divergence is that of answers
    of either kind, as in a batch of trl's.
    Where these items have one prompt in all, it is an answer of the `others`, of which nothing is learned by that; where these have no
    other prompt either, the next answer to the same one.
    """
    groups = list(items.groups)
    after = following([bytes(array("i", group.prompt)) for group in groups])
    unlike = [group for group in others.groups if group.prompt != groups[0].prompt] if None in after else []
    rest = unlike or [*groups[1:], *others.groups, *groups[:1]]
    for i, (group, other) in enumerate(zip(groups, after, strict=True)):
        answer, room = (rest[i % len(rest)] if other is None else groups[other]).answers[0], length - len(group.prompt)
        items.groups[i] = Group(group.prompt, (group.answers[0], Answer(answer.ids[:room], answer.mask[:room])))


def following(values: Sequence[Any]) -> list[int | None]:
    """For each place one where another value stands, behind it, around the end: for the first of a run of equal values the first of the
    next run, for the second its second, and so on in turn; None where all are equal."""
    n = len(values)
    begins = [i for i in range(n) if values[i] != values[i - 1]]
    found: list[int | None] = [None] * n
    for begin, behind, end in zip(begins, begins[1:] + begins[:1], begins[2:] + begins[:2], strict=True):
        size = (end - behind) % n
        for k in range((behind - begin) % n):
            found[(begin + k) % n] = (behind + k % size) % n
    return found


def last_of(count: int, settings: DpoSettings) -> int | None:
    """Turns of a run over `count` items where its epochs end it, None where its steps do."""
    total = turns_of(count, settings.epochs)
    return total if settings.epochs and settings.steps == -(-total // settings.batch) else None


def turns_of(count: int, epochs: float) -> int:
    """Turns of so many epochs, at least one."""
    return max(1, round(epochs * count))


class Order:
    """Which items come when: every one once an epoch, in an order drawn from the seed and the epoch's number."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.drawn = count, seed, 0
        self.epoch, self.order = -1, list[int]()

    def __next__(self) -> int:
        index = self.at(self.drawn)
        self.drawn += 1
        return index

    def at(self, turn: int) -> int:
        """The item of a turn, counted from 0."""
        epoch, place = divmod(turn, self.count)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count).tolist()
        return self.order[place]

    def state(self) -> dict[str, Any]:
        """Where the walk stands, as JSON can hold it."""
        return {"drawn": self.drawn}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.drawn = int(state["drawn"])
