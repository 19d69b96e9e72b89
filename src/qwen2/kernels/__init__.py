"""The native library and what it knows of this processor.

It holds the detection of instruction sets; the model runs in torch. Left out: a build at run time, and any search outside this
folder. An installation without a compiler has no library: `library()` is then None and everything runs in torch.

    python -c "from qwen2 import kernels; print(kernels.report())"
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import lru_cache
from pathlib import Path

ABI_VERSION = 1

FEATURES = (  # bit 0 first: the order of qwen2_feature in kernels.h
    "avx2",
    "fma",
    "f16c",
    "avxvnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512vnni",
    "avx512bf16",
    "neon",
    "dotprod",
    "i8mm",
    "bf16",
)


def library_path() -> Path | None:
    """The library of this installation, or None. An editable install keeps it in another folder of the package's path than this file."""
    name = {"win32": "qwen2_kernels.dll", "darwin": "libqwen2_kernels.dylib"}.get(sys.platform, "libqwen2_kernels.so")
    return next((path for folder in __path__ if (path := Path(folder) / name).is_file()), None)


def open_library(path: Path) -> ctypes.CDLL:
    """Load a library and check that it speaks our ABI.

    Raises OSError when it cannot be loaded, or was built for another version of this file.
    """
    native = ctypes.CDLL(str(path))
    if not hasattr(native, "qwen2_abi_version"):
        raise OSError(
            f"{path}: not the native library of qwen2 (no qwen2_abi_version); reinstall with: pip install --force-reinstall qwen2"
        )
    native.qwen2_abi_version.restype = ctypes.c_uint32
    native.qwen2_abi_version.argtypes = []
    found = int(native.qwen2_abi_version())
    if found != ABI_VERSION:
        raise OSError(f"{path}: ABI {found}, this package needs {ABI_VERSION}; rebuild it with: pip install --force-reinstall qwen2")
    native.qwen2_cpu_features.restype = ctypes.c_uint64
    native.qwen2_cpu_features.argtypes = []
    return native


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The native library, or None where the installation has none. Raises OSError when there is one that does not fit."""
    path = library_path()
    return None if path is None else open_library(path)


def features() -> frozenset[str]:
    """The instruction sets that may be used here, by name; empty without the library, which is what asks the processor."""
    native = library()
    if native is None:
        return frozenset()
    bits = int(native.qwen2_cpu_features())
    return frozenset(name for index, name in enumerate(FEATURES) if bits >> index & 1)


def report() -> str:
    """For `qwen2 --version`: the processor's kind and instruction sets, and whether the library is there."""
    if library() is None:
        return f"{platform.machine()}, no native library in this installation"
    names = [name for name in FEATURES if name in features()]
    return f"{platform.machine()} {' '.join(names)}\nnative library with ABI {ABI_VERSION}"
