"""Rotary position embedding, plain and stretched by YaRN.

Sources: RoPE, arXiv 2104.09864; YaRN, arXiv 2309.00071, section 3.2, with the ramp over dimension indices that every published
implementation uses. All tables are float32, computed with the reference's own order of operations: at position 100,000 one unit
in the last place of an inverse frequency is already a thousandth of a turn.

What is left out: which rotation a query or key gets when there are several (dual chunk attention); that is the caller's.
"""

# N tokens of a ragged batch, H heads, d head size

from __future__ import annotations

from math import ceil, floor, log, pi
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qwen2.config import ModelConfig, RopeScaling

KEPT_AHEAD = 4096  # positions for which rotations are computed before they are needed


class Rope:
    """The rotation of one model: inverse frequencies and the factor on cos and sin.

    `inv_freq` (d/2,) float32 in radians a position; `scale` is 1 without YaRN.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        self.inv_freq, self.scale = inv_frequencies(config)
        self.inv_freq = self.inv_freq.to(device)
        empty = torch.empty(0, len(self.inv_freq))
        self._kept: tuple[Tensor, Tensor] = (empty, empty)  # cos and sin of the positions from 0 on, as far as they were needed

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for `positions` (N,), each (N, 1, d/2), ready to broadcast over heads."""
        angles = positions[:, None, None].to(torch.float32) * self.inv_freq  # (N, 1, d/2)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)

    def rows(self, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """cos and sin in float32 for runs of positions (start, count) end to end, each (N, d/2); of a single run a view."""
        last = max(start + count for start, count in spans)
        if last > len(self._kept[0]):
            cos, sin = self.tables(torch.arange(max(last, min(2 * last, last + KEPT_AHEAD)), device=self.inv_freq.device), torch.float32)
            self._kept = cos[:, 0], sin[:, 0]
        cos, sin = self._kept
        if len(spans) == 1:
            (start, count) = spans[0]
            return cos[start : start + count], sin[start : start + count]
        return tuple(torch.cat([table[start : start + count] for start, count in spans]) for table in (cos, sin))  # type: ignore[return-value]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) of x (N, H, d) by its angle: the "half" layout that Qwen2 checkpoints use."""
    first, second = x.chunk(2, dim=-1)  # (N, H, d/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def inv_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """The inverse frequencies (d/2,) float32 and the attention factor, from rope_theta and the scaling."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).to(torch.float32) / config.head_dim
    plain = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling is None:
        return plain, 1.0
    return _yarn(plain, config.rope_theta, config.head_dim, config.rope_scaling), config.rope_scaling.attention_scale


def _yarn(plain: Tensor, theta: float, d: int, scaling: RopeScaling) -> Tensor:
    """Fast dimensions stay, slow ones are divided by the factor, those between are mixed along a linear ramp."""

    def dimension(rotations: float) -> float:
        """The (fractional) dimension that turns `rotations` times over the original context."""
        return d * log(scaling.original_context / (rotations * 2 * pi)) / (2 * log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001  # as the reference: a step, not a division by zero
    ramp = ((torch.arange(d // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp  # the reference's order of operations, to the last bit
    return plain / scaling.factor * (1 - kept) + plain * kept
