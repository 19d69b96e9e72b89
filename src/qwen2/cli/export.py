"""`qwen2 export`: a model as a Hugging Face folder that transformers loads, or as a GGUF file that llama.cpp loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwen2.cli.answer import working
from qwen2.cli.lora_flags import adapter_folder
from qwen2.cli.pull import ensure
from qwen2.quant.layout import LAYOUTS
from qwen2.train.place import is_adapter, is_run
from qwen2.weights.pull import human_size
from qwen2.weights.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

SPELLED = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "Q8_0"}
Form = Literal["f32", "f16", "bf16", "q8_0"]


def export(model: str, destination: Path, /, *, to: Form | None = None, adapter: Path | None = None) -> None:
    """Write a model out: as a GGUF file where the destination ends in .gguf, else as a Hugging Face folder.

    Parameters
    ----------
    model
        A name, a folder or a file; also a training run or one of its checkpoints, RUN/checkpoints/step-N, or an adapter's folder,
        which is merged into the model that it names.
    destination
        What to write; it must not exist yet.
    to
        How matrices are stored: f32, f16, bf16, and q8_0 in GGUF files. Left out: what the model computes in.
    adapter
        An adapter's folder, as PEFT writes it, or a run of adapters, that is merged into the model first.
    """
    gguf = destination.suffix == ".gguf"
    if destination.exists():
        raise FileExistsError(f"{destination}: exists already; export to a new {'file' if gguf else 'folder'}")
    if to == "q8_0" and not gguf:
        raise ValueError(f"{destination}: q8_0 blocks go into GGUF files only; end the destination in .gguf, or choose f32, f16 or bf16")
    adapter = None if adapter is None else adapter_folder(adapter)
    if not is_run(model) and not is_adapter(model):
        ensure(model)
        Store().resolve(model)

    import torch

    from qwen2.train.saved import take, with_adapter
    from qwen2.weights.export import to_gguf, to_hf_folder

    said: list[str] = []
    with working(f"loading {model}"):
        loaded = take(model, said.append)
        if adapter is not None:
            loaded = with_adapter(loaded, adapter)
    for line in said:
        print(f"qwen2: {line}", file=sys.stderr)
    types: dict[Form, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    form = to if to is not None else {dtype: name for name, dtype in types.items()}[loaded.dtype]
    print(f"writing {human_size(_expected(loaded.network.tensors(), form))} of {SPELLED[form]} into {destination}", file=sys.stderr)
    with working(f"writing {destination}"):
        if gguf:
            notes = to_gguf(loaded, destination, form.upper())
            size = destination.stat().st_size
        else:
            to_hf_folder(loaded, destination, dtype=types[form])
            notes, size = [], sum(path.stat().st_size for path in destination.iterdir())
    if loaded.made:
        notes.append(f"of its Modelfile the files have the sampling that they have a place for; qwen2 show {model} --modelfile prints all")
    for note in notes:
        print(f"qwen2: {note}", file=sys.stderr)
    print(f"{destination}: {human_size(size)} written")


def _expected(tensors: Iterable[tuple[str, Tensor]], form: Form) -> float:
    """Bytes of the weights in that form; norms and biases, which a GGUF file keeps wider, are too few to be seen."""
    (layout,) = [one for one in LAYOUTS.values() if one.name == form.upper()]
    return sum(tensor.numel() for _, tensor in tensors) * layout.bytes / layout.block
