"""A conversation in the terminal: what is typed goes to the model, what begins with a slash to `Chat`.

Left out: branches and editing of what was said; the web page has them.

    qwen2 run                     # /help shows what it can do
"""

from __future__ import annotations

import shlex
import sys
import traceback
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from qwen2.cli.answer import figures, say_how_it_ended, show_answer
from qwen2.cli.app import one_line, take_debug
from qwen2.cli.conversation import Conversation, Turn, read_conversation
from qwen2.cli.plain import neutralise
from qwen2.cli.sampling import KIND, change, read_form
from qwen2.engine.request import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable

    from qwen2.cli.partner import Partner
    from qwen2.cli.plain import Renderer

TOPICS = ("info", "parameters", "system", "template", "context", "history")
SETTINGS = ("parameter", "system", "format", "verbose")
SET = "/set parameter NAME VALUE, /set system TEXT, /set format json, or /set verbose on|off"


@dataclass(frozen=True)
class Command:
    """A slash command: how it is written, what it does, and the method of `Chat` that does it."""

    usage: str
    help: str
    method: str


COMMANDS = {
    "/set": Command("/set parameter NAME VALUE", "Change the sampling (VALUE default: the model's)", "set"),
    "/system": Command("/system [TEXT]", "Set the system prompt, or show it", "system"),
    "/show": Command("/show [TOPIC]", "Show the model, or " + ", ".join(TOPICS[1:4]) + ",\n" + " " * 30 + ", ".join(TOPICS[4:]), "show"),
    "/retry": Command("/retry", "Answer the last question anew", "retry"),
    "/save": Command("/save FILE", "Write the conversation to a file", "save"),
    "/load": Command("/load FILE", "Go on with a saved conversation", "load"),
    "/clear": Command("/clear", "Forget what was said", "clear"),
    "/help": Command("/help", "Show this (also /?)", "help"),
    "/bye": Command("/bye", "End (also /exit, /quit, Ctrl-D)", "bye"),
}
ALIASES = {"/?": "/help", "/exit": "/bye", "/quit": "/bye"}
MORE_HELP = """  /set system TEXT            Set the system prompt (TEXT default: the model's)
  /set format json            Hold answers to JSON, or to the JSON schema in a
                              file (default: free text)
  /set verbose on|off         Say how fast an answer was, and on what

  \"\"\" ... \"\"\"                 A text of several lines; Alt-Enter, and \\ at the
                              end of a line, break it too
  Ctrl-C                      Stop the answer, or clear the line
  Ctrl-G                      Write in your editor ($EDITOR)
  Ctrl-R, Up                  Search what you typed earlier"""


class Chat:
    """One conversation with one model. `handle` is the whole of it, without the terminal."""

    def __init__(self, partner: Partner, conversation: Conversation, make_renderer: Callable[[], Renderer], verbose: bool = False) -> None:
        self.partner, self.conversation, self.make_renderer, self.verbose = partner, conversation, make_renderer, verbose
        self.done = False

    def handle(self, line: str) -> None:
        """Do what was typed. Errors are shown, and the conversation stays as it was."""
        text = unquoted(line)
        if not text.strip():
            return
        try:
            if line.startswith("/"):
                self.command(line)
            else:
                self.ask(text)
        except (ValueError, OSError, ArithmeticError) as error:
            say(f"error: {one_line(error)}", sys.stderr)
        except (RuntimeError, MemoryError) as error:  # torch's own, memory that ran out: the next question may fare better
            if take_debug(sys.argv[1:])[0]:
                traceback.print_exc()
            say(f"error: unexpected {type(error).__name__}: {one_line(error)}; the conversation stays as it was", sys.stderr)

    def ask(self, text: str) -> None:
        """Put a question and show the answer."""
        self.answer(self.conversation.turns, text)

    def answer(self, before: list[Turn], text: str) -> None:
        """Answer the question that follows these turns. Where there is no answer, the conversation stays as it was."""
        asked = [*before, Turn("user", text)]
        renderer = self.make_renderer()
        try:
            output = show_answer(self.partner, replace(self.conversation, turns=asked).messages, self.conversation.params, renderer)
        except ValueError as error:
            if not before or not any(bound in str(error) for bound in ("the window is", "num_ctx is")):
                raise
            raise ValueError(f"{error}; the question is not asked: /clear starts anew, /save FILE keeps what was said") from None
        except (OSError, ArithmeticError, RuntimeError, MemoryError):
            renderer.close()  # what there is of the answer ends its line, the error begins one
            raise
        if output.text or output.finish_reason != "abort":
            self.conversation.turns = [*asked, Turn("assistant", output.text, output.finish_reason == "abort")]
        say_how_it_ended(output, self.partner.about.window)
        if self.verbose:
            say("\n".join(figures(output, self.partner)), sys.stderr)

    def command(self, line: str) -> None:
        """Find the command by its first word and hand it the rest of the line."""
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        name = ALIASES.get(word.lower(), word.lower())
        if name not in COMMANDS:
            hint = hint_for(name, rest)
            raise ValueError(f"no command {word}: {hint} (a text that begins with / is sent with a space before it)")
        if rest and " " not in COMMANDS[name].usage:
            raise ValueError(f"{name} {rest}: {name} takes no words after it")
        getattr(self, COMMANDS[name].method)(rest)

    # --- commands: each gets the text behind its name

    def set(self, rest: str) -> None:
        what, _, value = rest.partition(" ")
        what, value = what.lower(), value.strip()
        if what == "parameter":
            self._set_parameter(value)
        elif what == "system":
            self.system(value)
        elif what == "format":
            self.conversation.params = replace(self.conversation.params, constraint=read_form(value or None))
            say(f"format: {value or 'default'}")
        elif what == "verbose":
            if value.lower() not in ("on", "off"):
                raise ValueError(f"/set verbose {value}: must be on or off")
            self.verbose = value.lower() == "on"
            say(f"verbose: {'on' if self.verbose else 'off'}")
        elif what.replace("-", "_") in KIND:  # the word "parameter" can be left out
            self._set_parameter(rest)
        else:
            close = get_close_matches(what, [*SETTINGS, *KIND], n=1)
            hint = f"/set {what}: did you mean {close[0]}? It is " if close else f"/set {what}: unknown; it is " if what else ""
            raise ValueError(f"{hint}{SET}")

    def _set_parameter(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        name, value = name.lower(), value.strip()
        if not value:
            raise ValueError(f"/set parameter NAME VALUE; the names: {', '.join(KIND)}")
        self.conversation.params = change(self.conversation.params, name, value)
        say(f"{name}: {spelled(getattr(self.conversation.params, name.replace('-', '_')))}")

    def system(self, rest: str) -> None:
        if rest:
            self.conversation.system = None if rest == "default" else unquoted(rest)
        system = self.conversation.system
        own = self.partner.about.system
        say(f"system: {system}" if system is not None else f"system: (the model's own) {own or 'none'}")

    def show(self, rest: str) -> None:
        topic = rest.lower() or "info"
        if topic not in TOPICS:
            raise ValueError(f"/show {rest}: there are {', '.join(TOPICS)}")
        getattr(self, f"_show_{topic}")()

    def _show_info(self) -> None:
        about = self.partner.about
        say(f"model     {about.name} ({about.where})")
        say(f"shape     {about.shape}")
        say(f"weights   {about.weight_format}, computed in {about.dtype}")
        say(f"device    {about.place}")
        self._show_context()

    def _show_parameters(self) -> None:
        params = self.conversation.params
        used = params.resolve(self.partner.about.generation)
        for name in KIND:
            given, value = getattr(params, name), getattr(used, name)
            if name == "seed" and given is None:
                value = "drawn anew for each answer"
            if name == "max_tokens" and value is None:
                value = "to the end of the window"
            origin = " (the model's)" if given is None and getattr(self.partner.about.generation, name, None) is not None else ""
            say(f"{name:<20} {spelled(value)}{origin}")

    def _show_system(self) -> None:
        self.system("")

    def _show_template(self) -> None:
        print(neutralise(self.partner.about.template))

    def _show_context(self) -> None:
        messages = self.conversation.messages
        count = self.partner.count(messages) if messages else 0
        say(f"context   {count:,} of {self.partner.about.window:,} tokens used")

    def _show_history(self) -> None:
        for turn in self.conversation.turns:
            say(f"{turn.role}{' (stopped)' if turn.stopped else ''}: {turn.content}")

    def save(self, rest: str) -> None:
        path = file_of("/save", rest)
        self.conversation.save(path)
        say(f"saved {count_of(self.conversation)} to {path}")

    def load(self, rest: str) -> None:
        path = file_of("/load", rest)
        loaded = read_conversation(path)
        if loaded.model != self.conversation.model:
            say(f"note: it was held with {loaded.model}, and goes on with {self.conversation.model}", sys.stderr)
            loaded.model = self.conversation.model
        self.conversation = loaded
        say(f"loaded {count_of(loaded)} from {path}; /show history shows them. With them came:")
        self.system("")
        say(f"parameters: {', '.join(changed(loaded.params)) or 'as the model has them'}")

    def clear(self, rest: str) -> None:
        self.conversation.turns.clear()
        say("forgotten; system prompt and parameters stay")

    def retry(self, rest: str) -> None:
        turns = self.conversation.turns
        last = max((k for k, turn in enumerate(turns) if turn.role == "user"), default=None)
        if last is None:
            raise ValueError("/retry: there is no question yet that could be answered anew")
        self.answer(turns[:last], turns[last].content)

    def help(self, rest: str) -> None:
        for command in COMMANDS.values():
            print(f"  {command.usage:<27} {command.help}")
        print(MORE_HELP)

    def bye(self, rest: str) -> None:
        self.done = True


def say(text: str, file: TextIO | None = None) -> None:
    """Print a message; on a terminal its lines break between words, and control characters show."""
    file = sys.stdout if file is None else file
    if not file.isatty():
        print(neutralise(text), file=file)
        return
    from rich.console import Console
    from rich.text import Text

    Console(file=file, highlight=False).print(Text(neutralise(text)))


def hint_for(name: str, rest: str) -> str:
    """What somebody may have meant who wrote a command that there is not."""
    word = name[1:].replace("-", "_")
    if word == "verbose":
        return f"did you mean /set verbose {'off' if rest.lower() == 'off' else 'on'}?"
    if word in KIND:
        return f"did you mean /set parameter {word} {rest or 'VALUE'}?"
    if word in TOPICS:
        return f"did you mean /show {word}?"
    close = get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "/help shows what there is"


def changed(params: SamplingParams) -> list[str]:
    """The parameters that are not left to the model."""
    standard = SamplingParams()
    return [f"{name} {spelled(getattr(params, name))}" for name in KIND if getattr(params, name) != getattr(standard, name)]


def unquoted(text: str) -> str:
    '''The text between """ and """, or the text itself.'''
    stripped = text.strip()
    quoted = len(stripped) >= 6 and stripped.startswith('"""') and stripped.endswith('"""')
    return stripped[3:-3].strip("\n") if quoted else text


def spelled(value: object) -> str:
    """A parameter's value for people."""
    if value is None:
        return "the model's own"
    if value in ((), {}):
        return "none"
    return ("on" if value else "off") if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)


def count_of(conversation: Conversation) -> str:
    number = len(conversation.turns)
    return f"{number} message{'' if number == 1 else 's'}"


def file_of(command: str, rest: str) -> Path:
    """The one file that is named, quoted or not."""
    try:
        words = shlex.split(rest) if rest[:1] in "'\"" else [rest]
    except ValueError as error:
        raise ValueError(f"{command} {rest}: {error}") from None
    if len(words) != 1 or not words[0]:
        raise ValueError(f"{command} FILE: name a file")
    try:
        return Path(words[0]).expanduser()
    except RuntimeError:
        raise ValueError(f"{command} {words[0]}: nobody of that name has a home folder here") from None
