"""What a step's products are computed in, and how fast this machine multiplies in it.

Weights, their gradients and the optimizer's state are float32 always; bfloat16 is torch's autocast around forward passes. float16 is
refused (settings.py says why).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch

from qwen2.model.linear import product
from qwen2.train.folder import CONFIG, written_config

if TYPE_CHECKING:
    from pathlib import Path

    from qwen2.model import Qwen2
    from qwen2.train.settings import Settings
    from qwen2.train.world import World

    S = TypeVar("S", bound=Settings)

SIDE = 1024  # of the square matrices that are multiplied to measure
SECONDS = 0.3  # how long that takes at least


def settled(settings: S, run: Path, resume: bool, world: World) -> S:
    """The settings with a precision in place of `auto`: that of the run which is resumed, else bfloat16 where every rank multiplies it.

    Every rank has to call it, and all get the same. A run that is resumed on another processor keeps what it was started in.
    """
    precision = settings.precision
    if precision == "auto" and resume:
        written = written_config(run)["settings"] if world.main and (run / CONFIG).exists() else {}
        precision = world.agreed(written.get("precision", "auto"))
    if precision == "auto":
        precision = "bfloat16" if all(world.every(has_bfloat16(world.device))) else "float32"
    return replace(settings, precision=precision)


def in_words(dtype: torch.dtype, device: torch.device) -> str:
    """What products are computed in, in a line."""
    slow = dtype == torch.bfloat16 and not has_bfloat16(device)
    more = ", as the run was started or told to; this processor does not multiply it itself, and is slower at it than at float32"
    return f"products are computed in {str(dtype).removeprefix('torch.')}{more if slow else ''}"


def chosen(precision: str, device: torch.device) -> torch.dtype:
    """The type that a setting stands for on a device."""
    if precision == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself, so that it is the faster type."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return any(bool(features.get(name, False)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def computing(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Around a forward pass: autocast, where the type is not the weights' own."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@contextmanager
def unrecorded(network: Qwen2) -> Iterator[None]:
    """No gradient is followed meanwhile, and what is computed is computed as in a step.

    Under `torch.no_grad` alone, weights in blocks are multiplied with inputs in int8, as an engine does; a step's stay in floating point.
    So for such networks recording stays on, and no parameter wants a gradient meanwhile.
    """
    if not (network.packed or any(getattr(module, "int8_input", False) for module in network.modules())):
        with torch.no_grad():
            yield
        return
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def product_rate(dtype: torch.dtype, device: torch.device, side: int | None = None) -> float:
    """FLOP/s of a product of square matrices, the best of those that fit into a third of a second.

    By the routine that is the faster: torch's own, or the one that the layers use (linear.py).
    """
    side = side if side is not None else SIDE if device.type == "cpu" else 8 * SIDE
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + SECONDS
    with torch.no_grad():
        while time.perf_counter() < end:  # the first of each sets up what later ones use, and is not the best
            for multiply in (torch.mm, lambda a, b: product(a, b, None)):
                _wait(device)
                start = time.perf_counter()
                multiply(a, b)
                _wait(device)
                best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
