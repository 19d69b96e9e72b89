"""How long a fine-tuning run will take here and how much memory, before it begins.

Time: the arithmetic of all tokens over the rate of this machine's matrix product, of which training reaches a share (`REACHED`, measured
on two cores; short rows reach less). Memory: what every weight takes, and what a micro-batch keeps for the backward pass. Both are meant
to choose settings by, not to bill by: within a third of what runs have measured.

    expected(config, settings, tokens=100_000, learned=40_000, lora=None, packed_bytes=0, rate=2e11).seconds
"""

# D hidden, F feed-forward width, V vocabulary

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen2.config import ModelConfig
    from qwen2.config.lora import LoraSettings
    from qwen2.post.finetuning.settings import SftSettings

REACHED = 0.5  # of the matrix product's rate
FULL = 4  # bytes of a float32
STATE = 4 * FULL  # a trained weight, its gradient and both moments
PROCESS = 0.5e9  # Python, torch, the tokenizer
CHUNK = 3 * (64 << 20)  # the loss: a chunk's logits and what is made of them


@dataclass(frozen=True)
class Expected:
    """Seconds of the whole run, and bytes at its peak: of the weights with all that belongs to them, and of a micro-batch."""

    seconds: float
    weights: float
    activations: float

    @property
    def memory(self) -> float:
        return self.weights + self.activations + PROCESS


def expected(
    config: ModelConfig,
    settings: SftSettings,
    tokens: int,
    learned: int,
    lora: LoraSettings | None,
    packed_bytes: int,
    rate: float,
    half: bool,
) -> Expected:
    """Of a run over `tokens` tokens in all, `learned` of which have a loss.

    `packed_bytes`: of a base that stays in blocks, else 0. `rate`: the matrix product's, in FLOP/s. `half`: products in bfloat16.
    """
    passes = (2 if lora is None else 1) + (1 if settings.recompute == "layers" else 0)  # beside the forward one; gradients of weights
    matrices = 2 * config.non_embedding_parameters(active_only=True) * (1 + passes) * tokens
    head = 2 * config.embedding_parameters() * (3 if lora is None else 2) * learned
    row = min(settings.length, tokens)
    scores = 4 * config.layers * config.hidden * (row / 4) * (1 + passes) * tokens  # examples are parts of rows
    adapters = 0 if lora is None else adapter_parameters(config, lora)
    seconds = (matrices + head + scores + 6 * adapters * tokens) / (rate * REACHED)
    return Expected(seconds, weight_bytes(config, settings, lora, packed_bytes), activation_bytes(config, settings, lora, half))


def weight_bytes(config: ModelConfig, settings: SftSettings, lora: LoraSettings | None, packed_bytes: int) -> float:
    """Weights, and for those that are trained gradients, moments and an average."""
    state = STATE + (FULL if settings.average != "none" else 0)
    if lora is None:
        return config.parameters() * state + config.embedding_parameters() * FULL  # the head's gradient, on its way
    return (packed_bytes or FULL * config.parameters()) + adapter_parameters(config, lora) * state


def activation_bytes(config: ModelConfig, settings: SftSettings, lora: LoraSettings | None, half: bool) -> float:
    """What a micro-batch of full rows keeps for the backward pass, and the loss's chunks."""
    D, kv, width = config.hidden, config.kv_heads * config.head_dim, 2 if half else FULL
    moe = config.moe
    ffn = sum(moe.active * moe.expert_ffn + moe.shared_ffn if moe and config.is_moe(i) else config.ffn for i in range(config.layers))
    layer = 2 * FULL * D + width * (2 * D + 2 * D + 2 * kv)  # the residual stream, inputs, q, k, v and the output of attention
    rows = settings.at_once * settings.length
    kept = float(rows * (config.layers * layer + 3 * width * ffn))
    if settings.recompute == "layers":
        kept = rows * config.layers * FULL * D + kept / config.layers
    return kept + 3 * FULL * rows * D + CHUNK


def adapter_parameters(config: ModelConfig, lora: LoraSettings) -> int:
    """Numbers of the adapters of all dense layers that are meant, by their shapes."""
    D, kv, F = config.hidden, config.kv_heads * config.head_dim, config.ffn
    shapes = {
        "q_proj": D + D,
        "k_proj": D + kv,
        "v_proj": D + kv,
        "o_proj": D + D,
        "gate_proj": D + F,
        "up_proj": D + F,
        "down_proj": F + D,
    }
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    names = {name.rpartition(".")[2] for name in lora.names}
    chosen = set(shapes) if "all-linear" in names else names | (set(attention) if "attention" in names else set())
    return config.layers * lora.rank * sum(size for name, size in shapes.items() if name in chosen)
