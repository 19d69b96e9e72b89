"""What GPUs and their links can do, as a table, and how long a collective operation takes on them.

Peaks are the makers' figures, per GPU and in one direction, for dense bfloat16. Two shares say how much of the arithmetic is reached:
`products` was fitted to the published runs of docs/scale.md as a whole, one number for each architecture; `attention` is what
FlashAttention-2 reaches (arXiv 2307.08691, table 1; for H100 arXiv 2407.08608, section 1). Links reach `LINK_SHARE` of their peak in
collectives.
What is left out: congestion, tiers of switches above the node, and links that differ inside a node.

    GPUS["h100"].flops, Group(size=8, stride=8, node=8).gather(2e9, GPUS["h100"]).seconds
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
LINK_SHARE = 0.8  # of a link's peak in large collectives: what NCCL's own tests report for NVLink and InfiniBand
HBM_SHARE = 0.8  # of the memory's peak in elementwise operations
LAUNCH = 20e-6  # seconds before a collective moves anything
HOP = 1e-6, 5e-6  # seconds a step of a ring takes inside a node, and between nodes


@dataclass(frozen=True)
class Gpu:
    """FLOP/s, bytes, bytes/s; `link` between GPUs of a node, `network` of each GPU out of it, both in one direction."""

    flops: float
    memory: float
    hbm: float
    link: float
    network: float
    products: float
    attention: float


GPUS = {
    "a100": Gpu(flops=312e12, memory=80 * GIB, hbm=2.039e12, link=300e9, network=25e9, products=0.70, attention=0.55),
    "h100": Gpu(flops=989.4e12, memory=80 * GIB, hbm=3.35e12, link=450e9, network=50e9, products=0.55, attention=0.35),
    "h200": Gpu(flops=989.4e12, memory=141e9, hbm=4.8e12, link=450e9, network=50e9, products=0.55, attention=0.35),
}


def gpu_named(name: str) -> Gpu:
    """The GPU of that name; ValueError naming the known ones."""
    if name.lower() not in GPUS:
        raise ValueError(f"GPU {name!r} is not known: {', '.join(GPUS)}")
    return GPUS[name.lower()]


@dataclass(frozen=True)
class Transfer:
    """What one collective costs a GPU: bytes over the node's links, bytes over the network, seconds."""

    link: float = 0.0
    network: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Transfer) -> Transfer:
        return Transfer(self.link + other.link, self.network + other.network, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Transfer:
        return Transfer(self.link * times, self.network * times, self.seconds * times)


@dataclass(frozen=True)
class Group:
    """`size` ranks whose numbers are `stride` apart, on nodes of `node` GPUs."""

    size: int
    stride: int
    node: int

    @property
    def nodes(self) -> int:
        """Nodes that the group is on."""
        return -(-self.size // self._fill)

    @property
    def local(self) -> int:
        """Members that share a node; where they do not come out even, those of the node with the fewest, which all wait for."""
        return self.size - (self.nodes - 1) * self._fill

    @property
    def _fill(self) -> int:
        return max(1, self.node // self.stride)

    def gather(self, nbytes: float, gpu: Gpu) -> Transfer:
        """An all-gather of `nbytes` in all, or a reduce-scatter, as a ring: it enters each node through all members' network cards."""
        if self.size == 1:
            return Transfer()
        received = nbytes * (self.size - 1) / self.size
        network = received / self.local if self.nodes > 1 else 0.0
        link = received if self._fill > 1 else 0.0
        hops = (self.size - self.nodes) * HOP[0] + self.nodes * HOP[1] * (self.nodes > 1)
        return Transfer(link, network, LAUNCH + hops + max(link / gpu.link, network / gpu.network) / LINK_SHARE)

    def exchange(self, nbytes: float, gpu: Gpu) -> Transfer:
        """An all-to-all in which each rank has `nbytes` that are meant for all alike."""
        if self.size == 1:
            return Transfer()
        link = nbytes * (self.local - 1) / self.size
        network = nbytes * (self.size - self.local) / self.size
        return Transfer(link, network, LAUNCH + max(link / gpu.link, network / gpu.network) / LINK_SHARE)
