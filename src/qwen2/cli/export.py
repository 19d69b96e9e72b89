"""`qwen2 export`: a model as a Hugging Face folder that transformers loads, or as a GGUF file that llama.cpp loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from qwen2.cli.pull import ensure
from qwen2.weights.pull import human_size
from qwen2.weights.store import Store

Form = Literal["f32", "f16", "bf16", "q8_0"]


def export(model: str, destination: Path, /, *, to: Form | None = None) -> None:
    """Write a model out: as a GGUF file where the destination ends in .gguf, else as a Hugging Face folder.

    Parameters
    ----------
    model
        A name, a folder or a file.
    destination
        What to write; it must not exist yet.
    to
        How matrices are stored: f32, f16, bf16, and q8_0 in GGUF files. Left out: what the model computes in.
    """
    gguf = destination.suffix == ".gguf"
    if destination.exists():
        raise FileExistsError(f"{destination}: exists already; export to a new {'file' if gguf else 'folder'}")
    if to == "q8_0" and not gguf:
        raise ValueError(f"{destination}: q8_0 blocks go into GGUF files only; end the destination in .gguf, or choose f32, f16 or bf16")
    ensure(model)
    Store().resolve(model)

    import torch

    from qwen2.weights.export import to_gguf, to_hf_folder
    from qwen2.weights.model import load

    loaded = load(model)
    types = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    if gguf:
        names = {dtype: name for name, dtype in types.items()}
        for note in to_gguf(loaded, destination, (to or names[loaded.dtype]).upper()):
            print(f"qwen2: {note}", file=sys.stderr)
        size = destination.stat().st_size
    else:
        to_hf_folder(loaded, destination, dtype=loaded.dtype if to is None else types[to])
        size = sum(path.stat().st_size for path in destination.iterdir())
    print(f"{destination}: {human_size(size)} written")
