"""The structures of kernels.h, and calls that cost Python little: what stays the same from step to step is bound once.

A bound call holds its C structure; running it fills in the addresses that change, a handful of attribute writes. Left out: who
owns the memory behind the addresses. The caller keeps it alive.
"""

# n tokens of a step

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

from qwen2 import kernels

i32, i64, address = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class MatrixStruct(ctypes.Structure):
    """qwen2_matrix"""

    _fields_ = [("packed", address), ("bias", address), ("rows", i64), ("columns", i64), ("type", i32), ("lanes", i32)]


class AdditionStruct(ctypes.Structure):
    """qwen2_addition"""

    _fields_ = [("a", address), ("b", address), ("share", address), ("scale", ctypes.c_float)]


class AdditionsStruct(ctypes.Structure):
    """qwen2_additions"""

    _fields_ = [("which", address), ("adapters", address), ("count", i32), ("first", i32)]


class ProductStruct(ctypes.Structure):
    """qwen2_product"""

    _fields_ = [
        ("x", address), ("norm", address), ("matrices", address), ("outs", address), ("out_strides", address),
        ("n", i64), ("x_stride", i64),
        ("eps", ctypes.c_float), ("count", i32), ("add", i32), ("additions", address),
    ]  # fmt: skip


class FeedForwardStruct(ctypes.Structure):
    """qwen2_feed_forward"""

    _fields_ = [
        ("x", address), ("norm", address), ("gate", address), ("up", address), ("down", address), ("n", i64), ("x_stride", i64),
        ("eps", ctypes.c_float), ("additions", address),
    ]  # fmt: skip


class MixtureStruct(ctypes.Structure):
    """qwen2_mixture"""

    _fields_ = [
        ("x", address), ("norm", address), ("router", address), ("shared_router", address), ("shared_gate", address),
        ("shared_up", address), ("shared_down", address), ("gates", address), ("ups", address), ("downs", address),
        ("router_logits", address),
        ("n", i64), ("x_stride", i64), ("eps", ctypes.c_float), ("experts", i32), ("active", i32), ("renormalise", i32),
        ("additions", address),
    ]  # fmt: skip


class AttentionStruct(ctypes.Structure):
    """qwen2_attention"""

    _fields_ = [
        ("qkv", address), ("out", address), ("cos", address), ("sin", address), ("counts", address), ("histories", address),
        ("blocks", address), ("key_factors", address), ("qkv_stride", i64), ("out_stride", i64), ("offset", i64),
        ("sequences", i32), ("heads", i32), ("kv_heads", i32), ("head_dim", i32), ("bits", i32), ("lanes", i32),
    ]  # fmt: skip


class LayerStruct(ctypes.Structure):
    """qwen2_layer"""

    _fields_ = [("qkv", address), ("output", address), ("feed", address), ("mixture", address)]


MEANINGS = {
    -3: "not enough memory for the step",
    -5: "the file ended before its last matrix, or could not be read",
    -4: "matrices that do not fit each other or were packed for another instruction set, or a shape without a kernel",
}


def check(code: int) -> None:
    """MemoryError or ValueError for what a kernel reports."""
    if code == -3:
        raise MemoryError(MEANINGS[code])
    if code != 0:
        raise ValueError(f"kernel: {MEANINGS.get(code, f'error {code}')}")


class SearchStruct(ctypes.Structure):
    """qwen2_search"""

    _fields_ = [
        ("x", address), ("weights", address), ("trials", address), ("table", address), ("scale", address), ("minimum", address),
        ("groups", i64), ("first", ctypes.c_float), ("low", ctypes.c_float), ("high", ctypes.c_float),
        ("width", i32), ("trial_count", i32), ("below_zero", i32),
    ]  # fmt: skip


def run_search(search: SearchStruct) -> None:
    """Find the scales that it asks for."""
    check(native().qwen2_search_scales(ctypes.addressof(search)))


def norm_rows(x: int, n: int, columns: int, weight: int, eps: float, out: int, lanes: int = 0) -> None:
    """RMSNorm of x (n, columns) without gaps -> out (n, columns), all addresses of fp32.

    The bits are those of fused calls with matrices of so many lanes; 0 is for the chosen set's.
    """
    check(native().qwen2_norm(x, n, columns, columns, weight, eps, out, lanes))


def argmax_rows(x: int, n: int, columns: int, stride: int) -> tuple[list[int], list[float]]:
    """Place and value of the largest of each row of x (n, columns) fp32, rows `stride` apart; a NaN counts as the largest."""
    places, values = (i64 * n)(), (ctypes.c_float * n)()
    check(native().qwen2_argmax(x, n, columns, stride, ctypes.addressof(places), ctypes.addressof(values)))
    return list(places), list(values)


def native() -> ctypes.CDLL:
    """The library, which must be there."""
    found = kernels.library()
    assert found is not None, "kernels are called only where the library is there"
    return found


