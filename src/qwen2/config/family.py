"""The released models as data: shapes, generation defaults and licences, and the sizes made for tests and laptops.

Shapes: Qwen2 technical report (arXiv 2407.10671), table 1, and the published config.json files; the report's vocabulary of
151,646 is padded to 151,936 or 152,064 rows in the files. Generation defaults: the published generation_config.json files.
What is left out: where the weights lie (`weights/registry.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qwen2.config.generation import GenerationDefaults
from qwen2.config.model import ModelConfig, MoEConfig

APACHE = "Apache-2.0"
TONGYI = "Tongyi Qianwen"


@dataclass(frozen=True)
class Release:
    """One published checkpoint: its store name, its hub name, its shape, its sampling defaults, its licence."""

    name: str
    hub: str
    config: ModelConfig
    generation: GenerationDefaults
    licence: str


MOE_57B = MoEConfig(experts=64, active=8, expert_ffn=2560, shared_ffn=20480)
SHAPES = {
    "0.5b": ModelConfig(vocab=151936, layers=24, hidden=896, heads=14, kv_heads=2, ffn=4864, tied=True),
    "1.5b": ModelConfig(vocab=151936, layers=28, hidden=1536, heads=12, kv_heads=2, ffn=8960, tied=True),
    "7b": ModelConfig(vocab=152064, layers=28, hidden=3584, heads=28, kv_heads=4, ffn=18944),
    "57b-a14b": ModelConfig(vocab=151936, layers=28, hidden=3584, heads=28, kv_heads=4, ffn=18944, moe=MOE_57B),
    "72b": ModelConfig(vocab=152064, layers=80, hidden=8192, heads=64, kv_heads=8, ffn=29568),
}
HUB_SIZES = {"0.5b": "0.5B", "1.5b": "1.5B", "7b": "7B", "57b-a14b": "57B-A14B", "72b": "72B"}
BASE_GENERATION = GenerationDefaults(eos=(151643,), max_tokens=2048)
INSTRUCT_GENERATION = GenerationDefaults(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05, eos=(151645, 151643))


ROPE_THETA = 1_000_000.0
QWEN2_5_ONLY = {(36, 2048, 11008), (48, 5120, 13824), (64, 5120, 27648)}  # layers, hidden, ffn of 3B, 14B and 32B


def _releases() -> dict[str, Release]:
    table = {}
    for size, shape in SHAPES.items():
        licence = TONGYI if size == "72b" else APACHE
        penalty = 1.1 if size in ("0.5b", "1.5b") else 1.05
        hub = f"Qwen/Qwen2-{HUB_SIZES[size]}"
        instruct = replace(INSTRUCT_GENERATION, repetition_penalty=penalty)
        table[f"qwen2:{size}"] = Release(f"qwen2:{size}", f"{hub}-Instruct", shape, instruct, licence)
        base = replace(shape, context=131072, eos=(151643,))
        table[f"qwen2:{size}-base"] = Release(f"qwen2:{size}-base", hub, base, BASE_GENERATION, licence)
    return table


FAMILY = _releases()


def published_generation(config: ModelConfig) -> GenerationDefaults | None:
    """The sampling defaults of the released model of this shape; None where no released model has it.

    Qwen2.5 and its Coder models were published with the values of Qwen2's instruct models. A base model (its only end token is
    <|endoftext|>) is greedy. A model of another rope_theta is someone else's, or Qwen2.5-Math.
    """
    if config.rope_theta != ROPE_THETA:
        return None
    for release in FAMILY.values():
        same = (release.config.layers, release.config.hidden, release.config.ffn) == (config.layers, config.hidden, config.ffn)
        if same and release.config.eos[0] in config.eos and (release.config.moe is None) == (config.moe is None):
            return release.generation
    if (config.layers, config.hidden, config.ffn) in QWEN2_5_ONLY and config.moe is None:
        return INSTRUCT_GENERATION if 151645 in config.eos else BASE_GENERATION
    return None


def tiny(**changes: Any) -> ModelConfig:
    """A decoder of two layers and width 64 for tests; `changes` replace fields."""
    shape = ModelConfig(vocab=512, layers=2, hidden=64, heads=4, kv_heads=2, ffn=128, context=512, eos=(2,), bos=1, dtype="float32")
    return replace(shape, **changes)


def nano(**changes: Any) -> ModelConfig:
    """The size that a laptop trains in minutes: 8 layers, width 384, a vocabulary of 8,192; `changes` replace fields."""
    shape = ModelConfig(
        vocab=8192,
        layers=8,
        hidden=384,
        heads=6,
        kv_heads=2,
        ffn=1024,
        context=2048,
        rope_theta=10_000.0,
        tied=True,
        eos=(0,),
        bos=0,
        dtype="float32",
    )
    return replace(shape, **changes)
