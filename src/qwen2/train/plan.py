"""What training a model on many GPUs takes, from its config alone: memory, traffic and step time of each layout.

It counts what `distributed.py` does: parameters, gradients and AdamW's two moments in float32, divided over all ranks; layers
gathered in bfloat16 when they are needed, forward and backward; gradients reduced in float32 at every micro-batch; rows gathered before
products that tensor ranks divide; keys and values gathered over context ranks; tokens sent to their experts. Every formula stands
in docs/scale.md with its source, beside published runs that it was held against.
What is left out: pipelines, hybrid sharding, documents shorter than a sequence (attention is counted over whole ones), experts that get
more than their share, reading rows (a thread makes those of the next step meanwhile), evaluation, checkpoints and stragglers.

    best(plans(Job(FAMILY["qwen2:72b"].config, gpus=64, gpu=GPUS["h100"])))
"""

# n rows that a rank owns, D hidden, H heads, K kv heads, d head size, F feed-forward width, A active experts, V vocabulary

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from qwen2.train.hardware import GIB, HBM_SHARE, Gpu, Group, Transfer
from qwen2.train.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qwen2.config import ModelConfig

HALF, FULL = 2, 4  # bytes of a bfloat16 and of a float32
LOGITS = 64 << 20  # bytes of a chunk's logits in float32 (train/loss.py)
RESERVE = 4 * GIB  # CUDA's context, NCCL's channels, the allocator's gaps
ADAMW_PASSES = 7  # reads of weight, gradient and moments, writes of weight and moments
NORM_BYTES = 6  # a norm keeps its input in float32 and the normed rows in bfloat16
CONTEXT_SEEN = 65_536  # tokens of a sequence up to which published runs with context ranks were met
SHARE_OF_SEQUENCE = 2048  # tokens of a sequence that a context rank has at least


