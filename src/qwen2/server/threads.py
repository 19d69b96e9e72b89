"""Threads of their own for what may take long: loads, pulls, models that are made, forms that are tried.

What is short shares asyncio's few threads (`asyncio.to_thread`): reading prompts, lists of models, looks at files. One of those held
for a pull would be missing there until it has ended, and a few such pulls would keep out everybody. Left out: how many there may be
at once, which those who start them count.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def apart(call: Callable[[], T], at_end: Callable[[], object] | None = None) -> T:
    """What the call gives or raises, run on a thread of its own, which goes on if nobody waits for it any more.

    `at_end` is called on the loop when the thread is done, and where it cannot be had, which is a RuntimeError. The program's end does not
    wait for it: what it does must bear that.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def end(settle: Callable[[Any], None], value: Any) -> None:
        if at_end is not None:
            at_end()
        if not future.done():
            settle(value)

    def run() -> None:
        told: tuple[Callable[[Any], None], Any]
        try:
            told = future.set_result, call()
        except BaseException as error:  # raised where it is waited for
            told = future.set_exception, error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(end, *told)

    try:
        threading.Thread(target=run, name="apart", daemon=True).start()
    except RuntimeError:  # the system gives no more threads
        if at_end is not None:
            at_end()
        raise
    return await future
