"""The native library of another processor, in a program that an emulator runs: what ctypes would be if it could load it.

Every call copies what the C interface (kernels.h) says it may touch to the program, and back. So the tests of this folder, and all
that is built on the kernels, run on a set of kernels that this processor lacks. neon_main.cpp is the other side. Left out: speed.

    tests/kernels/neon.sh                                    # builds both, and runs the tests
"""

from __future__ import annotations

import ctypes
import shlex
import struct
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from qwen2 import kernels
from tests.kernels.copies import Copies


class Remote:
    """Has the functions of kernels.h as attributes, as a ctypes.CDLL has them."""

    def __init__(self, command: str) -> None:
        self._program = subprocess.Popen(shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._functions: dict[str, Function] = {}
        self._sizes: dict[tuple[int, int, int], int] = {}
        self.lock = threading.RLock()
        kernels.declare(self)

    def packed_size(self, *shape: int) -> int:
        """Bytes of a packed matrix of (type, rows, columns), also where no set is chosen: then as it was packed, by the only set here."""
        size: int = self.qwen2_packed_bytes(*shape)
        if size >= 0:
            self._sizes[shape] = size
        return self._sizes[shape]

    def __getattr__(self, name: str) -> Function:
        if not name.startswith("qwen2_"):
            raise AttributeError(name)
        return self._functions.setdefault(name, Function(self, name))

    def ask(self, request: bytes, first: int, second: int, data: bytes, answer: int) -> bytes:
        """One request; `answer` bytes of reply. OSError where the program has ended, as it does when memory is touched that it must not."""
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        try:
            self._program.stdin.write(struct.pack("<cQQ", request, first, second) + data)
            self._program.stdin.flush()
            reply = self._program.stdout.read(answer)
        except BrokenPipeError:
            reply = b""
        if len(reply) != answer:
            raise OSError(f"the emulated library ended with status {self._program.wait()}")
        return reply

    def take(self, data: bytes) -> int:
        """Memory there, with a guard behind its last byte."""
        place: int = struct.unpack("<Q", self.ask(b"t", len(data), 0, b"", 8))[0]
        self.ask(b"w", place, len(data), data, 0)
        return place

    def run(self, name: str, whole: list[int], real: float) -> int:
        padded = [value & (1 << 64) - 1 for value in whole] + [0] * (9 - len(whole))
        reply = self.ask(b"c", len(name), 0, name.encode() + struct.pack("<9Qf", *padded, real), 8)
        return int.from_bytes(reply, "little")


class Function:
    """One function; `restype` and `argtypes` are set as on a ctypes function."""

    def __init__(self, remote: Remote, name: str) -> None:
        self.remote, self.name = remote, name
        self.restype: Any = None
        self.argtypes: list[Any] = []

    def __call__(self, *given: Any) -> Any:
        remote = self.remote
        with remote.lock:
            copies = Copies(remote)
            prepare: Callable[..., tuple[Any, ...]] | None = getattr(copies, self.name.removeprefix("qwen2_"), None)
            arguments = given if prepare is None else prepare(*given)
            is_real = [kind is ctypes.c_float for kind in self.argtypes]
            whole = [int(value or 0) for value, real in zip(arguments, is_real, strict=True) if not real]
            reals = [value for value, real in zip(arguments, is_real, strict=True) if real]
            result = remote.run(self.name, whole, reals[0] if reals else 0.0)
            copies.finish()
            if self.restype is ctypes.c_char_p:
                return remote.ask(b"r", result, 6, b"", 6).split(b"\0")[0] if result else None
            return None if self.restype is None else self.restype(result).value
