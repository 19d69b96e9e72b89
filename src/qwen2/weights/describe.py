"""What a model is, read from its headers: shape, types of its weights, tokenizer, template, defaults, licence. Reads no weights.

What is left out: torch, so that `qwen2 show` answers at once.

    describe(Path("model.gguf")).types["Q4_K"].tensors
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwen2.config import GenerationDefaults, ModelConfig
from qwen2.quant.layout import LAYOUTS
from qwen2.tokenizer import Tokenizer
from qwen2.weights.adapter_texts import with_texts
from qwen2.weights.json_object import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@dataclass(frozen=True)
class Tensor:
    """One tensor as it is stored; the shape is rows first."""

    name: str
    type: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class TypeShare:
    """How much of a model is stored in one type."""

    tensors: int
    size: int


@dataclass(frozen=True)
class Description:
    """What the files of a model say. `licence` is None where they say nothing."""

    path: Path
    architecture: str  # as the files name it
    container: str
    config: ModelConfig
    generation: GenerationDefaults
    tokenizer: Tokenizer
    tensors: tuple[Tensor, ...]
    size: int
    licence: str | None

    @property
    def types(self) -> dict[str, TypeShare]:
        """Each type that weights are stored in, the largest share first."""
        shares: dict[str, TypeShare] = {}
        for tensor in self.tensors:
            had = shares.get(tensor.type, TypeShare(0, 0))
            shares[tensor.type] = TypeShare(had.tensors + 1, had.size + tensor.size)
        return dict(sorted(shares.items(), key=lambda item: -item[1].size))


def describe(path: Path, adapter: Path | None = None) -> Description:
    """Describe a GGUF file or a Hugging Face folder; `adapter`: the folder of one, with what that says of chats.

    ValueError or FileNotFoundError in one line where it is neither.
    """
    described = _describe_gguf(path) if path.is_file() else _describe_folder(path)
    check_vocabulary(path, described.tokenizer, described.config, described.generation)
    config, tokenizer, generation = with_texts(adapter, described.config, described.tokenizer, described.generation)
    return replace(described, config=config, tokenizer=tokenizer, generation=generation)


@dataclass(frozen=True)
class Outline:
    """What lists show of a model. `form`: the mix of types that its weights are stored in."""

    architecture: str
    config: ModelConfig
    form: str


def outline(path: Path) -> Outline:
    """The same without the tokenizer: a tenth of the time. Errors as `describe` has them."""
    if path.is_file():
        from qwen2.weights.gguf import GGUFFile
        from qwen2.weights.mixes import mix_of

        with GGUFFile.open(path) as file:
            config = ModelConfig.from_gguf(file.metadata, {name: info.shape for name, info in file.tensors.items()})
            return Outline(str(file.metadata.get("general.architecture")), config, mix_of(file))
    values = read_json(path / "config.json")
    types = Counter[str]()
    for tensor in _folder_tensors(path):
        types[tensor.type] += tensor.size
    return Outline(str(values.get("model_type")), ModelConfig.from_hf(values), types.most_common(1)[0][0])


def check_vocabulary(path: Path, tokenizer: Tokenizer, config: ModelConfig, generation: GenerationDefaults) -> None:
    """Every id that can come up must have a row in the embedding: the loader refuses a model without it, and so does `describe`."""
    if tokenizer.vocab_size > config.vocab:
        raise ValueError(f"{path}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the embedding only {config.vocab} rows")
    for end in (*config.eos, *generation.eos):
        if end >= config.vocab:
            raise ValueError(f"{path}: the end token {end} is beyond the embedding's {config.vocab} rows")


def _describe_gguf(path: Path) -> Description:
    from qwen2.weights.gguf import GGUFFile
    from qwen2.weights.gguf_sampling import generation_from_gguf

    with GGUFFile.open(path) as file:
        tensors = tuple(Tensor(name, LAYOUTS[info.type].name, info.shape, info.nbytes) for name, info in file.tensors.items())
        config = ModelConfig.from_gguf(file.metadata, {tensor.name: tensor.shape for tensor in tensors})
        tokenizer = Tokenizer.from_gguf(file.metadata)
        licence = file.metadata.get("general.license")
        return Description(
            path,
            str(file.metadata.get("general.architecture")),
            f"GGUF version {file.version}",
            config,
            generation_from_gguf(file.metadata, config, tokenizer.eos),
            tokenizer,
            tensors,
            sum(part.stat().st_size for part in file.split.paths),
            licence if isinstance(licence, str) else None,
        )


def _describe_folder(path: Path) -> Description:
    values = read_json(path / "config.json")
    config = ModelConfig.from_hf(values)
    defaults = path / "generation_config.json"
    generation = GenerationDefaults.from_hf(read_json(defaults)) if defaults.exists() else GenerationDefaults(eos=config.eos)
    size = sum(one.stat().st_size for one in path.iterdir() if one.is_file())
    tokenizer = Tokenizer.from_folder(path)
    kind = str(values.get("model_type"))
    return Description(path, kind, "safetensors", config, generation, tokenizer, _folder_tensors(path), size, _licence(path))


def _folder_tensors(path: Path) -> tuple[Tensor, ...]:
    from qwen2.weights.safetensors_header import read_safetensors_header

    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: holds no *.safetensors; give a folder with weights, or a .gguf file")
    headers = [read_safetensors_header(file) for file in files]
    return tuple(Tensor(name, one.dtype, one.shape, one.stop - one.start) for header in headers for name, one in header.items())


def _licence(folder: Path) -> str | None:
    """The licence's first words, where the folder has its text."""
    path = folder / "LICENSE"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as stream:
        return next((line for line in _stripped(stream) if line), None)


def _stripped(lines: Iterable[str]) -> Iterable[str]:
    return (line.strip() for line in lines)
