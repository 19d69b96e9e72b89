"""`qwen2 bits`: how well a model predicts held-out text, in bits per byte by language; what a later stage has forgotten shows here."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen2.data.shards import Shards
    from qwen2.weights.model import Model

BATCH_TOKENS = 4096  # computed at once


def bits(
    model: str,
    shards: Path,
    /,
    *,
    tokens: int = 20_000,
    length: int = 512,
    out: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> None:
    """Bits per byte of held-out text, by language: a measure that models of different tokenizers share, less is better.

    Parameters
    ----------
    model
        A name, a file, a folder, or a training run.
    shards
        The folder that qwen2 data wrote, of the model's own tokenizer.
    tokens
        Held-out tokens of each language that are read at most.
    length
        Tokens of a row; longer documents are cut.
    out
        A file for the figures, as JSON.
    device
        cpu, cuda or cuda:N.
    threads
        CPU threads; left out, as many as there are physical cores.
    """
    for name, value in (("tokens", tokens), ("length", length), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    from qwen2.cli.serve import check_device
    from qwen2.data.shards import Shards

    check_device(device)
    opened = Shards.open(shards)

    import torch

    from qwen2.cli.list import print_table
    from qwen2.train.folder import write_json

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = _load(model)
    if length > loaded.config.window:
        raise ValueError(f"--length {length:,}: the window of {model} is {loaded.config.window:,} tokens")
    found = _measured(loaded, opened, tokens, length, device)
    if not found:
        raise ValueError(f"{shards}: no held-out text there")
    mean = fmean(found.values())
    if out is not None:
        write_json(out, {"model": model, "bits_per_byte": found, "mean": mean, "tokens": tokens, "length": length})
    print_table([{"language": code, "bits per byte": f"{value:.3f}"} for code, value in found.items()])
    print(f"{mean:.3f} bits per byte, the mean of {len(found)} languages")


def _load(model: str) -> Model:
    from qwen2.cli.pull import ensure
    from qwen2.train.place import is_run
    from qwen2.train.saved import take

    if not is_run(model):
        ensure(model)
    return take(model, lambda text: print(text, file=sys.stderr), dtype="float32")


def _measured(model: Model, shards: Shards, tokens: int, length: int, device: str) -> dict[str, float]:
    """Bits per byte by language. ValueError where the shards are of another tokenizer."""
    import torch

    from qwen2.tokenizer import Tokenizer
    from qwen2.train.evaluate import bits_per_byte, bytes_by_token, held_out
    from qwen2.train.world import World

    tokenizer = Tokenizer.from_folder(shards.folder / "tokenizer")
    if not tokenizer.same_tokens(model.tokenizer):
        raise ValueError(f"{shards.folder}: made with another tokenizer than that of {model.name}; prepare the text again with its own")
    batches = held_out(shards, length, max(BATCH_TOKENS, length), tokens)
    network = model.network.to(device).eval()
    with torch.no_grad():
        return bits_per_byte(batches, bytes_by_token(tokenizer), World(device))(network)
