"""What a fine-tuning run would learn from, shown before it runs: the first examples token by token, lengths, what was left out.

Tokens that are learned are green, others grey, in two shades in turn so that borders show; where there is no terminal the learned ones
stand in brackets. What is left out: how long it will take (estimate.py), and the run itself.

    show(Console(), tokenizer, ids, mask)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from qwen2.post.finetuning.settings import SftSettings
    from qwen2.post.rows.examples import Examples
    from qwen2.tokenizer import Tokenizer

LEARNED, OTHER = ("green", "bold bright_green"), ("bright_black", "default")
BINS, WIDTH, BAR = 8, 40, "\u2588"
MOST_TOKENS = 400  # of an example that are shown


def show(console: Console, tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[bool]) -> None:
    """One example, token by token."""
    decoder, colour = tokenizer.decoder(), console.is_terminal
    text = Text()
    before = False
    for i, (id, learned) in enumerate(zip(ids[:MOST_TOKENS], mask[:MOST_TOKENS], strict=True)):
        if not colour and learned != before:
            text.append("[" if learned else "]")
        text.append(decoder.push(id), style=(LEARNED if learned else OTHER)[i % 2] if colour else None)
        before = learned
    text.append(decoder.flush())
    if before and not colour:
        text.append("]")
    if len(ids) > MOST_TOKENS:
        text.append(f"\n... and {len(ids) - MOST_TOKENS:,} more tokens", style="italic")
    console.print(text, soft_wrap=True, highlight=False)


def examples_shown(console: Console, tokenizer: Tokenizer, examples: Examples, count: int) -> None:
    """The first examples."""
    for index in range(min(count, len(examples))):
        ids, mask = examples.example(index)
        what = f"{len(ids):,} tokens, {sum(mask):,} learned"
        console.print(Text(f"--- {examples.where[index]}: {what}", style="bold"), soft_wrap=True, highlight=False)
        show(console, tokenizer, ids, mask)


def histogram(lengths: np.ndarray, length: int) -> list[str]:
    """How many examples have how many tokens, a line for each stretch of lengths up to a row."""
    top = min(length, int(lengths.max()))
    size = max(1, -(-top // BINS))
    counts = np.bincount((lengths - 1) // size)
    shown, digits = int(counts.max()), len(f"{len(counts) * size:,}")
    lines = []
    for bin, count in enumerate(counts):
        bar = BAR * max(round(WIDTH * count / shown), 1 if count else 0)
        lines.append(f"{bin * size + 1:>{digits},}-{min((bin + 1) * size, length):<{digits},} {bar} {count:,}")
    return lines


def rows_in_words(examples: Examples, settings: SftSettings, plan: Sequence[Sequence[int]]) -> str:
    """How the examples of an epoch fill its rows, as the first one is planned."""
    rows, (_, learned) = len(plan), examples.an_epoch(settings.text_epochs)
    tokens = int(examples.lengths[[index for row in plan for index in row]].sum())
    share = f"{tokens:,} tokens an epoch, {learned:,} of them learned ({learned / tokens:.0%})"
    if not settings.packing:
        return f"{share}; {rows:,} rows of an example each"
    return f"{share}; {rows:,} rows of {settings.length:,} tokens, {tokens / (rows * settings.length):.1%} full"
