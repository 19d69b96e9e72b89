"""The configuration of one Qwen2-family decoder, and what follows from it by counting.

What is left out: reading and writing the formats of others (`hf.py`, `gguf.py`), and the released models (`family.py`).
Nothing here imports torch, so that `qwen2 show NAME --config` answers at once.

    ModelConfig(vocab=151936, layers=24, hidden=896, heads=14, kv_heads=2, ffn=4864, tied=True).parameters()   # 494032768
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (arXiv 2309.00071): stretches the context `original_context` by `factor`.

    `attention_factor` None means the paper's 0.1 ln(factor) + 1; `truncate` rounds the ramp's bounds to whole dimensions, as
    every published implementation does.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ValueError(f"rope scaling factor {self.factor}: YaRN stretches, so it must be at least 1")
        if self.original_context < 1:
            raise ValueError(f"rope scaling original_max_position_embeddings {self.original_context}: must be at least 1")
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(f"rope scaling beta_fast {self.beta_fast} and beta_slow {self.beta_slow}: need beta_fast > beta_slow > 0")

    @property
    def attention_scale(self) -> float:
        """What cos and sin are multiplied by (the paper's square root of 1/t)."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * log(self.factor) + 1.0


@dataclass(frozen=True)
class DualChunkConfig:
    """Dual chunk attention (arXiv 2402.17463) as Qwen2.5-1M configs state it: `chunk - local` is the paper's chunk size s."""

    chunk: int
    local: int
    original_context: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.local < self.chunk:
            raise ValueError(f"dual chunk attention: local_size {self.local} must lie between 0 and chunk_size {self.chunk}")

    @property
    def plain_context(self) -> int:
        """Positions up to which dual chunk attention equals plain attention."""
        return self.chunk - self.local


@dataclass(frozen=True)
class MoEConfig:
    """Fine-grained routed experts beside one gated shared expert (Qwen2 report, section 2.2.2)."""

    experts: int
    active: int
    expert_ffn: int
    shared_ffn: int
    norm_topk: bool = False
    aux_coef: float = 0.001
    sparse_step: int = 1
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("experts", "active", "expert_ffn", "shared_ffn", "sparse_step"):
            _positive(name, getattr(self, name))
        if self.active > self.experts:
            raise ValueError(f"{self.active} active experts of {self.experts}: at most all of them can be active")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one decoder: a row of the family table. Lengths in tokens, widths in elements.

    Raises ValueError where the numbers do not fit together.
    """

    vocab: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    context: int = 32768
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    tied: bool = False
    rope_scaling: RopeScaling | None = None
    dual_chunk: DualChunkConfig | None = None
    moe: MoEConfig | None = None
    bos: int | None = 151643
    eos: tuple[int, ...] = (151645,)
    dtype: str = "bfloat16"
    init_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab", "layers", "hidden", "heads", "kv_heads", "ffn", "context"):
            _positive(name, getattr(self, name))
        if self.hidden % self.heads or self.head_dim % 2:
            raise ValueError(f"hidden size {self.hidden} over {self.heads} heads: the head size must be a whole even number")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads over {self.kv_heads} key-value heads: each must serve the same number of heads")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}: must be one of {', '.join(DTYPES)}")
        if not self.rope_theta > 0 or not self.norm_eps > 0:
            raise ValueError(f"rope_theta {self.rope_theta} and rms_norm_eps {self.norm_eps} must be above 0")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def queries_per_kv_head(self) -> int:
        return self.heads // self.kv_heads

    @property
    def window(self) -> int:
        """Positions the model can attend over: what it was trained to, stretched by YaRN, or one chunk of dual chunk attention."""
        if self.rope_scaling is not None:
            return max(self.context, int(self.rope_scaling.original_context * self.rope_scaling.factor))
        if self.dual_chunk is not None:
            return min(self.context, self.dual_chunk.plain_context)
        return self.context

    def is_moe(self, layer: int) -> bool:
        """Whether this layer routes to experts: every `sparse_step`-th one, except those named dense."""
        return self.moe is not None and layer not in self.moe.dense_layers and (layer + 1) % self.moe.sparse_step == 0

    # Counts: exact, by the shapes that model/qwen2.py allocates; tests hold the two against each other.

    def embedding_parameters(self) -> int:
        """Elements of the token embedding; the output head has as many again when untied."""
        return self.vocab * self.hidden

    def attention_parameters(self) -> int:
        """Of one layer: q and o, k and v, their biases (o has none)."""
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2 * self.hidden * q_width + q_width + 2 * (self.hidden * kv_width + kv_width)

    def ffn_parameters(self, layer: int, active_only: bool = False) -> int:
        """Of one layer's feed-forward part: gate, up and down, or the router, experts and gated shared expert."""
        if self.moe is None or not self.is_moe(layer):
            return 3 * self.hidden * self.ffn
        moe = self.moe
        routed = moe.active if active_only else moe.experts
        router_and_gate = self.hidden * moe.experts + self.hidden
        return 3 * self.hidden * (routed * moe.expert_ffn + moe.shared_ffn) + router_and_gate

    def non_embedding_parameters(self, active_only: bool = False) -> int:
        """Everything but the token embedding and the output head."""
        per_layer = self.attention_parameters() + 2 * self.hidden
        ffn = sum(self.ffn_parameters(layer, active_only) for layer in range(self.layers))
        return self.layers * per_layer + ffn + self.hidden

    def parameters(self, active_only: bool = False) -> int:
        """All parameters; a tied embedding counts once."""
        return self.non_embedding_parameters(active_only) + self.embedding_parameters() * (1 if self.tied else 2)

    def active_parameters(self) -> int:
        """Parameters that one token passes through (embedding and head counted as in `parameters`)."""
        return self.parameters(active_only=True)

    def flops_per_token(self, position: int = 0, head: bool = True) -> int:
        """Forward multiply-adds counted as two, for a token that sees `position` earlier ones and itself.

        Matrix products and attention scores; norms, biases, rotations and the soft-max are left out, as the field does.
        """
        per_layer = self.attention_parameters() - (self.heads + 2 * self.kv_heads) * self.head_dim
        matrices = self.layers * per_layer + sum(self.ffn_parameters(layer, active_only=True) for layer in range(self.layers))
        attention = 2 * self.layers * self.heads * self.head_dim * (position + 1)
        return 2 * (matrices + attention + (self.embedding_parameters() if head else 0))

    def cache_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Key-value cache of one position over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_element

    # The formats of others.

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], file: str = "config.json") -> ModelConfig:
        """Read a Hugging Face config.json; every key is consumed or named in a ValueError, with the `file`."""
        from qwen2.config.hf import config_from_hf

        return config_from_hf(values, file)

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers loads as the same model."""
        from qwen2.config.hf import config_to_hf

        return config_to_hf(self)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
        """Read a GGUF header's metadata and tensor shapes (rows first); every architecture key is consumed or named."""
        from qwen2.config.gguf import config_from_gguf

        return config_from_gguf(metadata, shapes)

    def to_gguf(self, name: str = "") -> dict[str, Any]:
        """The GGUF metadata keys that describe this model."""
        from qwen2.config.gguf import config_to_gguf

        return config_to_gguf(self, name)


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} {value!r}: must be a whole number above 0")
