"""The one decoder and its parts: rotation, attention without a cache, mixture of experts."""

from qwen2.model.attention import Attend, packed_attend
from qwen2.model.moe import load_balancing_loss
from qwen2.model.packed import PackedEmbedding
from qwen2.model.qwen2 import Qwen2
from qwen2.model.rope import Rope, rotate

__all__ = ["Attend", "PackedEmbedding", "Qwen2", "Rope", "load_balancing_loss", "packed_attend", "rotate"]
