"""`qwen2 run`: an answer, or a conversation.

torch is imported after the command line, the model's name and the prompt have been found to be in order.
"""

from __future__ import annotations

import gc
import os
import re
import shlex
import sys
import time
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from qwen2.cli.pull import ensure, make_store
from qwen2.cli.sampling import Flags, params_of
from qwen2.weights.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwen2.cli.plain import Renderer
    from qwen2.engine.llm import LLM
    from qwen2.engine.request import SamplingParams

NAME_OR_PATH = re.compile(r"[\w.:@~/\\+-]+", re.ASCII)
NO_FLAGS = Flags()
Switch = Annotated[bool, Parameter(negative=())]


def run(
    *words: Annotated[str, Parameter(show_default=False)],
    system: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    cache_bits: Literal[16, 8] = 16,
    isa: Literal["avx512", "avx2", "neon", "none"] | None = None,
    draft: str | None = None,
    plain: Switch = False,
    verbose: Switch = False,
    sampling: Annotated[Flags, Parameter(name="*")] = NO_FLAGS,
) -> int:
    """Ask a model, or have a conversation with it.

    Examples: qwen2 run | qwen2 run qwen2:7b "Explain GQA in one paragraph" | git diff | qwen2 run "Describe this change"

    Parameters
    ----------
    words
        The model (a name, a folder or a file; may be left out) and the prompt, to which is added what comes through a pipe.
    system
        The system prompt, in place of the model's own.
    device
        cpu, cuda or cuda:N.
    dtype
        What to compute in: auto (the file's own type), float32, bfloat16 or float16.
    threads
        CPU threads; left out, as many as there are physical cores.
    context
        A window shorter than the model's own.
    cache_bits
        Bits of the keys and values that are kept of what was read; 8 halve the memory and cost a little accuracy. CPU only.
    isa
        The kernels' instruction set; left out, the best that this processor has. With none torch computes, several times slower.
    draft
        A smaller model of the same tokens that guesses what comes: no text changes, most come sooner.
    plain
        Show the text as the model wrote it, not as rendered Markdown.
    verbose
        Say on stderr how fast it was, on what, with how much memory, and what sampling was used.
    sampling
        How tokens are chosen and when to stop. What is left out is the model's own default.
    """
    params = params_of(sampling)
    model, given = split_words(words)
    check_model(model, words)
    prompt = join_prompt(given)
    if draft is not None:
        check_model(draft, ())
        ensure(draft)
    ensure(model)
    llm, load_seconds = load_model(model, device, dtype, threads, context, cache_bits, isa, draft)
    if prompt is not None:
        return answer_once(llm, prompt, system, params, plain, verbose, load_seconds)
    talk(llm, system, params, plain, verbose, load_seconds)
    return 0


def split_words(words: Sequence[str]) -> tuple[str, str | None]:
    """Model and prompt. A first word that cannot be a model's name or path belongs to the prompt, and the model is the default one."""
    if not words:
        return DEFAULT_MODEL, None
    if NAME_OR_PATH.fullmatch(words[0]) or (words[0] and os.path.exists(words[0])):
        return words[0], " ".join(words[1:]) if words[1:] else None
    return DEFAULT_MODEL, " ".join(words)


def join_prompt(given: str | None) -> str | None:
    """The prompt with what comes through a pipe below it; None where neither is there and a conversation is wanted."""
    if sys.stdin.isatty():
        if given is None and not sys.stdout.isatty():
            raise ValueError("a conversation needs a terminal, and the output goes elsewhere: give a prompt, as in qwen2 run MODEL PROMPT")
        if given is not None and not given.strip():
            raise ValueError("the prompt is empty: write a question behind the model's name, or nothing for a conversation")
        return given
    texts = [text for text in (given, read_stdin()) if text is not None and text.strip()]
    if not texts:
        raise ValueError("the prompt is empty: nothing was given and nothing came through the pipe; qwen2 run MODEL PROMPT asks a question")
    return "\n\n".join(texts)


def read_stdin() -> str:
    """All of standard input, which must be UTF-8."""
    raw = sys.stdin.buffer.read()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text: byte {raw[error.start]:#04x} at position {error.start:,}") from None


def check_model(model: str, words: Sequence[str]) -> None:
    """An unknown name is an error that also says how to ask a single word. A known one may still have to be pulled."""
    store = make_store()
    try:
        store.resolve(model)
    except FileNotFoundError:
        if store.is_path(model) or store.has(model):
            raise
    except ValueError as error:
        if words and re.fullmatch(r"[A-Za-z]+", model):
            raise ValueError(f"{error}; if it is a question: qwen2 run {DEFAULT_MODEL} {shlex.quote(' '.join(words))}") from None
        raise


def load_model(
    model: str,
    device: str,
    dtype: str,
    threads: int | None,
    context: int | None,
    cache_bits: int,
    isa: str | None,
    draft: str | None = None,
) -> tuple[LLM, float]:
    """The model, and the seconds that it took."""
    from qwen2.cli.answer import working
    from qwen2.cli.lean import import_torch

    start = time.perf_counter()
    gc.disable()  # a million objects are made that all stay: each search for garbage would visit them
    with working(f"loading {model}"):
        if device == "cpu":
            import_torch()
        from qwen2.engine.llm import LLM

        llm = LLM(model, device=device, dtype=dtype, threads=threads, context=context, cache_bits=cache_bits, isa=isa, draft=draft)
    gc.freeze()
    gc.enable()
    return llm, time.perf_counter() - start


def make_renderer(plain: bool) -> Renderer:
    """Markdown where a person reads, plain text where a program does."""
    from qwen2.cli.plain import PlainStream

    if plain or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return PlainStream()
    from rich.console import Console

    from qwen2.cli.render import MarkdownStream

    console = Console()
    return PlainStream() if console.legacy_windows else MarkdownStream(console)  # a console that would print the escapes as text


def answer_once(llm: LLM, prompt: str, system: str | None, params: SamplingParams, plain: bool, verbose: bool, load_seconds: float) -> int:
    """Print the answer; 130 where Ctrl-C ended it."""
    from qwen2.cli.answer import figures, say_how_it_ended, show_answer

    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        output = show_answer(llm, messages, params, make_renderer(plain))
    except ArithmeticError as error:
        raise ValueError(str(error)) from error
    say_how_it_ended(output, llm.window)
    if verbose:
        print("\n".join(figures(output, llm, load_seconds)), file=sys.stderr)
    return 130 if output.finish_reason == "abort" else 0


def talk(llm: LLM, system: str | None, params: SamplingParams, plain: bool, verbose: bool, load_seconds: float) -> None:
    """A conversation."""
    from qwen2.cli.answer import place
    from qwen2.cli.chat import Chat
    from qwen2.cli.conversation import Conversation
    from qwen2.cli.prompt import converse

    model = llm.model
    chat = Chat(llm, Conversation(model.name, system, params), lambda: make_renderer(plain), verbose, load_seconds)
    print(f"{model.name} ({model.weight_format}) on {place(llm)}, window {llm.window:,}, loaded in {load_seconds:.1f} s")
    converse(chat, make_store().home / "history")
