"""`qwen2 create`: a model of one's own from a Modelfile. Works on the store, with or without a server; one that runs sees it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from qwen2.cli.progress import PullWatcher
from qwen2.cli.pull import ensure, make_store
from qwen2.cli.quantize import Mix, any_case
from qwen2.weights.modelfile import LARGEST, Modelfile, parse
from qwen2.weights.pull import human_size


def create(
    name: str,
    /,
    *,
    file: Annotated[Path, Parameter(name=("-f", "--file"), allow_leading_hyphen=True)] = Path("Modelfile"),
    quantize: Annotated[Mix | None, Parameter(converter=any_case)] = None,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Make a model of your own: another's weights with a system prompt, parameters, a template or messages of yours.

    No weights are copied; a model of that name that is there already is replaced.

    Parameters
    ----------
    name
        The new model's name, family:tag.
    file
        The Modelfile, or - for what comes through a pipe. FROM is a model's name, a .gguf file or a Hugging Face folder, ADAPTER
        the folder of a LoRA adapter; paths are seen from the Modelfile.
    quantize
        Make the weights smaller, as qwen2 quantize does: q4_k_m, q8_0 and so on.
    quiet
        Say nothing while it works.
    """
    store = make_store()
    store.own_name(name)
    modelfile = read(file)
    folder = None if str(file) == "-" else file.absolute().parent
    ensure(modelfile.source)
    with PullWatcher(name, quiet) as watch:
        model = store.create(name, modelfile, mix=quantize, watch=watch, folder=folder)
    own = sum(file.size for file in model.adapter) if modelfile.adapter is not None else 0
    disk = f"{human_size(model.size if quantize is not None else own)} written" if quantize is not None or own else "no disk used"
    print(f"{model.name} is here: made from {model.source}, {human_size(model.size)}, sha256 {model.digest[:12]}, {disk}")


def read(file: Path) -> Modelfile:
    """A Modelfile; errors name the file and the line."""
    where = "standard input" if str(file) == "-" else str(file)
    if str(file) == "-":
        data = sys.stdin.buffer.read(LARGEST + 1)
    elif not file.exists():
        raise FileNotFoundError(f"{file}: no such file; write a Modelfile, or name one with -f")
    else:
        with file.open("rb") as stream:
            data = stream.read(LARGEST + 1)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: line {data[: error.start].count(10) + 1}: not UTF-8 text") from None
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
