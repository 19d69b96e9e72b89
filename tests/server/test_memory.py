"""What nobody uses goes back to the system: all threads of a server share the one heap from which that can be had."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

HEAPS = """
import ctypes, threading, uvicorn
from qwen2.cli.serve import Flags, serve

def run(server, *_, **__):
    server.started = True
    libc, both = ctypes.CDLL(None), threading.Barrier(4)
    libc.fdopen.restype = ctypes.c_void_p

    def allocate():
        libc.malloc(5000)
        both.wait()

    threads = [threading.Thread(target=allocate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
    libc.fflush(None)

uvicorn.Server.run = run
serve(Flags(port=0))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other systems' allocators are left as they are")
def test_threads_share_one_heap() -> None:
    done = subprocess.run([sys.executable, "-c", HEAPS], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.count("<heap nr=") == 1
