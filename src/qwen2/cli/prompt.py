"""The line that a conversation is typed into: history, several lines, completion, and the loop around it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.application.current import get_app
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.shortcuts import CompleteStyle

from qwen2.cli.answer import silent_keyboard
from qwen2.cli.chat import COMMANDS, SETTINGS, TOPICS
from qwen2.cli.sampling import KIND

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.key_binding import KeyPressEvent

    from qwen2.cli.chat import Chat

PLACEHOLDER = HTML("<ansibrightblack>a message, or /help</ansibrightblack>")
HINT = "(Ctrl-D or /bye ends the conversation)"


class Commands(Completer):
    """What can follow in a line that begins with a slash."""

    def __init__(self) -> None:
        self.paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        if not before.startswith("/"):
            return
        if before.startswith(("/save ", "/load ")):
            path = before[6:].lstrip()
            yield from self.paths.get_completions(Document(path, len(path)), complete_event)
            return
        *done, word = before.split(" ")
        yield from (Completion(choice, -len(word)) for choice in follow(done) if choice.startswith(word))


def follow(words: list[str]) -> Iterator[str]:
    """The words that may come after these."""
    choices: dict[tuple[str, ...], Iterable[str]] = {
        (): COMMANDS,
        ("/set",): SETTINGS,
        ("/set", "parameter"): KIND,
        ("/set", "verbose"): ("on", "off"),
        ("/show",): TOPICS,
    }
    yield from choices.get(tuple(words), ())


def open_quote(text: str) -> bool:
    '''Whether a text that begins with """ still lacks its end.'''
    stripped = text.strip()
    return stripped.startswith('"""') and not (len(stripped) >= 6 and stripped.endswith('"""'))


def make_bindings() -> KeyBindings:
    """Enter sends, unless the text is unfinished; Alt-Enter breaks the line; Ctrl-C clears it; Ctrl-G opens the editor."""
    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if open_quote(buffer.text):
            buffer.insert_text("\n")
        elif buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=Condition(lambda: bool(get_app().current_buffer.text)))
    def clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    @keys.add("c-g")
    def edit(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    return keys


def make_session(history: Path) -> PromptSession[str]:
    """A prompt that remembers what was typed, also the last times; where its file cannot be written, only this time."""
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600)
        past: FileHistory | InMemoryHistory = FileHistory(str(history))
    except OSError as error:
        print(f"note: no history is kept, {history} cannot be written ({error.strerror})", file=sys.stderr)
        past = InMemoryHistory()
    return PromptSession(
        HTML("<b>&gt;&gt;&gt;</b> "),
        history=past,
        multiline=True,
        prompt_continuation=lambda width, line, wraps: "    " if wraps else "... ",
        key_bindings=make_bindings(),
        completer=Commands(),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        enable_history_search=True,
        placeholder=lambda: "" if get_app().is_done else PLACEHOLDER,  # what scrolls away is what was typed
        tempfile_suffix=".md",
    )


def converse(chat: Chat, history: Path) -> None:
    """Read and answer until /bye or Ctrl-D. What is typed while an answer or a command is under way waits for the next prompt."""
    session = make_session(history)
    with silent_keyboard():
        while not chat.done:
            try:
                line = session.prompt()
                chat.handle(line)
            except KeyboardInterrupt:
                print(HINT)
                continue
            except EOFError:
                return
            if not chat.done and line.strip():
                print()
