"""The native library: which instruction sets this processor has, which set of kernels runs, and on how many threads.

The operations are called through calls.py, matrices are packed by matrix.py. Left out: a build at run time, and any search outside
this folder. An installation without a compiler has no library: `library()` is then None and everything runs in torch.

    python -c "from qwen2 import kernels; print(kernels.report())"
"""

from __future__ import annotations

import ctypes
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from qwen2.kernels.cores import physical_cores

ABI_VERSION = 9
MAX_THREADS = 256  # of pool.h
LANES = {"avx512": 16, "avx2": 8, "neon": 4}  # kernels by instruction set, the best first: rows that lie interleaved in their matrices
SETS = tuple(LANES)

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

_choosing = threading.RLock()


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
    declare(native)
    return native


def declare(native: ctypes.CDLL) -> None:
    """The types of the functions in kernels.h; structures go by their address (calls.py)."""
    i32, i64, address = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    code = ctypes.c_int
    for name, result, arguments in (
        ("cpu_features", ctypes.c_uint64, []),
        ("select_isa", code, [ctypes.c_char_p]),
        ("isa", ctypes.c_char_p, []),
        ("lanes", code, []),
        ("threads", code, []),
        ("set_threads", None, [ctypes.c_int]),
        ("packed_bytes", i64, [i32, i64, i64]),
        ("pack", code, [i32, i64, i64, address, i64, i64, address]),
        ("pack_file", code, [i32, address, address, i64]),
        ("unpack_rows", code, [address, address, i64, address]),
        ("unpack_blocks", code, [i32, i64, address, address, i64, address]),
        ("multiply", code, [address]),
        ("feed", code, [address]),
        ("mix", code, [address]),
        ("norm", code, [address, i64, i64, i64, address, ctypes.c_float, address, i32]),
        ("argmax", code, [address, i64, i64, i64, address, address]),
        ("cache_bytes", i64, [i32, i32]),
        ("attend", code, [address]),
        ("search_scales", code, [address]),
        ("read", code, [address, i64]),
        ("multiply_bytes", i64, [i64]),
        ("multiply_floats", i64, [i64]),
        ("busy", ctypes.c_uint64, []),
        ("run_layer", code, [address, address, address, i64, address]),
        ("run_layers", code, [address, i32, address, i64, address, i64, address, i64, address]),
        ("lend_team", None, [address, ctypes.c_int]),
        ("norm_forward", code, [address]),
        ("norm_backward", code, [address]),
        ("gated_forward", code, [i32, address, i64, i64, address, address]),
        ("gated_backward", code, [i32, address, i64, i64, address, address, address, address]),
        ("gather_rows", code, [i32, address, address, i64, i64, i64, address, address]),
        ("add", code, [i32, address, address, i64, address]),
        ("sum_rows", code, [i32, address, i64, i64, i64, address]),
        ("entropy_rows", code, [address]),
        ("train_attention_bytes", i64, [address, code]),
        ("train_attention_forward", code, [address]),
        ("train_attention_backward", code, [address]),
    ):
        function = getattr(native, f"qwen2_{name}")
        function.restype, function.argtypes = result, arguments


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The native library, or None where the installation has none. Raises OSError when there is one that does not fit.

    Its pool begins with as many threads as there are physical cores.
    """
    path = library_path()
    if path is None:
        return None
    native = open_library(path)
    native.qwen2_set_threads(physical_cores())
    return native


def features() -> frozenset[str]:
    """The instruction sets that may be used here, by name; empty without the library, which is what asks the processor."""
    native = library()
    if native is None:
        return frozenset()
    bits = int(native.qwen2_cpu_features())
    return frozenset(name for index, name in enumerate(FEATURES) if bits >> index & 1)


def busy_seconds() -> float:
    """How long kernels have run in this process so far, whoever called them; 0 where there are none."""
    native = library()
    return 0.0 if native is None else int(native.qwen2_busy()) / 1e9


def isa() -> str | None:
    """The set of kernels in use, or None where there is no library or none of its sets fits this processor."""
    native = library()
    name = None if native is None else native.qwen2_isa()
    return None if name is None else str(name.decode())


def isa_of(lanes: int) -> str | None:
    """The set that matrices of so many lanes are packed for; None for 0, weights that are not packed."""
    return next((name for name, own in LANES.items() if own == lanes), None)


def select_isa(name: str | None) -> None:
    """Use this set of kernels, or the best one for None; "none" leaves the work to torch.

    To be called before a model is loaded: its weights are laid out for one set, which goes on computing with them whatever is chosen
    later.

    Raises ValueError where there is no such set, or this processor or installation cannot run it.
    """
    if name is not None and name not in (*SETS, "none"):
        raise ValueError(f"isa {name!r}: must be one of {', '.join(SETS)}, or none")
    native = library()
    if native is None:
        if name is not None and name != "none":
            raise ValueError(f"isa {name!r}: this installation has no native library; reinstall it with a C++ compiler at hand")
        return
    if native.qwen2_select_isa(None if name is None else name.encode()) != 0 and name is not None:
        raise ValueError(f"isa {name!r}: this processor cannot run it; it has {' '.join(sorted(features())) or 'none of the known sets'}")


@contextmanager
def kept_on_failure() -> Iterator[None]:
    """Where what happens inside fails, the chosen set and the pool's threads are again what they were.

    One thread at a time, since what is packed meanwhile follows the choice.
    """
    with _choosing:
        native = library()
        chosen, count = isa() or "none", threads()
        try:
            yield
        except BaseException:  # Ctrl-C too
            select_isa(chosen)
            if native is not None and threads() != count:
                native.qwen2_set_threads(count)
            raise


@contextmanager
def using(name: str) -> Iterator[None]:
    """This set meanwhile, for what is packed beside matrices that were packed for it. Raises ValueError as `select_isa` does."""
    with _choosing:
        chosen = isa() or "none"
        if name != chosen:
            select_isa(name)
        try:
            yield
        finally:
            if name != chosen:
                select_isa(chosen)


def set_threads(count: int | None = None) -> None:
    """Threads of the library's own pool, the calling one among them; by default as many as there are physical cores.

    Raises ValueError for more than the pool can have.
    """
    if count is not None and count > MAX_THREADS:
        raise ValueError(f"threads {count:,}: the kernels take at most {MAX_THREADS}")
    native = library()
    if native is not None:
        native.qwen2_set_threads(physical_cores() if count is None else count)


def threads() -> int | None:
    """Threads of the pool; None where there is no library."""
    native = library()
    return None if native is None else int(native.qwen2_threads())


def report() -> str:
    """For `qwen2 --version`: the processor's kind and instruction sets, and which kernels run on it."""
    if library() is None:
        return f"{platform.machine()}, no native library in this installation"
    names = [name for name in FEATURES if name in features()]
    kernels = f"kernels for {isa()}" if isa() else "no kernels for this processor"
    return f"{platform.machine()} {' '.join(names)}\nnative library with ABI {ABI_VERSION}, {kernels}"
