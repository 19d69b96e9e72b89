"""What one call of the native library may touch, copied to the program that runs it for another processor, and back (remote.py)."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import TYPE_CHECKING, Any, TypeVar

from qwen2.kernels.calls import (
    AdditionsStruct,
    AdditionStruct,
    AttentionStruct,
    FeedForwardStruct,
    LayerStruct,
    MatrixStruct,
    MixtureStruct,
    ProductStruct,
    SearchStruct,
)
from qwen2.kernels.training import EntropyStruct, NormStruct, TrainAttentionStruct

if TYPE_CHECKING:
    from tests.kernels.remote import Remote

Struct = TypeVar("Struct", bound=ctypes.Structure)


class Copies:
    """What one call may touch, over there. A method for each function that takes addresses gives its arguments as they are there."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self._places: dict[tuple[int, int], int] = {}
        self._taken: list[tuple[int, int]] = []
        self._back: list[tuple[int, int, int, int, int]] = []
        self._files: list[int] = []

    def bytes(self, data: bytes) -> int:
        place = self.remote.take(data)
        self._taken.append((place, len(data)))
        return place

    def memory(self, address: int | None, size: int, back: bool = False) -> int:
        """`size` bytes at an address here, which come back after the call if it may change them."""
        return self.table(address, 1, size, size, back)

    def table(self, address: int | None, rows: int, width: int, stride: int, back: bool = False) -> int:
        """Rows of `width` bytes that begin every `stride`. What lies between them is neither read nor written back."""
        if not address or rows == 0 or width == 0:
            return 0
        size = (rows - 1) * stride + width
        if (address, size) not in self._places:
            self._places[address, size] = self.bytes(ctypes.string_at(address, size))
        place = self._places[address, size]
        if back and (place, address, rows, width, stride) not in self._back:
            self._back.append((place, address, rows, width, stride))
        return place

    def finish(self) -> None:
        for place, address, rows, width, stride in self._back:
            data = self.remote.ask(b"r", place, (rows - 1) * stride + width, b"", (rows - 1) * stride + width)
            for row in range(rows):
                ctypes.memmove(address + row * stride, data[row * stride : row * stride + width], width)
        for place, size in self._taken:
            self.remote.ask(b"g", place, size, b"", 0)
        for file in self._files:
            self.remote.ask(b"x", file, 0, b"", 0)

    def file(self, number: int) -> int:
        """The number over there of a file that is open here."""
        path = os.readlink(f"/proc/self/fd/{number}").encode()
        self._files.append(int.from_bytes(self.remote.ask(b"o", len(path), 0, path, 8), "little", signed=True))
        if self._files[-1] < 0:
            raise OSError(f"the emulated program cannot open {path.decode()}")
        return self._files[-1]

    def structure(self, copy: ctypes.Structure) -> int:
        return self.bytes(bytes(copy))

    # ---- matrices

    def matrix(self, address: int, back: bool = False) -> int:
        m = here(MatrixStruct, address)
        m.packed = self.memory(m.packed, self.remote.packed_size(m.type, m.rows, m.columns), back)
        m.bias = self.memory(m.bias, 4 * m.rows)
        return self.structure(m)

    def matrices(self, address: int, count: int, back: bool = False) -> int:
        return self.bytes(struct.pack(f"<{count}Q", *(self.matrix(place, back) for place in addresses(address, count))))

    def row_bytes(self, ggml_type: int, columns: int) -> int:
        lanes = int(self.remote.qwen2_lanes())
        return max(0, int(self.remote.qwen2_packed_bytes(ggml_type, lanes, columns)) // lanes)

    def select_isa(self, name: bytes | None) -> tuple[Any, ...]:
        return (0 if name is None else self.bytes(name + b"\0"),)

    def pack(self, kind: int, rows: int, columns: int, blocks: int, first: int, count: int, packed: int) -> tuple[Any, ...]:
        size = self.remote.qwen2_packed_bytes(kind, rows, columns)
        blocks = self.memory(blocks, count * self.row_bytes(kind, columns))
        return kind, rows, columns, blocks, first, count, self.memory(packed, size, back=True)

    def pack_file(self, file: int, matrices: int, offsets: int, count: int) -> tuple[Any, ...]:
        return self.file(file), self.matrices(matrices, count, back=True), self.memory(offsets, 8 * count), count

    def unpack_rows(self, matrix: int, rows: int, count: int, out: int) -> tuple[Any, ...]:
        columns = here(MatrixStruct, matrix).columns
        return self.matrix(matrix), self.memory(rows, 8 * count), count, self.memory(out, 4 * count * columns, back=True)

    def unpack_blocks(self, kind: int, columns: int, blocks: int, rows: int, count: int, out: int) -> tuple[Any, ...]:
        highest = max(struct.unpack(f"<{count}q", ctypes.string_at(rows, 8 * count)), default=-1)
        blocks = self.memory(blocks, (highest + 1) * self.row_bytes(kind, columns))
        return kind, columns, blocks, self.memory(rows, 8 * count), count, self.memory(out, 4 * count * columns, back=True)

    # ---- products

    def additions(self, place: int | None, n: int, reach: int) -> int:
        """Those of n rows; an adapter's from the first one on are looked at, `reach` of them."""
        if not place:
            return 0
        step = here(AdditionsStruct, place)
        step.which = self.memory(step.which, 4 * n)
        adapters = []
        for adapter in addresses(step.adapters, step.count):
            parts = [here(AdditionStruct, adapter + i * ctypes.sizeof(AdditionStruct)) for i in range(step.first, step.first + reach)]
            for part in parts:
                if part.a:
                    part.share = self.memory(part.share, 4 * here(MatrixStruct, part.b).rows)
                    part.a, part.b = self.matrix(part.a), self.matrix(part.b)
            adapters.append(self.bytes(b"".join(map(bytes, parts))) - step.first * ctypes.sizeof(AdditionStruct))
        step.adapters = self.bytes(struct.pack(f"<{step.count}q", *adapters))
        return self.structure(step)

    def rows_of_x(self, address: int | None, n: int, columns: int, stride: int, back: bool = False) -> int:
        return self.table(address, n, 4 * columns, 4 * stride, back)

    def multiply(self, product: int, inside_a_layer: bool = False) -> tuple[Any, ...]:
        p = here(ProductStruct, product)
        shapes = [here(MatrixStruct, place) for place in addresses(p.matrices, p.count)]
        columns = shapes[0].columns
        p.norm = self.memory(p.norm, 4 * columns)
        p.matrices = self.matrices(p.matrices, p.count)
        strides = struct.unpack(f"<{p.count}q", ctypes.string_at(p.out_strides, 8 * p.count))
        p.out_strides = self.memory(p.out_strides, 8 * p.count)
        if not inside_a_layer:  # where x and the outputs are the layer's own
            p.x = self.rows_of_x(p.x, p.n, columns, p.x_stride)
            outs = zip(addresses(p.outs, p.count), shapes, strides, strict=True)
            copied = [self.rows_of_x(out, p.n, shape.rows, stride, back=True) for out, shape, stride in outs]
            p.outs = self.bytes(struct.pack(f"<{p.count}Q", *copied))
            p.additions = self.additions(p.additions, p.n, p.count)
        return (self.structure(p),)

    def feed(self, part: int, inside_a_layer: bool = False) -> tuple[Any, ...]:
        p = here(FeedForwardStruct, part)
        columns = here(MatrixStruct, p.gate).columns
        p.x = 0 if inside_a_layer else self.rows_of_x(p.x, p.n, columns, p.x_stride, back=True)
        p.norm = self.memory(p.norm, 4 * columns)
        p.gate, p.up, p.down = (self.matrix(place) for place in (p.gate, p.up, p.down))
        p.additions = 0 if inside_a_layer else self.additions(p.additions, p.n, 3)
        return (self.structure(p),)

    def mix(self, part: int, inside_a_layer: bool = False) -> tuple[Any, ...]:
        p = here(MixtureStruct, part)
        columns = here(MatrixStruct, p.router).columns
        p.x = 0 if inside_a_layer else self.rows_of_x(p.x, p.n, columns, p.x_stride, back=True)
        p.router_logits = 0 if inside_a_layer else self.memory(p.router_logits, 4 * p.n * p.experts, back=True)
        p.norm = self.memory(p.norm, 4 * columns)
        for name in ("router", "shared_router", "shared_gate", "shared_up", "shared_down"):
            setattr(p, name, self.matrix(getattr(p, name)))
        for name in ("gates", "ups", "downs"):
            setattr(p, name, self.matrices(getattr(p, name), p.experts))
        p.additions = 0 if inside_a_layer else self.additions(p.additions, p.n, 5)
        return (self.structure(p),)

    def norm(self, x: int, n: int, columns: int, stride: int, weight: int, eps: float, out: int, lanes: int) -> tuple[Any, ...]:
        weight, out = self.memory(weight, 4 * columns), self.memory(out, 4 * n * columns, back=True)
        return self.rows_of_x(x, n, columns, stride), n, columns, stride, weight, eps, out, lanes

    def argmax(self, x: int, n: int, columns: int, stride: int, places: int, values: int) -> tuple[Any, ...]:
        places, values = self.memory(places, 8 * n, back=True), self.memory(values, 4 * n, back=True)
        return self.rows_of_x(x, n, columns, stride), n, columns, stride, places, values

    def search_scales(self, search: int) -> tuple[Any, ...]:
        s = here(SearchStruct, search)
        s.x, s.weights = (self.memory(at, 4 * s.width * s.groups) for at in (s.x, s.weights))
        s.trials, s.table = self.memory(s.trials, 4 * s.trial_count), self.memory(s.table, 4 * 256)
        s.scale, s.minimum = (self.memory(at, 4 * s.groups, back=True) for at in (s.scale, s.minimum))
        return (self.structure(s),)

    def read(self, memory: int, size: int) -> tuple[Any, ...]:
        return self.memory(memory, size), size

    # ---- training

    def lend_team(self, parallel: int | None, threads: int) -> tuple[Any, ...]:
        return 0, threads  # a team of this process runs nothing over there

    def norm_forward(self, step: int) -> tuple[Any, ...]:
        s = here(NormStruct, step)
        size, count = s.n * s.columns, 4 if s.type == 0 else 2
        s.x, s.residual = self.memory(s.x, 4 * size), self.memory(s.residual, 4 * size)
        s.weight, s.inverse = self.memory(s.weight, 4 * s.columns), self.memory(s.inverse, 4 * s.n, back=True)
        s.y, s.dx, s.dweight = (
            self.memory(*part, back=True) for part in ((s.y, count * size), (s.dx, 4 * size), (s.dweight, 4 * s.columns))
        )
        return (self.structure(s),)

    norm_backward = norm_forward

    def gated_forward(self, kind: int, gate_up: int, n: int, f: int, scales: int, out: int) -> tuple[Any, ...]:
        count = n * f * (4 if kind == 0 else 2)
        return kind, self.memory(gate_up, 2 * count), n, f, self.memory(scales, 4 * n), self.memory(out, count, back=True)

    def gated_backward(
        self, kind: int, gate_up: int, n: int, f: int, scales: int, product: int, into: int, dscales: int
    ) -> tuple[Any, ...]:
        into = self.memory(into, 2 * n * f * (4 if kind == 0 else 2), back=True)
        return *self.gated_forward(kind, gate_up, n, f, scales, product), into, self.memory(dscales, 4 * n, back=True)

    def gather_rows(self, kind: int, x: int, places: int, n: int, active: int, columns: int, base: int, out: int) -> tuple[Any, ...]:
        named = struct.unpack(f"<{n * active}q", ctypes.string_at(places, 8 * n * active))
        rows = self.memory(x, (max(named, default=-1) + 1) * columns * (4 if kind == 0 else 2))
        base, out = self.memory(base, 4 * n * columns), self.memory(out, 4 * n * columns, back=True)
        return kind, rows, self.memory(places, 8 * n * active), n, active, columns, base, out

    def add(self, kind: int, x: int, y: int, count: int, out: int) -> tuple[Any, ...]:
        return (
            kind,
            self.memory(x, 4 * count),
            self.memory(y, count * (4 if kind == 0 else 2)),
            count,
            self.memory(out, 4 * count, back=True),
        )

    def sum_rows(self, kind: int, x: int, n: int, columns: int, stride: int, sums: int) -> tuple[Any, ...]:
        size = 4 if kind == 0 else 2
        return kind, self.table(x, n, size * columns, size * stride), n, columns, stride, self.memory(sums, 4 * columns, back=True)

    def entropy_rows(self, step: int) -> tuple[Any, ...]:
        s = here(EntropyStruct, step)
        s.logits, s.labels = self.memory(s.logits, s.n * s.columns * (4 if s.type == 0 else 2), back=True), self.memory(s.labels, 8 * s.n)
        s.losses, s.log_sums = (self.memory(at, 4 * s.n, back=True) for at in (s.losses, s.log_sums))
        return (self.structure(s),)

    def train_attention_bytes(self, step: int, backward: int) -> tuple[Any, ...]:
        s = here(TrainAttentionStruct, step)
        s.lengths = self.memory(s.lengths, 4 * s.sequences)
        return self.structure(s), backward

    def train_attention_forward(self, step: int) -> tuple[Any, ...]:
        s = here(TrainAttentionStruct, step)
        size, d, n = 4 if s.type == 0 else 2, s.head_dim, s.tokens
        s.workspace = self.bytes(bytes(self.remote.qwen2_train_attention_bytes(step, int(bool(s.dout)))))
        s.lengths = self.memory(s.lengths, 4 * s.sequences)
        for name, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads)):
            row, stride, back = size * heads * d, getattr(s, f"{name}_stride"), getattr(s, f"d{name}_stride")
            setattr(s, name, self.table(getattr(s, name), n, row, size * stride))
            setattr(s, f"d{name}", self.table(getattr(s, f"d{name}"), n, row, size * back, back=True))
        s.cos, s.sin = (self.memory(at, 4 * n * (d // 2)) for at in (s.cos, s.sin))
        s.out, s.dout = self.memory(s.out, size * n * s.heads * d, back=True), self.memory(s.dout, size * n * s.heads * d)
        s.log_sums = self.memory(s.log_sums, 4 * s.heads * n, back=True)
        return (self.structure(s),)

    train_attention_backward = train_attention_forward

    # ---- attention and layers

    def attend(self, step: int, layers: int = 1, layer_bytes: int = 0, inside_a_layer: bool = False) -> tuple[Any, ...]:
        a = here(AttentionStruct, step)
        counts, histories = (struct.unpack(f"<{a.sequences}i", ctypes.string_at(at, 4 * a.sequences)) for at in (a.counts, a.histories))
        n, width = sum(counts), (a.heads + 2 * a.kv_heads) * a.head_dim
        if not inside_a_layer:
            a.qkv = self.rows_of_x(a.qkv, n, width, a.qkv_stride)
            a.out = self.rows_of_x(a.out, n, a.heads * a.head_dim, a.out_stride, back=True)
        a.cos, a.sin = (self.memory(at, 4 * n * (a.head_dim // 2)) for at in (a.cos, a.sin))
        a.counts, a.histories = (self.memory(at, 4 * a.sequences) for at in (a.counts, a.histories))
        blocks = sum(-(-(history + count) // 64) for history, count in zip(histories, counts, strict=True))
        size = (layers - 1) * layer_bytes + a.kv_heads * self.remote.qwen2_cache_bytes(a.head_dim, a.bits)
        copied = [self.memory(block + a.offset, size, back=True) - a.offset for block in addresses(a.blocks, blocks)] if size else [0]
        a.blocks = self.bytes(struct.pack(f"<{len(copied)}q", *copied))
        if a.key_factors:
            a.key_factors = self.memory(a.key_factors, 4 * layers * a.kv_heads * (a.head_dim // 2))
        return (self.structure(a),)

    def layer(self, place: int) -> int:
        whole = here(LayerStruct, place)
        whole.qkv, whole.output = (self.multiply(part, inside_a_layer=True)[0] for part in (whole.qkv, whole.output))
        whole.feed = self.feed(whole.feed, inside_a_layer=True)[0] if whole.feed else None
        whole.mixture = self.mix(whole.mixture, inside_a_layer=True)[0] if whole.mixture else None
        return self.structure(whole)

    def run_layer(self, layer: int, attention: int, x: int, n: int, router_logits: int | None) -> tuple[Any, ...]:
        mixture = here(LayerStruct, layer).mixture
        logits = 0 if router_logits is None or not mixture else 4 * n * here(MixtureStruct, mixture).experts
        x = self.memory(x, 4 * n * layer_columns(layer), back=True)
        step = self.attend(attention, inside_a_layer=True)[0]
        return self.layer(layer), step, x, n, self.memory(router_logits, logits, back=True)

    def run_layers(
        self,
        layers: int,
        count: int,
        attention: int,
        layer_bytes: int,
        x: int,
        n: int,
        rows: int | None,
        wanted: int,
        additions: int | None,
    ) -> tuple[Any, ...]:
        places = addresses(layers, count)
        x = self.memory(x, 4 * n * layer_columns(places[0]), back=True)
        step = self.attend(attention, count, layer_bytes, inside_a_layer=True)[0]
        layers = self.bytes(struct.pack(f"<{count}Q", *(self.layer(place) for place in places)))
        return layers, count, step, layer_bytes, x, n, self.memory(rows, 8 * wanted), wanted, self.additions(additions, n, 9 * count)


def here(kind: type[Struct], address: int) -> Struct:
    """A copy of a structure."""
    return kind.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(kind)))


def addresses(address: int, count: int) -> list[int]:
    return list(struct.unpack(f"<{count}Q", ctypes.string_at(address, 8 * count)))


def layer_columns(layer: int) -> int:
    qkv = here(ProductStruct, here(LayerStruct, layer).qkv)
    return int(here(MatrixStruct, addresses(qkv.matrices, 1)[0]).columns)
