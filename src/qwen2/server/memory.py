"""Memory that nobody uses any more goes back to the system, where glibc would keep it.

glibc gives every thread a heap of its own and trims no end of one but the first: the texts of six threads that once read a large
prompt stayed resident for good, a quarter of a small server's memory. Other systems' allocators are left as they are.
"""

from __future__ import annotations

import gc

from qwen2.train.memory import of_library

M_ARENA_MAX = -8  # malloc.h


def one_heap() -> None:
    """All threads use the first heap, from which all that is free can be given back. Called before there are other threads."""
    mallopt = of_library("mallopt")
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


def give_back() -> None:
    """What is free of the first heap, and free pages within others: texts of megabytes take a hundred times their size for a moment."""
    trim = of_library("malloc_trim")
    if trim is not None:
        trim(0)


def sweep(freeze: bool) -> None:
    """Let go of what is reached only from itself, as a model with its thread is; what is left is not looked through again if `freeze`."""
    gc.unfreeze()
    gc.collect()
    if freeze:
        gc.freeze()
