"""`qwen2 bits`: how well a model predicts held-out text, in bits per byte by language; what a later stage has forgotten shows here."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen2.data.batches import Batch
    from qwen2.data.shards import Shards
    from qwen2.weights.model import Model

BATCH_TOKENS = 4096  # computed at once
LENGTH = 512  # of a row, where nothing is said and the window allows it


def bits(
    model: str,
    texts: str,
    /,
    *,
    bytes: int = 60_000,
    length: int | None = None,
    out: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> None:
    """Bits per byte of held-out text, by language: a measure that models of different tokenizers share, less is better.

    Parameters
    ----------
    model
        A name, a file, a folder, or a training run.
    texts
        The shards that qwen2 data wrote, of the model's own tokenizer; or texts as qwen2 tokenizer compare takes them (JSON lines,
        plain text, folders of them, de=FILE).
    bytes
        Bytes of held-out text of each language that are read at most: the same text for every tokenizer, to within a token.
    length
        Tokens of a row; longer documents are cut. Left out: 512, or the model's window where it is shorter.
    out
        A file for the figures, as JSON.
    device
        cpu, cuda or cuda:N.
    threads
        CPU threads; left out, as many as there are physical cores.
    """
    for name, value in (("bytes", bytes), ("length", length), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    from qwen2.cli.serve import check_device

    check_device(device)
    opened = _opened(texts)

    import torch

    from qwen2.train.evaluate import bits_per_byte, bytes_by_token
    from qwen2.train.folder import check_writable, write_json
    from qwen2.train.world import World

    if threads is not None:
        torch.set_num_threads(threads)
    if out is not None:
        check_writable(out)
    loaded = _load(model)
    length = _row(loaded, length)
    batches = _batches(loaded, texts if opened is None else opened, bytes, length)
    with torch.no_grad():
        found = bits_per_byte(batches, bytes_by_token(loaded.tokenizer), World(device))(loaded.network.to(device).eval())
    if not found:
        raise ValueError(f"{texts}: no held-out text there")
    mean = fmean(found.values())
    if out is not None:
        write_json(out, {"model": model, "bits_per_byte": found, "mean": mean, "bytes": bytes, "length": length})
    _show(found, mean)


def _row(model: Model, length: int | None) -> int:
    """The tokens of a row. ValueError for more than the model's window."""
    window = model.config.window
    if length is not None and length > window:
        raise ValueError(f"--length {length:,}: the window of {model.name} is {window:,} tokens")
    return min(LENGTH, window) if length is None else length


def _show(found: dict[str, float], mean: float) -> None:
    from qwen2.cli.list import print_table

    print_table([{"language": code, "bits per byte": f"{value:.3f}"} for code, value in found.items()])
    print(f"{mean:.3f} bits per byte, the mean of {len(found)} languages")


def _load(model: str) -> Model:
    from qwen2.cli.pull import ensure
    from qwen2.train.place import is_run
    from qwen2.train.saved import take

    if not is_run(model):
        ensure(model)
    return take(model, lambda text: print(text, file=sys.stderr), dtype="float32")


def _opened(texts: str) -> Shards | None:
    """Shards, or None for texts; what is not there is said before a model is read."""
    from qwen2.data.shards import MANIFEST, Shards
    from qwen2.tokenizer.texts import read_texts

    if (Path(texts) / MANIFEST).is_file():
        return Shards.open(texts)
    next(read_texts([texts]), None)
    return None


def _batches(model: Model, texts: Shards | str, most: int, length: int) -> dict[str, list[Batch]]:
    """By language, in the model's ids. ValueError where shards are of another tokenizer."""
    from qwen2.tokenizer import Tokenizer
    from qwen2.tokenizer.texts import read_texts
    from qwen2.train.evaluate import HELD_OUT, held_out, held_out_texts

    at_once = max(BATCH_TOKENS, length)
    if isinstance(texts, str):
        return held_out_texts(read_texts([texts], HELD_OUT), model.tokenizer, length, at_once, most)
    if not Tokenizer.from_folder(texts.folder / "tokenizer").same_tokens(model.tokenizer):
        raise ValueError(f"{texts.folder}: made with another tokenizer than that of {model.name}; prepare the text again with its own")
    return held_out(texts, model.tokenizer, length, at_once, most)
