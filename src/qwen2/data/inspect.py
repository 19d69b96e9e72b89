"""Documents of shards as text again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen2.data.shards import Shard, Shards, sha256_of
from qwen2.tokenizer.tokenizer import Tokenizer

SHOWN = 1000  # characters of a document


def sampled(shards: Shards, records: Sequence[Shard], count: int, tokenizer: Path | None) -> Iterator[tuple[str, str]]:
    """(title, text) of documents taken evenly from all of the records'. ValueError where the tokenizer is not the shards'."""
    decoder = None
    if tokenizer is not None:
        path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
        if not path.is_file():
            raise FileNotFoundError(f"{tokenizer}: no tokenizer.json there")
        if sha256_of(path) != shards.tokenizer.sha256:
            raise ValueError(f"{path}: is not the tokenizer that the shards were made with")
        decoder = Tokenizer.from_json(path)
    places = [(record, number) for record in records for number in range(record.documents)]
    for i in range(min(count, len(places))):
        record, number = places[i * len(places) // min(count, len(places))]
        ids = shards.documents(record)[number].tolist()
        text = " ".join(map(str, ids)) if decoder is None else decoder.decode(ids, skip_control=True)
        cut = f" ... ({len(text):,} characters)" if len(text) > SHOWN else ""
        yield f"{record.language}, {record.source}, document {number}: {len(ids):,} tokens", text[:SHOWN] + cut
