"""Guess the next tokens and check all guesses in one step: an answer that repeats its prompt is written several tokens at a time.

Prompt lookup (arXiv:2304.04487 calls it inference with reference): where the last tokens stood before, what followed there is
guessed to follow again. The model reads guess and all, and a token is chosen from each row as if it had been read alone; the first
that differs from its guess ends the step's gain. Since a row's logits have the same bits in any company, the text is that of
plain decoding, greedy or drawn, to the last token; a network without kernels does not promise that, and does not guess.

How many are guessed follows how many were right, and so does how often. Left out: what a smaller model guesses where nothing is
found (draft.py), trees of guesses.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 4  # tokens by which a place is found; the longer match goes first
SHORTEST = 2
FIRST, MOST = 3, 32  # tokens guessed at first, and at most
TOGETHER = 4  # answers beside each other up to which guessing pays: beyond, arithmetic binds and a wrong guess costs as much as a token
LONGEST_PAUSE = 16  # tokens


class Lookup:
    """The places of one text where a few tokens stood last, and how far to trust them."""

    def __init__(self) -> None:
        self.ends: dict[tuple[int, ...], int] = {}  # a few tokens -> where the latest of them but the text's own end ends
        self.known = 0  # tokens of the text that are in it
        self.length, self.pause, self.skipped = FIRST, 0, 0

    def guess(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """What may follow the text; nothing where its end is new, or where guesses were wrong lately."""
        self._learn(tokens)
        if self.skipped < self.pause:
            self.skipped += 1
            return ()
        for length in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            end = self.ends.get(tuple(tokens[-length:]))
            if end is not None:
                period = len(tokens) - end  # what stood just before goes on as it did
                return tuple(tokens[end + i % period] for i in range(min(most, self.length)))
        return ()

    def _learn(self, tokens: Sequence[int]) -> None:
        """Take in all places that end before the text does."""
        for end in range(max(self.known, SHORTEST), len(tokens)):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self.ends[tuple(tokens[end - length : end])] = end
        self.known = len(tokens)

    def learn_from(self, offered: int, accepted: int) -> None:
        """So many of the guesses were right."""
        self.skipped = 0
        if accepted == offered:
            self.length, self.pause = min(MOST, 2 * self.length), 0
        elif accepted:
            self.length, self.pause = max(FIRST, accepted + 1), 0
        else:
            self.length, self.pause = FIRST, min(LONGEST_PAUSE, 2 * self.pause + 1)
