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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from qwen2.cli.client import Address
from qwen2.cli.lora_flags import adapter_folder
from qwen2.cli.pull import ensure, make_store
from qwen2.cli.sampling import Flags, params_of, read_form
from qwen2.train.place import is_adapter
from qwen2.weights.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwen2.cli.partner import Partner
    from qwen2.cli.plain import Renderer
    from qwen2.cli.remote import Server
    from qwen2.engine.request import SamplingParams

NAME_OR_PATH = re.compile(r"[\w.:@~/\\+-]+", re.ASCII)
NO_FLAGS = Flags()
Switch = Annotated[bool, Parameter(negative=())]


@dataclass(frozen=True, kw_only=True)
class How:
    """How to compute; a model for which any of it is given is loaded here, whether a server is running or not."""

    device: Annotated[str | None, Parameter(help="cpu, cuda or cuda:N; left out, cpu.")] = None
    dtype: Annotated[
        str | None,
        Parameter(help="What to compute in: auto (the file's own type, also where this is left out), float32, bfloat16 or float16."),
    ] = None
    threads: Annotated[int | None, Parameter(help="CPU threads; left out, as many as there are physical cores.")] = None
    context: Annotated[int | None, Parameter(help="A window shorter than the model's own.")] = None
    cache_bits: Annotated[
        Literal[16, 8] | None,
        Parameter(
            help="Bits of the keys and values that are kept of what was read, 16 or 8, which halve the memory and cost a little "
            "accuracy. CPU only."
        ),
    ] = None
    isa: Annotated[
        Literal["avx512", "avx2", "neon", "none"] | None,
        Parameter(
            help="The kernels' instruction set; left out, the best that this processor has. With none torch computes, several times slower."
        ),
    ] = None
    draft: Annotated[
        str | None, Parameter(help="A smaller model of the same tokens that guesses what comes: no text changes, most come sooner.")
    ] = None
    adapter: Annotated[
        str | None, Parameter(help="A LoRA adapter's folder, or a run of them, used beside the model's weights without merging.")
    ] = None


NO_HOW = How()


