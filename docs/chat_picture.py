"""Draw docs/chat.svg: a real conversation in a real terminal, as its screen looks at the end.

The terminal is pyte's (a development dependency), the drawing rich's. What is left out: waiting times.

    python docs/chat_picture.py                # needs the default model, see `qwen2 pull`
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, ROWS = 100, 36
QUESTIONS = ("Write a Python function that checks whether a string is a palindrome.", "What is its complexity?")


def screen_of_a_conversation() -> pyte.Screen:
    """Ask the questions, wait for each answer's end, and give the screen."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    arguments = ["-m", "qwen2", "run", "--temperature", "0", "--max-tokens", "220"]
    child = pexpect.spawn(sys.executable, arguments, dimensions=(ROWS, COLUMNS), encoding="utf-8", timeout=120)

    def until_prompt() -> None:
        child.expect_exact("a message, or /help")
        stream.feed(child.before + child.after)

    until_prompt()
    for question in QUESTIONS:
        child.send(question)
        child.expect_exact(question[-5:])
        stream.feed(child.before + child.after)
        child.send("\r")
        until_prompt()
    child.close(force=True)
    return screen


def as_colour(name: str) -> str | None:
    """pyte's name of a colour, or its six hexadecimal digits, as rich writes it."""
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return name.replace("bright", "bright_").replace("brown", "yellow")


def as_text(screen: pyte.Screen) -> Text:
    """The screen with its colours."""
    text = Text()
    for y in range(screen.lines):
        for x in range(screen.columns):
            cell = screen.buffer[y][x]
            text.append(cell.data, Style(color=as_colour(cell.fg), bold=cell.bold, italic=cell.italics))
        text.append("\n")
    return text


def main() -> None:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere)
        console.print(as_text(screen_of_a_conversation()), end="")
    console.save_svg(str(Path(__file__).with_name("chat.svg")), title="qwen2 run")


if __name__ == "__main__":
    main()
