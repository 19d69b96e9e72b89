"""A run on several ranks: data (FSDP2), context, expert and tensor parallelism over one mesh of them.

Every rank owns rows, and what one rank computes of a loss is a sum over its own rows: losses and gradients are summed over all ranks.
Parameters are DTensors, divided over all ranks whatever the layout: tensor and expert ranks have parts of their own, the other ranks
shards of these (`fully_shard`), gathered a layer at a time. Names stay those of the network. Under the modules all tensors are local
(parallel.py).

What is left out: pipelines, hybrid sharding, and ranks that come or go while a run goes on; a run that lost one ends, and resumes with
any number of ranks.

    torchrun --nproc-per-node 2 -m qwen2 pretrain SHARDS --out run --size nano --tensor-parallel 2
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from qwen2.data.batches import IGNORE, Batch
from qwen2.model import Qwen2, packed_attend
from qwen2.model.linear import Linear
from qwen2.model.lora import lora_parameters
from qwen2.model.qwen2 import MoE, RMSNorm
from qwen2.train.layout import Layout
from qwen2.train.optim import own_part
from qwen2.train.parallel import Gather, SpreadExperts, TensorAttention, TensorMLP, context_attend, local_class, rows_of
from qwen2.train.sharded import own_files, read_shards, write_shards
from qwen2.train.tensors import Digests, digests
from qwen2.train.world import World

if TYPE_CHECKING:
    from qwen2.config import ModelConfig
    from qwen2.model.attention import Attend

V = TypeVar("V")


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun started together."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def open_world(device: str, data: int | None, context: int, expert: int, tensor: int) -> World:
    """The world that the command line asks for; `data` None takes the ranks that the other kinds leave.

    ValueError where the number of processes is another, or a machine has fewer GPUs than processes.
    """
    ranks = int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else 1
    others = Layout(1, context, expert, tensor)
    layout = Layout(max(1, ranks // others.ranks) if data is None else data, context, expert, tensor)
    if layout.ranks != ranks:
        start, there = f"torchrun --nproc-per-node {layout.ranks} -m qwen2 pretrain ...", "is 1" if ranks == 1 else f"are {ranks}"
        raise ValueError(f"{layout} takes {layout.ranks} processes, and there {there}: {start} starts them")
    if not started_by_torchrun():
        return World(device)
    place = torch.device(device)
    if place.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many")
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    logging.getLogger("torch.distributed.tensor._redistribute").addFilter(other_than_order)
    if first := not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return DistributedWorld(place, layout, owned=first)


def other_than_order(record: logging.LogRecord) -> bool:
    """Keeps back one of torch's remarks: that experts, which expert ranks and data ranks divide both, are gathered in two operations.

    It is so at a run's end and wherever one tensor is asked for whole, where time does not matter.
    """
    return not record.getMessage().startswith("While redistributing from")


class DistributedWorld(World):
    """This process among those of a layout, whose group has been initialised; `close` ends it where it is `owned`."""

    divided = True

    def __init__(self, device: torch.device | str, layout: Layout, owned: bool = False) -> None:
        super().__init__(device)
        self.layout, self.owned = layout, owned
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        names = ("data", "context", "expert", "tensor")
        sizes = (layout.data, layout.context, layout.expert, layout.tensor)
        self.mesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=names)
        self.everyone = self.mesh[names]._flatten("everyone")
        self.shard_mesh = self.mesh["data", "context", "expert"]._flatten("shards")
        self.expert_shard_mesh = self.mesh["data", "context"]._flatten("expert_shards")
        self.expert_mesh = self.mesh["expert", "tensor"]._flatten("experts")
        place = {name: self.mesh.get_local_rank(name) for name in names}
        self.context_rank, self.tensor_rank = place["context"], place["tensor"]
        self.data_rank, self.data_size = place["data"] * layout.expert + place["expert"], layout.data_size
        self.context_group, self.tensor_group = self.mesh.get_group("context"), self.mesh.get_group("tensor")

    # The network.

    @torch.no_grad()
    def new_network(self, config: ModelConfig, seed: int, dtype: torch.dtype) -> Qwen2:
        """Divided without memory first, then every rank draws each parameter in turn and keeps its own part of it."""
        network = self.empty_network(config, dtype)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in network.named_parameters():
            whole = torch.empty(parameter.shape)
            network.init_weight(name, whole, generator)
            self.put(parameter, whole)
        return network

    def empty_network(self, config: ModelConfig, dtype: torch.dtype) -> Qwen2:
        network = Qwen2(config, dtype=torch.float32, device="meta")
        self.prepare(network, dtype)
        return network.to_empty(device=self.device)

    def put(self, parameter: Tensor, whole: Tensor) -> None:
        divided: Any = parameter  # a DTensor
        shape, offset = compute_local_shape_and_global_offset(divided.shape, divided.device_mesh, divided.placements)
        own_part(parameter).copy_(whole[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))])

    def prepare(self, network: Qwen2, dtype: torch.dtype) -> None:
        """As `World.prepare`; on GPUs weights are of `dtype` while they are gathered, their shards stay float32.

        ValueError where the model does not allow the layout.
        """
        if isinstance(network, FSDPModule):  # a new network is divided before it has weights
            return
        self.layout.check(network.config)
        if self.layout.tensor > 1 and lora_parameters(network):
            raise ValueError("adapters are not divided over tensor ranks: leave --tensor out")
        gathered = dtype if self.device.type == "cuda" and dtype != torch.float32 else None  # on CPUs autocast does it (model/training.py)
        policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32)
        for layer in network.model.layers:
            if isinstance(layer.mlp, MoE) and self.layout.expert_size > 1:
                self._spread(layer.mlp)
                fully_shard(layer.mlp.experts, mesh=self.expert_shard_mesh, mp_policy=policy)
            if self.layout.tensor > 1:
                self._divide(layer)
            fully_shard(layer, mesh=self.shard_mesh, mp_policy=policy)
        fully_shard(network, mesh=self.everyone, mp_policy=policy)
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # sums over ranks, not means
                module.set_force_sum_reduction_for_comms(True)

    def _spread(self, mixture: MoE) -> None:
        experts: Any = mixture.experts
        experts.__class__ = local_class(SpreadExperts, ("gate_up_proj", "down_proj"))
        experts.group = self.expert_mesh.get_group()
        for name in ("gate_up_proj", "down_proj"):
            divide(experts, name, self.expert_mesh, Shard(0))

    def _divide(self, layer: Any) -> None:
        """Heads and feed-forward width over tensor ranks; every other parameter of the layer is on all of them."""
        attention, mlp = layer.self_attn, layer.mlp.shared_expert if isinstance(layer.mlp, MoE) else layer.mlp
        attention.__class__, mlp.__class__ = TensorAttention, TensorMLP
        attention.group = mlp.group = self.tensor_group
        rows = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        columns = (attention.o_proj, mlp.down_proj)
        module: Any
        for module in [module for module in layer.modules() if isinstance(module, (Linear, RMSNorm))]:
            kind: Any = type(module)
            module.__class__ = local_class(kind, ("weight", "bias") if isinstance(module, Linear) else ("weight",))
            for name in [name for name, parameter in module._parameters.items() if parameter is not None]:
                place = Shard(0) if module in rows else Shard(1) if module in columns else Replicate()
                divide(module, name, self.mesh["tensor"], place)

    # Batches.

    def local(self, batch: Batch) -> Batch:
        """What this rank has: its tokens, their labels and rows, with the positions and lengths of all that its group shares.

        What cannot be shared out evenly is filled up with tokens that are a sequence of their own and no targets.
        """
        N, layout = len(batch.tokens), self.layout
        if layout.context * layout.tensor == 1:
            return batch.to(self.device)
        missing = -N % layout.row_unit
        if missing:
            tokens, labels = batch.tokens.new_zeros(missing), batch.labels.new_full((missing,), IGNORE)
            positions = torch.cat((batch.positions, torch.arange(missing).to(batch.positions)))
            lengths = (*batch.lengths, missing)
            filled = torch.cat((batch.rows, batch.rows[-1:].expand(missing)))
            batch = Batch(torch.cat((batch.tokens, tokens)), torch.cat((batch.labels, labels)), positions, lengths, filled)
        rows = rows_of(self.context_rank, layout.context, N + missing).chunk(layout.tensor)[self.tensor_rank].to(batch.tokens.device)
        own = replace(batch, tokens=batch.tokens[rows], labels=batch.labels[rows], rows=batch.rows[rows])
        return own.to(self.device)

    def attend(self, config: ModelConfig, batch: Batch) -> Attend:
        if self.layout.context == 1:
            return packed_attend(config, batch.positions, batch.lengths)
        return context_attend(config, batch.positions, batch.lengths, self.context_group)

    def together(self, rows: Tensor) -> Tensor:
        for size, group in ((self.layout.tensor, self.tensor_group), (self.layout.context, self.context_group)):
            rows = rows if size == 1 else Gather.apply(rows, group)
        return rows

    @contextmanager
    def evaluating(self, network: Qwen2) -> Iterator[None]:
        try:
            yield
        finally:
            for module in network.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # embedding and head stay gathered behind a forward pass, for the head's gradient

    # Numbers.

    def sum(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, value: bool) -> bool:
        return self.sum([float(value)])[0] > 0

    def agreed(self, value: V) -> V:
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def every(self, value: V) -> list[V]:
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value)
        return boxes

    def grad_norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """Each element counts once, also where several ranks hold it."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch._foreach_norm([own_part(gradient) for gradient in gradients], 2.0)
        squares = [norm.double().square() / copies(gradient) for norm, gradient in zip(norms, gradients, strict=True)]
        total = torch.stack(squares).sum()
        dist.all_reduce(total)
        return total.sqrt().float()

    # Checkpoints.

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> Digests:
        """As `World.write`; each rank reads its own file for the digest."""
        write_shards(folder, tensors)
        mine: Digests | OSError
        try:
            mine = digests(folder, sorted(path.name for path in folder.glob(own_files(self.rank))))
        except OSError as error:
            mine = error
        found: Digests = {}
        for part in self.every(mine):
            if isinstance(part, OSError):
                raise part
            found |= part
        return found

    def read(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        read_shards(folder, tensors)

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def barrier(self) -> None:
        dist.barrier()

    def close(self) -> None:
        if self.owned:
            dist.destroy_process_group()


def divide(module: nn.Module, name: str, mesh: Any, place: Placement) -> None:
    """Replace a parameter by this rank's part of it; all ranks hold the same one."""
    whole = module._parameters[name]
    assert whole is not None
    module.register_parameter(name, nn.Parameter(distribute_tensor(whole.detach(), mesh, [place], src_data_rank=None)))


def copies(tensor: Tensor) -> int:
    """How many ranks hold each of its elements."""
    if not isinstance(tensor, DTensor):
        return 1
    count = 1
    for dimension, place in enumerate(tensor.placements):
        count *= tensor.device_mesh.size(dimension) if isinstance(place, Replicate) else 1
    return count
