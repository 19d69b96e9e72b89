"""The live bar of a run says how far it is and how long it takes on terminals of any width."""

from __future__ import annotations

import io
import re
import sys

import pytest

from qwen2.train.progress import Progress, that_fit

LINE = {"step": 120, "tokens_per_s": 12345.6, "mfu": 0.62}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("columns", "there", "gone"),
    [
        (120, ["120/400", "loss 3.2109", "12,346 tokens/s", "62% of the products' rate", r"\d:\d\d gone", r"\d+:\d\d left"], []),
        (80, ["120/400", "loss 3.2109", "12,346 tokens/s", r"\d+:\d\d left"], ["products"]),
        (60, ["120/400", "loss 3.2109", r"\d+:\d\d left"], ["products", "tokens/s"]),
        (44, ["120/400", r"\d+:\d\d left"], ["loss"]),
    ],
)
def test_steps_and_the_time_left_are_never_cut(columns: int, there: list[str], gone: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with Progress(400, 0) as progress:
        progress.logged({**LINE, "loss": 3.2109})
        progress.step(120, 3.2109)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).replace("\r", "\n")
    last = next(line for line in reversed(text.splitlines()) if line.strip())
    assert len(last.rstrip()) <= columns
    for part in there:
        assert re.search(part, last), (part, last)
    assert not [part for part in gone if part in last]
    assert "\u2026" not in last, "nothing is cut"


def test_words_go_in_turn() -> None:
    words = ["1,000,000/2,000,000", "loss 1.0000", "9 tokens/s", "1:02:00 left"]
    assert that_fit(words, words[2:0:-1], 100) == "  ".join(words)
    assert that_fit(words, words[2:0:-1], 50) == "1,000,000/2,000,000  loss 1.0000  1:02:00 left"
    assert that_fit(words, words[2:0:-1], 10) == "1,000,000/2,000,000  1:02:00 left", "these always stay"