@dataclass(frozen=True)
class Job:
    """What is to be trained, on what: a step is `batch_tokens` tokens in sequences of `sequence`; `memory` bytes a GPU may use."""

    config: ModelConfig
    gpus: int
    gpu: Gpu
    memory: float | None = None
    sequence: int = 4096
    batch_tokens: int = 4 << 20
    node: int = 8

    def __post_init__(self) -> None:
        for name in ("gpus", "sequence", "batch_tokens", "node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.gpus > self.node and self.gpus % self.node:
            raise ValueError(f"{self.gpus} GPUs on nodes of {self.node}: must be whole nodes")
        if self.sequence > self.config.context:
            raise ValueError(f"sequences of {self.sequence:,} tokens: the model is made for {self.config.context:,}")
        if self.batch_tokens % self.sequence:
            raise ValueError(f"a batch of {self.batch_tokens:,} tokens: must be whole sequences of {self.sequence:,}")

    @property
    def sequences(self) -> int:
        return self.batch_tokens // self.sequence

    @property
    def room(self) -> float:
        """Bytes that a GPU may use."""
        return self.gpu.memory if self.memory is None else self.memory


@dataclass(frozen=True)
class Plan:
    """One layout of a job: `micro` sequences at a time for each data rank, layers recomputed in the backward pass or not."""

    job: Job
    layout: Layout
    micro: int
    recompute: bool

    @property
    def unverified(self) -> dict[str, str]:
        """What of this layout no published run of docs/scale.md bears out, and how much longer the nearest one took than is counted."""
        found = {}
        if self.job.config.moe is not None:
            found["a mixture of experts"] = "a published one took 2 times as long as is counted"
        if self.layout.expert > 1:
            found["expert ranks"] = "no published run was found"
        if self.layout.context > 1:
            times = "1.1" if self.job.sequence <= CONTEXT_SEEN else "1.6 to 1.8"
            found["context ranks"] = f"published ones of one node took {times} times as long"
        return found

    # Parameters that one rank holds while a layer is gathered; all layers are counted as their mean.

    @cached_property
    def dense(self) -> float:
        """Of one layer, without experts: what tensor ranks divide, and norms and routers, which they do not."""
        config, layers = self.job.config, self.job.config.layers
        moe = config.moe
        small, matrices = 2.0 * config.hidden, float(config.attention_parameters())
        for layer in range(layers):
            if moe is not None and config.is_moe(layer):
                small += config.hidden * (moe.experts + 1) / layers
                matrices += 3 * config.hidden * moe.shared_ffn / layers
            else:
                matrices += 3 * config.hidden * config.ffn / layers
        return matrices / self.layout.tensor + small

    @cached_property
    def experts(self) -> float:
        """Of one layer's routed experts."""
        config = self.job.config
        if config.moe is None:
            return 0.0
        mixed = sum(config.is_moe(layer) for layer in range(config.layers)) / config.layers
        return mixed * 3 * config.hidden * config.moe.expert_ffn * config.moe.experts / self.layout.expert_size

    @cached_property
    def outer(self) -> float:
        """Embedding and head: gathered once a micro-batch and kept until its end."""
        return self.job.config.embedding_parameters() * (1 if self.job.config.tied else 2)

    # Rows.

    @property
    def micro_batches(self) -> int:
        return self.job.sequences // (self.layout.data_size * self.micro)

    @property
    def rows(self) -> float:
        """Tokens of a micro-batch that one rank owns."""
        return self.micro * self.job.sequence / (self.layout.context * self.layout.tensor)

    # Memory, bytes on one GPU.

    @property
    def weights(self) -> float:
        return FULL * self.job.config.parameters() / self.layout.ranks

    @property
    def gradients(self) -> float:
        return self.weights

    @property
    def optimizer(self) -> float:
        return 2 * self.weights

    @cached_property
    def kept_by_layer(self) -> float:
        """What one layer keeps for its backward pass, by row that a rank owns."""
        config, layout, moe = self.job.config, self.layout, self.job.config.moe
        D, kv = config.hidden, config.kv_heads * config.head_dim
        norms = 2 * NORM_BYTES * D
        inputs = 2 * HALF * D * layout.tensor  # of both parts, gathered over tensor ranks
        attention = HALF * (2 * D + 2 * kv) + FULL * config.heads  # rotated q and k, v, the output, a normaliser a head
        if layout.context > 1:
            attention += HALF * 2 * kv * layout.context  # all keys and values of the sequence
        mixed = sum(config.is_moe(layer) for layer in range(config.layers)) / config.layers
        feed_forward = 4 * HALF * config.ffn * (1 - mixed)  # gate, silu(gate), up, their product
        if moe is not None:
            copies = HALF * D * (2 if layout.expert_size == 1 else 4)  # sorted rows and results, also as they are sent
            feed_forward += mixed * (4 * HALF * moe.shared_ffn + moe.active * (4 * HALF * moe.expert_ffn + copies) + 3 * FULL * moe.experts)
        return norms + inputs + attention + feed_forward

    @cached_property
    def activations(self) -> float:
        """Kept at the most: all layers, or every layer's input and one layer anew."""
        layers = self.job.config.layers
        if self.recompute:
            return self.rows * (layers * HALF * self.job.config.hidden + self.kept_by_layer)
        return self.rows * layers * self.kept_by_layer

    @cached_property
    def buffers(self) -> float:
        """Gathered weights and gradients on their way, and the loss, when they are largest: at the loss, in a layer, or at the end."""
        layer, head = self.dense + self.experts, self.job.config.embedding_parameters()
        at_loss = 3 * LOGITS + (FULL + HALF) * head
        in_layer = layer * (2 * HALF + HALF + FULL) + HALF * head  # this and the next one's weights; its gradients, reduced in float32
        at_end = (HALF + FULL) * self.outer - self.activations
        return HALF * self.outer + max(at_loss, in_layer, at_end)

    @property
    def memory(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers + RESERVE

    @property
    def fits(self) -> bool:
        return self.memory <= self.job.room

    # Traffic of one micro-batch.

    def _group(self, size: int, stride: int) -> Group:
        return Group(size, stride, self.job.node)

    @cached_property
    def gathering(self) -> Transfer:
        """One layer's weights in bfloat16, over the ranks that hold their shards; twice this in float32 reduces its gradients."""
        layout, gpu = self.layout, self.job.gpu
        dense = self._group(layout.data * layout.context * layout.expert, layout.tensor).gather(HALF * self.dense, gpu)
        return dense + self._group(layout.data * layout.context, layout.expert_size).gather(HALF * self.experts, gpu)

    @cached_property
    def reducing(self) -> Transfer:
        layout, gpu = self.layout, self.job.gpu
        dense = self._group(layout.data * layout.context * layout.expert, layout.tensor).gather(FULL * self.dense, gpu)
        return dense + self._group(layout.data * layout.context, layout.expert_size).gather(FULL * self.experts, gpu)

    @cached_property
    def outer_transfer(self) -> Transfer:
        """Embedding and head, over all ranks: nothing is computed meanwhile."""
        group = self._group(self.layout.ranks, 1)
        return group.gather(HALF * self.outer, self.job.gpu) + group.gather(FULL * self.outer, self.job.gpu)

    @cached_property
    def sharing(self) -> Transfer:
        """One layer's forward pass: rows over tensor ranks, keys and values over context ranks, tokens to their experts and back."""
        config, layout, gpu, moe = self.job.config, self.layout, self.job.gpu, self.job.config.moe
        rows_of_tensor_group = self.rows * layout.tensor
        total = self._group(layout.tensor, 1).gather(HALF * rows_of_tensor_group * config.hidden, gpu) * 4
        kv = 2 * config.kv_heads * config.head_dim / layout.tensor
        total += self._group(layout.context, layout.expert_size).gather(HALF * rows_of_tensor_group * layout.context * kv, gpu)
        if moe is not None:
            total += self._group(layout.expert_size, 1).exchange(HALF * self.rows * moe.active * config.hidden, gpu) * 2
        return total

    # Time, seconds.

    @cached_property
    def computing(self) -> tuple[float, float]:
        """One layer's arithmetic, forward and backward without recomputing it."""
        config, gpu = self.job.config, self.job.gpu
        products = config.flops_per_token(-1, head=False) / config.layers * self.rows / (gpu.flops * gpu.products)
        products = max(products, HALF * (self.dense + self.experts) / (gpu.hbm * HBM_SHARE))  # few rows: reading the weights takes longer
        scores = 4 * config.hidden * (self.job.sequence + 1) / 2 * self.rows / (gpu.flops * gpu.attention)
        passes = self.kept_by_layer * self.rows / (gpu.hbm * HBM_SHARE)
        return products + scores + 2 * passes, 2 * products + 2.5 * scores + 3 * passes

    @cached_property
    def head_seconds(self) -> float:
        gpu = self.job.gpu
        return 6 * self.job.config.embedding_parameters() * self.rows / (gpu.flops * gpu.products)

    @property
    def step(self) -> float:
        """Seconds of an optimizer step. Gathering and reducing layers goes on while they are computed; all other traffic is waited for."""
        forward, backward = self.computing
        forward += self.sharing.seconds
        backward += self.sharing.seconds + (forward if self.recompute else 0.0)
        gather, reduce = self.gathering.seconds, self.reducing.seconds
        layers = self.job.config.layers * (max(forward, gather) + max(backward, gather + reduce))
        micro = layers + gather + reduce + self.head_seconds + self.outer_transfer.seconds
        return self.micro_batches * micro + ADAMW_PASSES * self.weights / (self.job.gpu.hbm * HBM_SHARE)

    @property
    def traffic(self) -> Transfer:
        """Bytes of a step by link, in and out of one GPU alike; `seconds` is what they would take one after another."""
        layers = self.gathering * 2 + self.reducing + self.sharing * (3 if self.recompute else 2)
        return (layers * self.job.config.layers + self.outer_transfer) * self.micro_batches

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.job.batch_tokens / self.step

    @property
    def utilisation(self) -> float:
        """Model FLOPs (forward and backward, attention over what is visible, nothing computed twice) by the peak."""
        config, job = self.job.config, self.job
        scores = 4 * config.layers * config.hidden * (job.sequence + 1) / 2
        flops = 3 * (config.flops_per_token(-1) + scores)
        return flops * self.tokens_per_second / (job.gpus * job.gpu.flops)


def plans(job: Job) -> list[Plan]:
    """The best way to run each possible layout, fastest first, then those that do not fit, the smallest first.

    Raises ValueError where no layout can divide the batch.
    """
    allowed = list(layouts(job))
    found = [_choose(list(_ways(job, layout))) for layout in allowed]
    possible = [plan for plan in found if plan is not None]
    if not possible:
        raise ValueError(_cannot_divide(job, allowed))
    return sorted(possible, key=lambda plan: (not plan.fits, plan.step if plan.fits else plan.memory))


def _cannot_divide(job: Job, allowed: list[Layout]) -> str:
    """Why no layout is possible, and which batch would be."""
    if not allowed:
        return f"{job.gpus:,} GPUs: the model cannot be divided over so many; give another number of --gpus, a power of two divides best"
    divisor = min(layout.data_size for layout in allowed)
    near = max(1, round(job.sequences / divisor)) * divisor
    return (
        f"{job.sequences:,} sequences a step cannot be divided over {job.gpus:,} GPUs: all layouts have a multiple of {divisor:,} that "
        f"read different ones; take --batch-tokens {near * job.sequence} ({near:,} sequences of {job.sequence:,}) or other --gpus"
    )


def best(found: Iterable[Plan]) -> Plan | None:
    """The fastest that fits."""
    return next((plan for plan in found if plan.fits), None)


def layouts(job: Job) -> Iterator[Layout]:
    """Every division of the GPUs that the model allows: tensor ranks inside a node, all but data in powers of two, no slivers."""
    powers = [1 << n for n in range(job.gpus.bit_length())]
    for tensor in (n for n in powers if n <= job.node):
        for expert in powers if job.config.moe is not None else [1]:
            for context in powers:
                data, rest = divmod(job.gpus, tensor * expert * context)
                if not data or rest or (context > 1 and job.sequence // context < SHARE_OF_SEQUENCE):
                    continue
                layout = Layout(data, context, expert, tensor)
                if job.sequence % layout.row_unit == 0 and _allowed(layout, job.config):
                    yield layout


def _allowed(layout: Layout, config: ModelConfig) -> bool:
    try:
        layout.check(config)
    except ValueError:
        return False
    return True


def _ways(job: Job, layout: Layout) -> Iterator[Plan]:
    sequences, rest = divmod(job.sequences, layout.data_size)
    if rest:
        return
    for micro in (n for n in range(1, sequences + 1) if sequences % n == 0):
        for recompute in (False, True):
            yield Plan(job, layout, micro, recompute)


def _choose(ways: list[Plan]) -> Plan | None:
    fitting = [plan for plan in ways if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: plan.step)
    return min(ways, key=lambda plan: plan.memory, default=None)
