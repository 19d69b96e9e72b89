"""Where an answer's text ends: token ids become text that never shows half a character or the beginning of a stop string.

Text that could still become a stop string is held back, even when it is spread over many tokens; so the pieces that were shown
are a prefix of the final text, whatever the tokens' boundaries. Special tokens have no text, as in transformers.

    text = AnswerText(tokenizer, hidden=frozenset({151645}), stop=("END",))
    text.push(token)                             # what may be shown now
    text.stopped                                 # the stop string that was found, or None
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen2.tokenizer import Tokenizer


class StopMatcher:
    """Finds the stop string that is complete first, in text that comes in pieces; the cuts between pieces do not matter."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.longest = max(map(len, stops), default=0)
        self.held = ""  # the longest suffix of the text so far that begins a stop string
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that is safe to show; once a stop string is found, what stood before it, and nothing ever after."""
        if self.found is not None:
            return ""
        text = self.held + piece
        ends = [(place + len(stop), place, stop) for stop in self.stops if (place := text.find(stop)) >= 0]
        if ends:
            _, place, self.found = min(ends)  # the first to be complete; of those the longest
            self.held = ""
            return text[:place]
        keep = self._held_length(text)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _held_length(self, text: str) -> int:
        for length in range(min(self.longest - 1, len(text)), 0, -1):
            suffix = text[-length:]
            if any(stop.startswith(suffix) for stop in self.stops):
                return length
        return 0

    def flush(self) -> str:
        """The end: what was held back is text after all."""
        held, self.held = self.held, ""
        return held


class AnswerText:
    """One answer's text, growing token by token."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int], stop: Sequence[str]) -> None:
        self.hidden = hidden  # ids without text
        self.decoder = tokenizer.decoder()
        self.matcher = StopMatcher(stop)
        self.pieces: list[str] = []

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self.matcher.found

    def push(self, token: int) -> str:
        """The text that this token lets be shown."""
        return "" if token in self.hidden else self._keep(self.matcher.push(self.decoder.push(token)))

    def flush(self) -> str:
        """What was held back, at the end; an unfinished character becomes U+FFFD."""
        return self._keep(self.matcher.push(self.decoder.flush()) + self.matcher.flush())

    def _keep(self, piece: str) -> str:
        self.pieces.append(piece)
        return piece

    def whole(self) -> str:
        """All that was shown."""
        return "".join(self.pieces)