def run(
    *words: Annotated[str, Parameter(show_default=False)],
    system: str | None = None,
    complete: Switch = False,
    local: Switch = False,
    at: Address = None,
    plain: Switch = False,
    verbose: Switch = False,
    form: Annotated[str | None, Parameter(name="--format")] = None,
    how: Annotated[How, Parameter(name="*")] = NO_HOW,
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
    complete
        Go on with the prompt as a text, without a chat template, as base models do. The model is loaded here.
    local
        Load the model here, also where a server of ours is running. So do all flags that say how to compute.
    at
        The server to ask, as host:port or a URL; left out, QWEN2_SERVER, or 127.0.0.1:11434 if ours is there; else it is loaded here.
    plain
        Show the text as the model wrote it, not as rendered Markdown.
    verbose
        Say on stderr how fast it was, on what, with how much memory, and what sampling was used.
    form
        The form of answers: json for any JSON object, or a file with a JSON schema.
    how
        How to compute.
    sampling
        How tokens are chosen and when to stop. What is left out is the model's own default.
    """
    params = replace(params_of(sampling), context=how.context, constraint=read_form(form))  # this context goes before a num_ctx
    model, given = split_words(words)
    check_complete(complete, system, at)
    server = None if local or complete else find_server(model, at, how)
    partner = None if server is None else opened(server, model, words)
    if partner is None:
        check_model(model, words)
        how = check_beside(how)
    prompt = join_prompt(given)
    if partner is None:
        for name in (how.draft, model):
            if name is not None:
                ensure(name)
        partner = load_model(model, **_said(how)) if server is None else server.open(model)  # which has it now: its store is this one
    if complete:
        partner = completing(partner, prompt)
    if prompt is not None:
        return answer_once(partner, prompt, system, params, plain, verbose)
    talk(partner, system, params, plain, verbose)
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


def check_beside(how: How) -> How:
    """That what is to be loaded beside a model is there; of a run of adapters the adapter's folder. Errors as `check_model`'s."""
    if how.draft is not None:
        check_model(how.draft, ())
    return how if how.adapter is None else replace(how, adapter=str(adapter_folder(Path(how.adapter))))


def check_model(model: str, words: Sequence[str]) -> None:
    """An unknown name is an error that also says how to ask a single word. A known one may still have to be pulled."""
    store = make_store()
    if store.is_path(model) and is_adapter(model):
        cure = f"qwen2 run BASE --adapter {model} answers with both, qwen2 export {model} FOLDER merges them"
        raise ValueError(f"{model}: an adapter, and no model: name the one that it is for: {cure}")
    try:
        store.resolve(model)
    except FileNotFoundError:
        if store.is_path(model) or store.has(model):
            raise
    except ValueError as error:
        raise ValueError(f"{error}{_question(model, words)}") from None


def _question(model: str, words: Sequence[str]) -> str:
    """How to ask what was taken for a model's name."""
    asked = bool(words) and re.fullmatch(r"[A-Za-z]+", model) is not None
    return f"; if it is a question: qwen2 run {DEFAULT_MODEL} {shlex.quote(' '.join(words))}" if asked else ""


def find_server(model: str, at: str | None, how: How) -> Server | None:
    """The server that is to be asked; None where the model is to be loaded here, with a word on stderr where that may surprise.

    Raises OSError where a server was named, by `at` or QWEN2_SERVER, and cannot be asked.
    """
    from qwen2.cli.remote import find, is_named

    store = make_store()
    if store.is_path(model):  # a server knows names
        if at is not None:
            raise ValueError(f"--at {at}: {model} is a file or folder here, and a server is asked by name; leave one of them out")
        return None
    server, why = find(at, store)
    if server is None and is_named(at):
        raise OSError(f"{why}; --local loads the model here")
    if server is not None and (given := _said(how)):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        why = f"{flags}: the server at {server.address} cannot be asked for that"
        server = None
    if why:
        print(f"qwen2: {why}: running it here", file=sys.stderr)
    return server


def opened(server: Server, model: str, words: Sequence[str]) -> Partner | None:
    """The model, loaded in the server; None where its store is the one here, and does not have the model yet.

    Raises FileNotFoundError where only the server was to be asked, and does not have it.
    """
    from qwen2.cli.answer import working

    try:
        with working(f"loading {model}"):
            return server.open(model)
    except FileNotFoundError as error:
        if server.store == make_store().identity:
            return None
        raise FileNotFoundError(f"the server at {server.address} says: {error}{_question(model, words)}") from None


def _said(how: How) -> dict[str, Any]:
    return {name: value for name, value in asdict(how).items() if value is not None}


def load_model(model: str, **given: Any) -> Partner:
    """The model, loaded in this process."""
    from qwen2.cli.answer import working
    from qwen2.cli.lean import import_torch

    start = time.perf_counter()
    gc.disable()  # a million objects are made that all stay: each search for garbage would visit them
    with working(f"loading {model}"):
        if given.get("device", "cpu") == "cpu":
            import_torch()
        from qwen2.cli.partner import Local
        from qwen2.engine.llm import LLM

        llm = LLM(model, **given)
    gc.freeze()
    gc.enable()
    return Local(llm, time.perf_counter() - start)


def make_renderer(plain: bool) -> Renderer:
    """Markdown where a person reads, plain text where a program does."""
    from qwen2.cli.plain import PlainStream

    if plain or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return PlainStream()
    from rich.console import Console

    from qwen2.cli.render import MarkdownStream

    console = Console()
    return PlainStream() if console.legacy_windows else MarkdownStream(console)  # a console that would print the escapes as text


def check_complete(complete: bool, system: str | None, at: str | None) -> None:
    """Refuse what has no place beside a text that is gone on with."""
    for flag, given, why in (("--system", system, "a text has no system prompt"), ("--at", at, "a server is asked in conversations")):
        if complete and given is not None:
            raise ValueError(f"--complete and {flag}: {why}; leave one of them out")


def completing(partner: Partner, prompt: str | None) -> Partner:
    """The model of this process as one that goes on with texts."""
    from qwen2.cli.partner import Completing, Local

    assert isinstance(partner, Local), "with --complete no server is asked"
    if prompt is None:
        raise ValueError("--complete: what is to be completed? Give a text, as in qwen2 run MODEL --complete TEXT")
    return Completing(partner.llm, partner.load_seconds)


def answer_once(partner: Partner, prompt: str, system: str | None, params: SamplingParams, plain: bool, verbose: bool) -> int:
    """Print the answer; 130 where Ctrl-C ended it."""
    from qwen2.cli.answer import figures, say_how_it_ended, show_answer

    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        output = show_answer(partner, messages, params, make_renderer(plain))
    except ArithmeticError as error:
        raise ValueError(str(error)) from error
    say_how_it_ended(output, partner.about.window)
    if verbose:
        print("\n".join(figures(output, partner)), file=sys.stderr)
    return 130 if output.finish_reason == "abort" else 0


def talk(partner: Partner, system: str | None, params: SamplingParams, plain: bool, verbose: bool) -> None:
    """A conversation."""
    from qwen2.cli.chat import Chat
    from qwen2.cli.conversation import Conversation
    from qwen2.cli.prompt import converse

    about = partner.about
    chat = Chat(partner, Conversation(about.name, system, params), lambda: make_renderer(plain), verbose)
    print(f"{about.name} ({about.weight_format}) on {about.place}, window {about.window:,}, loaded in {partner.load_seconds:.1f} s")
    converse(chat, make_store().home / "history")
