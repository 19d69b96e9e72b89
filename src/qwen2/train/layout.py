"""How the ranks of a run are divided among data, context, expert and tensor parallelism, and which divisions a model allows.

Ranks are numbered with tensor innermost, then expert, context and data, so that the groups that talk most are neighbours, inside a node
where there is one. Every rank owns rows of its own: data and expert ranks read different sequences, context and tensor ranks share
the rows of theirs among them.

What is left out: pipeline stages, and replicas of the shards (hybrid sharding). Nothing here imports torch; `plan.py` counts with a
layout, `distributed.py` runs it.

    Layout(data=8, tensor=8).check(config)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen2.config import ModelConfig


@dataclass(frozen=True)
class Layout:
    """Ranks of each kind; their product is the number of processes, one for each GPU. Fields stand in the order of the mesh."""

    data: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"{field.name}-parallel {value}: must be at least 1")

    @property
    def ranks(self) -> int:
        return self.data * self.context * self.expert * self.tensor

    @property
    def data_size(self) -> int:
        """Ranks, or groups of ranks, that read different sequences."""
        return self.data * self.expert

    @property
    def expert_size(self) -> int:
        """Ranks that the experts of a layer are spread over: tensor ranks hold different ones too."""
        return self.expert * self.tensor

    @property
    def row_unit(self) -> int:
        """What the tokens of a micro-batch are padded to a multiple of: context ranks take two pieces each, tensor ranks parts of them."""
        return self.tensor * (2 * self.context if self.context > 1 else 1)

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError, with the values that would do, where the model cannot be divided this way."""
        if config.kv_heads % self.tensor:
            divisors = " or ".join(str(n) for n in range(1, config.kv_heads + 1) if config.kv_heads % n == 0)
            raise ValueError(f"tensor-parallel {self.tensor}: must divide the model's {config.kv_heads} key-value heads: {divisors}")
        widths = [config.ffn] if config.moe is None else [config.moe.shared_ffn, *([config.ffn] if has_dense_layers(config) else [])]
        for width in widths:
            if width % self.tensor:
                raise ValueError(f"tensor-parallel {self.tensor}: must divide the feed-forward width {width}")
        if config.moe is None:
            if self.expert > 1:
                raise ValueError(f"expert-parallel {self.expert}: the model has no experts; leave it at 1")
        elif config.moe.experts % self.expert_size:
            together = f"expert-parallel {self.expert} x tensor-parallel {self.tensor}"
            raise ValueError(f"{together}: must divide the model's {config.moe.experts} experts")

    def __str__(self) -> str:
        return (
            " x ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self) if getattr(self, field.name) > 1) or "one rank"
        )


def has_dense_layers(config: ModelConfig) -> bool:
    """Whether some layer has a plain feed-forward part."""
    return any(not config.is_moe(layer) for layer in range(config.layers))
