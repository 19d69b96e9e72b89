"""The engine's thread: it has torch with one thread, and takes none from the threads of others."""

from __future__ import annotations

import threading

import torch

from qwen2.engine.worker import Worker


class Noting:
    """Something to turn, that notes how many threads torch has where it is turned."""

    def __init__(self):
        self.found, self.turned = 0, threading.Event()

    def turn(self):
        self.found = torch.get_num_threads()
        self.turned.set()
        return False


def in_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_the_threads_of_others_are_theirs():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for one_thread, expected in ((True, 1), (False, 3)):
            noting = Noting()
            worker = Worker(noting, one_thread)
            worker.wake()
            assert noting.turned.wait(30)
            assert (noting.found, torch.get_num_threads(), in_a_new_thread()) == (expected, 3, 3)
            noting.turned.clear()
            worker.wake()  # and it stays so
            assert noting.turned.wait(30)
            assert noting.found == expected
            worker.stop()
            worker.join()
    finally:
        torch.set_num_threads(before)
