"""A loaded model: configuration, tokenizer, chat template, generation defaults and the network with its weights.

`load` takes a store name, a Hugging Face folder or a GGUF file. The network is built without memory on the "meta" device and
each parameter is put in place as it is read, so that a checkpoint never exists twice.

What is left out: downloading (store.py) and running (engine/).
"""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwen2 import kernels
from qwen2.config import GenerationDefaults, ModelConfig
from qwen2.model.lora import merge
from qwen2.tokenizer import ChatTemplate, Tokenizer
from qwen2.weights.adapter import load_adapter
from qwen2.weights.adapter_texts import has_texts, with_texts
from qwen2.weights.checkpoint import SafetensorsSource
from qwen2.weights.describe import check_vocabulary
from qwen2.weights.fill import Source, fill
from qwen2.weights.gguf import GGUFFile
from qwen2.weights.gguf_sampling import generation_from_gguf
from qwen2.weights.gguf_source import GGUFSource
from qwen2.weights.json_object import read_json
from qwen2.weights.modelfile import UNCHANGED, Modelfile
from qwen2.weights.pack import fill_packed
from qwen2.weights.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qwen2.model import Qwen2

Texts = tuple[Tokenizer, GenerationDefaults]
FileTexts = tuple[ModelConfig, Tokenizer, GenerationDefaults]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Model:
    """Everything that a checkpoint is. `dtype` is what it computes in, `weight_format` what the file held."""

    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    generation: GenerationDefaults
    network: Qwen2
    name: str
    path: Path
    weight_format: str
    hold: Any = field(default=None, repr=False)  # keeps the store from removing what is in use
    made: Modelfile = UNCHANGED  # what it changes of what its files say, which `generation` and `template` have already
    files: FileTexts | None = None  # what its files say, where `made` and the adapter may have changed it
    adapter: Path | None = None  # the folder of one of its own, which `network` is free of

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        return self.network.device

    def made_as(self, name: str, path: Path, made: Modelfile, hold: Any, adapter: Path | None = None) -> Model:
        """Another model of these weights, which exist once: what `made` and the adapter's folder change of what the files say."""
        files = (self.config, self.tokenizer, self.generation) if self.files is None else self.files
        config, tokenizer, published = with_texts(adapter, *files)
        template, generation = ChatTemplate.of(tokenizer, source=made.template), made.defaults(published)
        texts: dict[str, Any] = {"config": config, "tokenizer": tokenizer, "template": template, "generation": generation}
        return replace(self, name=name, path=path, hold=hold, made=made, adapter=adapter, files=files, **texts)

    def with_adapter(self, folder: Path | None) -> Model:
        """The same model with the adapter of that folder beside its weights, and what the folder says of chats; None: without any."""
        if folder == self.adapter or (folder is not None and self.adapter is None and not has_texts(folder)):
            return replace(self, adapter=folder)
        return self.made_as(self.name, self.path, self.made, self.hold, folder)


