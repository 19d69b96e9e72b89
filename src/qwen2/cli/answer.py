"""One answer on its way to the screen: Ctrl-C, the last words on stderr, the figures of --verbose.

The engine works in a thread of its own, so that Ctrl-C lands here and never in the middle of a step: it ends the answer, what there
is of it stays. While an answer is shown the keyboard does not echo into it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import closing, contextmanager
from dataclasses import fields
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Literal

from qwen2.engine.request import ResolvedParams, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from types import FrameType

    from qwen2.cli.partner import Partner
    from qwen2.cli.plain import Renderer
    from qwen2.engine.request import Chunk, Output

    Item = Chunk | BaseException | Literal["stop", "end"]
    Inbox = SimpleQueue[Item]

PATIENCE = 0.2  # seconds between looks at Ctrl-C on systems where it does not wake a waiting thread


def pieces(partner: Partner, messages: Sequence[Mapping[str, str]], params: SamplingParams, inbox: Inbox) -> Generator[Chunk]:
    """The chunks of an answer; after a "stop" in the inbox the last one's finish reason is "abort". Bad input raises before the first."""
    stream = partner.stream(messages, params)

    def work() -> None:
        try:
            for chunk in stream:
                inbox.put(chunk)
        except BaseException as error:  # handed over, and raised where it is waited for
            inbox.put(error)
        inbox.put("end")

    worker = threading.Thread(target=work, name="answer", daemon=True)
    worker.start()
    try:
        while (item := _next(inbox)) != "end":
            if item == "stop":
                partner.abort()
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        if worker.is_alive():
            partner.abort()
            worker.join()


def _next(inbox: Inbox) -> Item:
    while True:
        try:
            return inbox.get(timeout=PATIENCE)
        except Empty:
            continue


@contextmanager
def stop_on_interrupt() -> Iterator[Inbox]:
    """An inbox into which Ctrl-C puts "stop"; `SimpleQueue.put` may be called from a signal's handler."""
    inbox: Inbox = SimpleQueue()
    previous = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        inbox.put("stop")

    signal.signal(signal.SIGINT, stop)
    try:
        yield inbox
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def silent_keyboard() -> Iterator[None]:
    """Keys pressed meanwhile wait for the next prompt instead of showing up in the text. A job in the background has no keyboard."""
    if sys.platform == "win32" or not sys.stdin.isatty() or in_background(sys.stdin.fileno()):
        yield
        return
    import termios

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    quiet = termios.tcgetattr(keyboard)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        if not in_background(keyboard):  # sent there meanwhile: the shell has put its own settings back
            termios.tcsetattr(keyboard, termios.TCSANOW, before)


def in_background(terminal: int) -> bool:
    """Whether the shell has given the terminal to another job: changing its settings would stop this one."""
    if sys.platform == "win32":
        return False
    try:
        return os.tcgetpgrp(terminal) != os.getpgrp()
    except OSError:  # not the terminal that jobs are controlled from
        return False


@contextmanager
def working(text: str) -> Iterator[None]:
    """A spinner on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(text), spinner="dots"):
        yield


def show_answer(partner: Partner, messages: Sequence[Mapping[str, str]], params: SamplingParams, renderer: Renderer) -> Output:
    """Stream an answer to the renderer and return it whole."""
    output = None
    with stop_on_interrupt() as inbox, silent_keyboard(), closing(pieces(partner, messages, params, inbox)) as chunks:
        with working("reading the prompt"):
            chunk = next(chunks, None)
        while chunk is not None:
            renderer.push(chunk.text)
            output = chunk.output if chunk.output is not None else output
            chunk = next(chunks, None)
        renderer.close()
    assert output is not None, "the last chunk of every answer has the output"
    return output


def say_how_it_ended(output: Output, window: int) -> None:
    """On stderr, where an answer was cut."""
    if output.finish_reason == "abort":
        print("(stopped)", file=sys.stderr)
    elif output.finish_reason == "length":
        usage = output.usage
        full = usage.total_tokens >= window
        why = f"the window of {window:,} tokens is full" if full else f"max_tokens {usage.completion_tokens:,} reached"
        print(f"(cut: {why})", file=sys.stderr)


def figures(output: Output, partner: Partner) -> list[str]:
    """What --verbose prints: speed, memory, place, and the sampling really used."""
    usage, timings, used, about = output.usage, output.timings, output.params, partner.about
    read = usage.prompt_tokens - usage.cached_tokens
    cached = f" ({usage.cached_tokens:,} more cached)" if usage.cached_tokens else ""
    later = max(0, usage.completion_tokens - 1)  # the first token comes with the prompt
    return [
        f"prompt    {read:,} tokens{cached} in {timings.prompt_seconds:.2f} s{rate(read, timings.prompt_seconds)}",
        f"answer    {usage.completion_tokens:,} tokens in {timings.decode_seconds:.2f} s{rate(later, timings.decode_seconds)}",
        f"load      {partner.load_seconds:.2f} s, {partner.memory()}",
        f"device    {about.place}, {about.computing}",
        f"context   {usage.total_tokens:,} of {about.window:,} tokens",
        *partner.notes(),
        f"sampling  {', '.join(sampling_used(used))}",
    ]


def sampling_used(used: ResolvedParams) -> list[str]:
    """What shaped the distribution, and every other parameter that is not at rest."""
    always = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens")
    standard = ResolvedParams()
    names = [f.name for f in fields(SamplingParams) if f.name in always or getattr(used, f.name) != getattr(standard, f.name)]
    return [f"{name} {getattr(used, name)}" for name in names if getattr(used, name) is not None]


def rate(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:.1f} tokens/s" if tokens and seconds > 0 else ""
