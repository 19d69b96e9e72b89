"""The places where it matters that a run may have several ranks: everything the loop asks of them goes through a `World`.

Here is the world of one process. A distributed one has the same methods, and the loop knows no other difference. Gradients are sums
over ranks, never means: the loss is already divided by the number of targets of the whole step.

Ranks that read different rows are the data ranks (`data_rank` of `data_size`); those that share one row among them (tensor and
context parallel) have the same data rank, and `local` gives each its part of a batch.

    world = World()
    world.prepare(network, torch.float32)                    # once, before the optimizer is made
    batch = world.local(batch)
    (count,) = world.sum([float(batch.targets)])
    hidden = network(batch.tokens, world.attend(config, batch))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from qwen2.model import Qwen2, packed_attend
from qwen2.train.tensors import Digests, digests, read_tensors, write_tensors

if TYPE_CHECKING:
    from qwen2.config import ModelConfig
    from qwen2.data.batches import Batch
    from qwen2.model.attention import Attend

V = TypeVar("V")


class World:
    """One process on one device."""

    rank = 0  # of all; rank 0 writes metrics, names checkpoints and talks
    size = 1
    divided = False  # whether each rank has a part of the network only; one rank of a layout has DTensors too
    data_rank = 0  # which share of a step's rows this rank reads
    data_size = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    @property
    def main(self) -> bool:
        """Whether this rank is the one that writes and talks."""
        return self.rank == 0

    def new_network(self, config: ModelConfig, seed: int, dtype: torch.dtype) -> Qwen2:
        """A network with new weights, the same ones in every world; `prepare` it as any other."""
        return Qwen2(config, dtype=torch.float32).init_weights(torch.Generator().manual_seed(seed))

    def empty_network(self, config: ModelConfig, dtype: torch.dtype) -> Qwen2:
        """A network without numbers yet, prepared (`dtype` as there); `put` fills it."""
        return Qwen2(config, dtype=torch.float32, device="meta").to_empty(device=self.device)

    def put(self, parameter: Tensor, whole: Tensor) -> None:
        """Write a whole tensor into a parameter: of a network that is divided, this rank's part of it. No gradient may be recorded."""
        parameter.copy_(whole)

    def prepare(self, network: Qwen2, dtype: torch.dtype) -> None:
        """Bring the network to the device and divide it over ranks, in place; parameters keep their names.

        Gradients are summed over ranks, not averaged. `dtype`: what products are computed in.
        """
        network.to(self.device)

    def local(self, batch: Batch) -> Batch:
        """This rank's part of a batch that its data rank reads; its tensors on this rank's device."""
        return batch.to(self.device)

    def attend(self, config: ModelConfig, batch: Batch) -> Attend:
        """Attention for what `local` gave."""
        return packed_attend(config, batch.positions, batch.lengths)

    @contextmanager
    def accumulate(self, network: Qwen2, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch; only the `last` of a step has to exchange gradients."""
        yield

    def together(self, rows: Tensor) -> Tensor:
        """Rows (n, ...) of this rank's part of a micro-batch -> those of all its parts (N, ...), in an order of its own; differentiable."""
        return rows

    @contextmanager
    def evaluating(self, network: Qwen2) -> Iterator[None]:
        """Around forward passes that no backward pass follows."""
        yield

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, each having counted its own part of each batch; float64, and the same on every rank."""
        return list(values)

    def agreed(self, value: V) -> V:
        """What rank 0 has, on every rank."""
        return value

    def every(self, value: V) -> list[V]:
        """What each rank has, in their order, on every rank."""
        return [value]

    def any(self, value: bool) -> bool:
        """Whether it holds on any rank: what all must decide alike."""
        return value

    def grad_norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """The 2-norm of all gradients together, over all shards; a scalar on this rank's device."""
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> Digests:
        """Write named tensors into a folder that is there, and bring them to the disk; returns all files that now hold them."""
        return digests(folder, write_tensors(folder, tensors))

    def read(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Fill the tensors in place with those of the same names; ValueError where a name or a shape is not there."""
        if any(folder.glob("shard-*.safetensors")):  # several ranks wrote it
            from qwen2.train.sharded import read_shards

            read_shards(folder, tensors)
        else:
            read_tensors(folder, tensors)

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor that may be divided over ranks, whole; every rank has to call it."""
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Leave the others, at the end."""
