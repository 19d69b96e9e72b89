"""torch's fastest product of float32 matrices on a CPU, and its threads for the kernels that run between products.

torch gives such products to MKL; oneDNN, which torch carries too, is faster at most shapes (model/linear.py has figures). And while a
gradient is recorded torch's threads spin between products, where a pool of the kernels' own would wait for them: so the kernels run on
these. Left out: shapes for which something else is faster (model/linear.py).
"""

# N rows, I input width, O output width

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2.kernels import training


def has_onednn() -> bool:
    """Whether this torch has oneDNN's product and takes these arguments: it is made for torch's compiler, not promised to users."""
    x, weight, bias = (torch.arange(float(n), device="cpu") for n in (6, 12, 4))
    x, weight = x.view(2, 3), weight.view(4, 3)
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        product = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(product, x @ weight.t() + bias)  # whole numbers: no rounding


HAS_ONEDNN = has_onednn()


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., I) by weight (O, I), both of one type -> (..., O); no gradient."""
    if HAS_ONEDNN and x.is_cpu and x.dtype == torch.float32 and x.numel() > 0:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def gradient_to_input(dy: Tensor, weight: Tensor) -> Tensor:
    """dy (N, O), weight (O, I) -> (N, I)."""
    return product(dy, weight.t(), None) if dy.dtype == torch.float32 else dy @ weight


@lru_cache(maxsize=1)
def _gomp_parallel() -> int | None:
    """Where torch's OpenMP runtime starts a team; None where it is of another kind."""
    try:
        runtime = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


@lru_cache(maxsize=1)
def _lend(threads: int) -> None:
    training.lend_team(_gomp_parallel(), threads)


def lend_threads() -> None:
    """The kernels of training, and rows that are unpacked, run on torch's threads from here on, as many as torch has."""
    _lend(torch.get_num_threads())
