"""Clean text to token shards: every task writes shards of its own, which are then joined in the order of tasks.

Left out: training the tokenizer (`qwen2.tokenizer.train`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from qwen2.data.execute import Place, execute
from qwen2.data.prepare import DOING, HELD_OUT, TEXT, RankReader, Say, claim, discard
from qwen2.data.recipe import Recipe
from qwen2.data.shards import MANIFEST, Shards, ShardWriter, TokenizerInfo, merge, sha256_of
from qwen2.tokenizer.parts import END_OF_TEXT
from qwen2.tokenizer.tokenizer import Tokenizer
from qwen2.weights.locks import alone

SHARDS = "shards"
TOKENIZER_FILES = (  # copied beside the shards, so that they can be read without knowing where they came from
    "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


def tokenizer_info(folder: Path) -> TokenizerInfo:
    """What a manifest says of a tokenizer. ValueError where its folder has no tokenizer.json or it has no <|endoftext|>."""
    path = folder / "tokenizer.json" if folder.is_dir() else folder
    if path.name != "tokenizer.json" or not path.is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer.json there")
    tokenizer = Tokenizer.from_json(path)
    if END_OF_TEXT not in tokenizer.control:
        raise ValueError(f"{path}: has no {END_OF_TEXT}, which ends documents")
    return TokenizerInfo(sha256_of(path), tokenizer.vocab_size, tokenizer.control[END_OF_TEXT])


class Tokenize(PipelineStep):
    """Documents to shards below a folder of the task's own."""

    name = "tokens"
    type = "TOKENS"

    def __init__(self, tokenizer: str, folder: str) -> None:
        super().__init__()
        self.tokenizer, self.folder = tokenizer, folder

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Any:
        """Held-out documents become shards of their own split."""
        place = Path(self.folder) / f"{rank:05d}"
        shutil.rmtree(place, ignore_errors=True)  # of a task that was broken off
        tokenizer = Tokenizer.from_json(Path(self.tokenizer))
        with ShardWriter(place, tokenizer_info(Path(self.tokenizer))) as writer:
            for document in data:
                fields = document.metadata
                ids = tokenizer.encode(document.text)
                writer.add(fields["role"], fields["language"], fields["source"], ids, len(document.text.encode("utf-8")))


def prepare_shards(recipe: Recipe, manifest: dict[str, Any], folder: Path, tokenizer: Path, place: Place, say: Say = print) -> Shards:
    """OUT/text and OUT/held-out to OUT/shards, with a copy of the tokenizer.

    Shards that are there and of the same text and tokenizer are checked and used; others there are a FileExistsError. ValueError
    where another process works in the folder.
    """
    with alone(folder, DOING):
        return _prepare_shards(recipe, manifest, folder, tokenizer, place, say)


def _prepare_shards(recipe: Recipe, manifest: dict[str, Any], folder: Path, tokenizer: Path, place: Place, say: Say) -> Shards:
    info = tokenizer_info(tokenizer)
    home, parts = folder.absolute() / SHARDS, folder.absolute() / "tokens"
    made_of = {key: manifest[key] for key in ("inputs", "libraries", "missing", "text")}
    if (home / MANIFEST).exists():
        shards = Shards.open(home)
        known = {"missing": [], **shards.manifest}
        if shards.tokenizer == info and {key: known.get(key) for key in made_of} == made_of:
            say(f"{folder / SHARDS}: made already, used as they are")
            discard(parts)
            return shards
        raise FileExistsError(f"{folder / SHARDS}: holds shards of another text or tokenizer; remove them or name another folder")
    path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not claim(parts, [asdict(info), made_of]):
        discard(parts)
        claim(parts, [asdict(info), made_of])
    again = RankReader(str(folder.absolute() / TEXT), str(folder.absolute() / HELD_OUT))
    execute([again, Tokenize(str(path.absolute()), str(parts))], recipe.tasks, place, str(parts / "logs"))
    (home / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES if tokenizer.is_dir() else ():
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, home / "tokenizer" / name)
    shutil.copyfile(path, home / "tokenizer" / "tokenizer.json")
    shards = merge(
        [parts / f"{rank:05d}" for rank in range(recipe.tasks)], home, recipe.to_json(), {**made_of, "places": manifest["places"]}
    )
    discard(parts)
    tokens = sum(record.tokens for record in shards.shards)
    say(f"{folder / SHARDS}: {tokens:,} tokens in {len(shards.shards)} shards")
    return shards
