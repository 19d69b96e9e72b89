"""The line that a conversation is typed into: keys pressed on a prompt without a screen."""

from __future__ import annotations

import io
from contextlib import suppress

import pyte
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.data_structures import Size
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from prompt_toolkit.output.vt100 import Vt100_Output

from qwen2.cli.chat import unquoted
from qwen2.cli.prompt import Commands, make_session, open_quote

TYPED = [
    ("hello\r", "hello"),
    ('"""a\rb"""\r', '"""a\rb"""'.replace("\r", "\n")),
    ("a\\\rb\r", "a\nb"),
    ("a\x1b\rb\r", "a\nb"),
    ("abc\x03def\r", "def"),
    ("\x1b[200~line one\nline \\\n/bye\x1b[201~\r", "line one\nline \\\n/bye"),
]


@pytest.mark.parametrize(("keys", "text"), TYPED)
def test_typing(tmp_path, keys, text):
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        assert make_session(tmp_path / "home" / "history").prompt() == text


@pytest.mark.parametrize(("keys", "error"), [("\x04", EOFError), ("\x03", KeyboardInterrupt)])
def test_ends_of_typing(tmp_path, keys, error):
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        with pytest.raises(error):
            make_session(tmp_path / "history").prompt()


@pytest.mark.parametrize("keys", ["\x04", "\x03", "\r"])
def test_placeholder_is_gone_from_a_line_that_is_left_empty(tmp_path, keys):
    """Else the scrollback shows it as if it had been typed."""
    drawn = io.StringIO()
    output = Vt100_Output(drawn, lambda: Size(rows=10, columns=60), term="xterm")
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=output), suppress(EOFError, KeyboardInterrupt):
        session = make_session(tmp_path / "history")
        session.app.after_render += lambda app: None if app.is_done else pipe.send_text(keys)
        session.prompt()
    screen = pyte.Screen(60, 10)
    assert "a message, or /help" in drawn.getvalue()
    pyte.Stream(screen).feed(drawn.getvalue())
    assert [line.rstrip() for line in screen.display if line.strip()] == [">>>"]


def test_history_is_kept_for_the_next_time_and_private(tmp_path):
    path = tmp_path / "home" / "history"
    for keys, text in (("first\r", "first"), ("\x1b[A\r", "first")):
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_text(keys)
            assert make_session(path).prompt() == text
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("text", "choices"), [
    ("/s", ["/set", "/system", "/show", "/save"]), ("/set ", ["parameter", "system", "format", "verbose"]),
    ("/set parameter top", ["top_k", "top_p"]), ("/show t", ["template"]), ("/set verbose o", ["on", "off"]), ("s", []), ("/x", []),
])  # fmt: skip
def test_completion(text, choices):
    found = [c.text for c in Commands().get_completions(Document(text), CompleteEvent())]
    assert found == choices


def test_completion_of_files(tmp_path):
    (tmp_path / "talk.json").touch()
    found = [c.text for c in Commands().get_completions(Document(f"/load {tmp_path}/ta"), CompleteEvent())]
    assert found == ["lk.json"]


@pytest.mark.parametrize(("text", "plain", "is_open"), [
    ("a", "a", False), ('"""', '"""', True), ('"""a', '"""a', True), ('"""a\nb"""', "a\nb", False), ('""""""', "", False),
    ('"""\ncode\n"""', "code", False), ('a """b"""', 'a """b"""', False), ('"""""', '"""""', True),
])  # fmt: skip
def test_triple_quotes(text, plain, is_open):
    assert unquoted(text) == plain
    assert open_quote(text) is is_open