class BoundProduct:
    """Several matrices times the same tokens; the outputs lie side by side in one row of `width` floats a token."""

    def __init__(self, matrices: Sequence[MatrixStruct], norm: int | None = None, eps: float = 0.0, add: bool = False) -> None:
        self.width = sum(matrix.rows for matrix in matrices)
        self.columns = matrices[0].columns
        self._function = native().qwen2_multiply
        self._lock = threading.Lock()
        self._matrices = (address * len(matrices))(*(ctypes.addressof(matrix) for matrix in matrices))
        self._keep = list(matrices)
        self._outs = (address * len(matrices))()
        self._strides = (i64 * len(matrices))(*([self.width] * len(matrices)))
        self._offsets = [4 * sum(matrix.rows for matrix in matrices[:i]) for i in range(len(matrices))]
        self._struct = ProductStruct(
            None, norm, ctypes.addressof(self._matrices), ctypes.addressof(self._outs), ctypes.addressof(self._strides), 0, self.columns,
            eps, len(matrices), add, None,
        )  # fmt: skip
        self.place = ctypes.addressof(self._struct)

    def __call__(self, x: int, n: int, out: int, additions: int | None = None) -> None:
        """x (n, columns) at one address -> out (n, width) at another, or added to it; both fp32 without gaps.

        `additions` are those of the rows' adapters (AdditionsStruct), the first of them the first matrix's.
        """
        struct = self._struct
        with self._lock:  # threads may share a network
            struct.x, struct.n, struct.additions = x, n, additions
            for i, offset in enumerate(self._offsets):
                self._outs[i] = out + offset
            code = self._function(self.place)
        if code:
            check(code)


class BoundFeedForward:
    """x += down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, norm: int, eps: float, gate: MatrixStruct, up: MatrixStruct, down: MatrixStruct) -> None:
        self._function = native().qwen2_feed
        self._lock = threading.Lock()
        self._keep = (gate, up, down)
        self._struct = FeedForwardStruct(
            None, norm, ctypes.addressof(gate), ctypes.addressof(up), ctypes.addressof(down), 0, gate.columns, eps
        )
        self.place = ctypes.addressof(self._struct)

    def __call__(self, x: int, n: int, additions: int | None = None) -> None:
        """x (n, columns) fp32 without gaps, changed in place."""
        with self._lock:
            self._struct.x, self._struct.n, self._struct.additions = x, n, additions
            code = self._function(self.place)
        if code:
            check(code)


class BoundMixture:
    """x += the chosen experts' and the shared expert's answers to norm(x)."""

    def __init__(
        self,
        norm: int,
        eps: float,
        router: MatrixStruct,
        shared_router: MatrixStruct,
        shared: Sequence[MatrixStruct],
        experts: Sequence[Sequence[MatrixStruct]],
        active: int,
        renormalise: bool,
    ) -> None:
        self._function = native().qwen2_mix
        self._lock = threading.Lock()
        stacks = [(address * len(experts))(*(ctypes.addressof(expert[part]) for expert in experts)) for part in range(3)]
        self._keep = (router, shared_router, shared, experts, stacks)
        self._struct = MixtureStruct(
            None, norm, ctypes.addressof(router), ctypes.addressof(shared_router), *(ctypes.addressof(matrix) for matrix in shared),
            *(ctypes.addressof(stack) for stack in stacks), None, 0, router.columns, eps, len(experts), active, renormalise, None,
        )  # fmt: skip
        self.place = ctypes.addressof(self._struct)

    def __call__(self, x: int, n: int, router_logits: int | None, additions: int | None = None) -> None:
        """x (n, columns) fp32 without gaps, changed in place; the router's logits (n, experts) to an address where one is given."""
        with self._lock:
            self._struct.x, self._struct.n, self._struct.router_logits, self._struct.additions = x, n, router_logits, additions
            code = self._function(self.place)
        if code:
            check(code)


class BoundLayer:
    """A whole layer in one call: the parts as bound above, and attention of a step."""

    def __init__(self, qkv: BoundProduct, output: BoundProduct, part: BoundFeedForward | BoundMixture) -> None:
        self._function = native().qwen2_run_layer
        self._keep = (qkv, output, part)
        dense = isinstance(part, BoundFeedForward)
        self._struct = LayerStruct(qkv.place, output.place, part.place if dense else None, None if dense else part.place)
        self.place = ctypes.addressof(self._struct)

    def __call__(self, x: int, n: int, attention: int, router_logits: int | None) -> None:
        """x (n, D) fp32 without gaps, changed in place."""
        code = self._function(self.place, attention, x, n, router_logits)
        if code:
            check(code)


class BoundLayers:
    """All layers of a network in one call; `layer_bytes` lie between the caches of two layers."""

    def __init__(self, layers: Sequence[BoundLayer]) -> None:
        self._function = native().qwen2_run_layers
        self._keep = list(layers)
        self._layers = (address * len(layers))(*(layer.place for layer in layers))
        self._place = ctypes.addressof(self._layers)

    def __call__(
        self, x: int, n: int, attention: int, layer_bytes: int, rows: Sequence[int] | None = None, additions: int | None = None
    ) -> None:
        """x (n, D) fp32 without gaps, changed in place; `attention` is the step of the first layer. `rows`: those that are wanted.

        `additions` are those of the rows' adapters (AdditionsStruct), the first of them the first layer's.
        """
        wanted = None if rows is None else (i64 * len(rows))(*rows)
        place = None if wanted is None else ctypes.addressof(wanted)
        count = 0 if rows is None else len(rows)
        code = self._function(self._place, len(self._keep), attention, layer_bytes, x, n, place, count, additions)
        if code:
            check(code)
