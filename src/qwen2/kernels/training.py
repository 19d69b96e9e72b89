"""The structures and calls of training in kernels.h, and the team of threads that they run on.

Addresses go in, nothing is kept: the caller owns the memory and has seen to shapes, gaps and types. Left out: tensors and gradients
(model/training.py).
"""

from __future__ import annotations

import ctypes

from qwen2.kernels.calls import address, check, i32, i64, native

FLOAT, BF16 = 0, 30  # ggml's numbers of the two types that training computes with


class NormStruct(ctypes.Structure):
    """qwen2_norm_step"""

    _fields_ = [
        ("x", address), ("weight", address), ("y", address), ("inverse", address), ("residual", address), ("dx", address),
        ("dweight", address), ("n", i64), ("columns", i64), ("eps", ctypes.c_float), ("type", i32),
    ]  # fmt: skip


class EntropyStruct(ctypes.Structure):
    """qwen2_entropy"""

    _fields_ = [
        ("logits", address), ("labels", address), ("losses", address), ("log_sums", address), ("n", i64), ("columns", i64),
        ("scale", ctypes.c_float), ("z_loss", ctypes.c_float), ("type", i32),
    ]  # fmt: skip


class TrainAttentionStruct(ctypes.Structure):
    """qwen2_train_attention"""

    _fields_ = [
        ("q", address), ("k", address), ("v", address), ("cos", address), ("sin", address), ("lengths", address), ("out", address),
        ("log_sums", address), ("dout", address), ("dq", address), ("dk", address), ("dv", address), ("workspace", address),
        ("tokens", i64), ("q_stride", i64), ("k_stride", i64), ("v_stride", i64), ("dq_stride", i64), ("dk_stride", i64),
        ("dv_stride", i64), ("scale", ctypes.c_float),
        ("sequences", i32), ("heads", i32), ("kv_heads", i32), ("head_dim", i32), ("type", i32),
    ]  # fmt: skip


def lend_team(parallel: int | None, threads: int) -> None:
    """Run the steps of training on the threads behind `parallel`, the address of an OpenMP runtime's GOMP_parallel; None: our own."""
    native().qwen2_lend_team(parallel, threads)


def norm_forward(step: NormStruct) -> None:
    check(native().qwen2_norm_forward(ctypes.addressof(step)))


def norm_backward(step: NormStruct) -> None:
    check(native().qwen2_norm_backward(ctypes.addressof(step)))


def gated_forward(kind: int, gate_up: int, n: int, width: int, scales: int | None, out: int) -> None:
    check(native().qwen2_gated_forward(kind, gate_up, n, width, scales, out))


def gated_backward(kind: int, gate_up: int, n: int, width: int, scales: int | None, product: int, into: int, dscales: int | None) -> None:
    check(native().qwen2_gated_backward(kind, gate_up, n, width, scales, product, into, dscales))


def gather_rows(kind: int, x: int, places: int, n: int, active: int, columns: int, base: int | None, out: int) -> None:
    check(native().qwen2_gather_rows(kind, x, places, n, active, columns, base, out))


def add(kind: int, x: int, y: int, count: int, out: int) -> None:
    check(native().qwen2_add(kind, x, y, count, out))


def sum_rows(kind: int, x: int, n: int, columns: int, stride: int, sums: int) -> None:
    check(native().qwen2_sum_rows(kind, x, n, columns, stride, sums))


def entropy_rows(step: EntropyStruct) -> None:
    check(native().qwen2_entropy_rows(ctypes.addressof(step)))


def attention_bytes(step: TrainAttentionStruct, backward: bool) -> int:
    """Bytes of workspace; ValueError for heads that the kernels cannot attend with."""
    needed = int(native().qwen2_train_attention_bytes(ctypes.addressof(step), backward))
    check(min(needed, 0))
    return needed


def attention_forward(step: TrainAttentionStruct) -> None:
    check(native().qwen2_train_attention_forward(ctypes.addressof(step)))


def attention_backward(step: TrainAttentionStruct) -> None:
    check(native().qwen2_train_attention_backward(ctypes.addressof(step)))