def load(source: str | Path, dtype: str = "auto", device: str = "cpu", home: Path | None = None, packed: bool = False) -> Model:
    """Load a store name (`qwen2.5-coder:0.5b`), a Hugging Face folder or a GGUF file.

    As parameters (`packed` false) `dtype` "auto" computes in the file's own type; quantized files are widened to float32 on a CPU
    and bfloat16 elsewhere, and float16 becomes float32 on a CPU. Packed, for the kernels, matrices stay as the file has them, or
    are stored as `dtype`, and everything else is float32; only a CPU has packed weights, and where it has no kernels the weights
    are widened and computed with in torch, which is said once. An adapter of the model's own (ADAPTER in its Modelfile) is merged into
    parameters, and stays beside packed weights, in `Model.adapter`. Raises ValueError or FileNotFoundError in one line that says what
    is wrong and where.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: must be auto, {', '.join(DTYPES)}")
    target, beside = _device(device), packed
    packed = packed and target.type == "cpu"
    if packed and kernels.isa() is None:
        say_fallback()
    if dtype == "float16" and target.type == "cpu" and not (packed and kernels.isa() is not None):
        raise ValueError("dtype 'float16' on a CPU: Qwen2's large key biases overflow it; use float32 or bfloat16")
    store = Store(home)
    path, name, hold = store.open(source)
    stored = None if store.is_path(source) else store.get(name)
    made, adapter = (UNCHANGED, None) if stored is None else (stored.made, stored.adapter_path)
    with ExitStack() as on_failure:
        if hold is not None:
            on_failure.push(hold)
        with _no_collections(), open_files(path) as opened:
            network, files = _network(opened, dtype, target, packed), (opened.config, opened.tokenizer, opened.generation)
            texts = with_texts(adapter, *files)
            if adapter is not None and not beside:
                load_adapter(network, adapter)
                merge(network)
                adapter = None
        on_failure.pop_all()  # from here on the model has it
    config, tokenizer, published = texts
    files = files if adapter is not None else texts  # merged, they are the weights' own
    template, generation = ChatTemplate.of(tokenizer, source=made.template), made.defaults(published)
    return Model(config, tokenizer, template, generation, network, name, path, opened.weight_format, hold, made, files, adapter)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not known to torch; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch {torch.__version__} finds no CUDA device here; leave --device out to run on the CPU")
    return device


class Opened:
    """A model's files while they are open: all but the weights, and where those come from. `dtype` is None for weights in blocks.

    Tokenizer and generation defaults are read when they are first asked for, or by `read_texts`.
    """

    def __init__(
        self, config: ModelConfig, source: Source, dtype: torch.dtype | None, weight_format: str, texts: Callable[[], Texts]
    ) -> None:
        self.config, self.source, self.dtype, self.weight_format = config, source, dtype, weight_format
        self._make = texts
        self._texts: Texts | None = None

    def read_texts(self) -> Texts:
        """Tokenizer and generation defaults, checked against the config."""
        if self._texts is None:
            self._texts = self._make()
        return self._texts

    @property
    def tokenizer(self) -> Tokenizer:
        return self.read_texts()[0]

    @property
    def generation(self) -> GenerationDefaults:
        return self.read_texts()[1]


@contextmanager
def open_files(path: Path) -> Iterator[Opened]:
    """Open a GGUF file or a Hugging Face folder. Raises ValueError or FileNotFoundError in one line that says what is wrong and where."""
    if path.is_file():
        with GGUFFile.open(path) as file:
            yield _open_gguf(path, file)
    else:
        yield _open_folder(path)


def _open_gguf(path: Path, file: GGUFFile) -> Opened:
    shapes = {name: info.shape for name, info in file.tensors.items()}
    with _naming(path):
        config = ModelConfig.from_gguf(file.metadata, shapes)

    def texts() -> Texts:
        with _naming(path):
            tokenizer = Tokenizer.from_gguf(file.metadata)
            generation = generation_from_gguf(file.metadata, config, tokenizer.eos)
        check_vocabulary(path, tokenizer, config, generation)
        return tokenizer, generation

    source = GGUFSource(file, config)
    return Opened(config, source, source.dtype(), source.format(), texts)


def _open_folder(path: Path) -> Opened:
    defaults = path / "generation_config.json"
    with _naming(path):
        values = read_json(path / "config.json")
        config = ModelConfig.from_hf(values)
        generation = GenerationDefaults.from_hf(read_json(defaults)) if defaults.exists() else GenerationDefaults(eos=config.eos)
    source = SafetensorsSource(path, config, llama=values["model_type"] == "llama")

    def texts() -> Texts:
        tokenizer = Tokenizer.from_folder(path)
        check_vocabulary(path, tokenizer, config, generation)
        return tokenizer, generation

    stored = source.dtype()
    return Opened(config, source, stored, str(stored).removeprefix("torch."), texts)


def _network(opened: Opened, dtype: str, device: torch.device, packed: bool) -> Qwen2:
    """The network with its weights; where the kernels pack them, which needs no Python, the vocabulary is built meanwhile."""
    if not packed or kernels.isa() is None:
        opened.read_texts()
        computed = _compute_dtype(dtype, opened.dtype, device)
        return fill(opened.config, opened.source, computed, device, int8_inputs=packed and dtype == "auto")
    network, packing = fill_packed(opened.config, opened.source, DTYPES.get(dtype))
    with ThreadPoolExecutor(1) as other:  # whose end waits for the weights, whatever happens meanwhile
        weights = other.submit(packing.run)
        try:
            opened.read_texts()
        except BaseException:  # Ctrl-C too: it must not wait for gigabytes
            packing.stop()
            raise
    weights.result()
    return network


@contextmanager
def _no_collections() -> Iterator[None]:
    """No search for garbage in between: a vocabulary is half a million objects, all of them in use, and each search visits them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@lru_cache(maxsize=1)
def say_fallback() -> None:
    """Once a process: that torch does what the kernels would."""
    why = "this installation has no native library" if kernels.library() is None else "no kernels are chosen, or none fit this processor"
    print(f"qwen2: {why}: computing in torch, several times slower and with weights widened to float32", file=sys.stderr)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of what reads a file's content get the file's name in front."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None


def _compute_dtype(asked: str, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    if asked != "auto":
        return DTYPES[asked]
    if stored is None:  # block-quantized
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored
