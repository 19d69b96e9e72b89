"""Memory that a step has freed stays with the process, and where layers are computed again, only as much as is worth its place."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from qwen2.train.memory import Slack

SCRIPT = """
import resource, torch
from qwen2.train.memory import keep_freed
assert keep_freed()
def step():
    parts = [torch.ones(8 << 20) for _ in range(3)]  # 32 MiB each
    return sum(float(part[-1]) for part in parts)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    step()
before = faults()
step()
print(faults() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="a C library without mallopt: memory.py leaves it as it is")
def test_later_steps_take_no_new_pages():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000, "96 MiB are 24,576 pages"


class Process:
    """One whose layers take memory, of which some is free afterwards."""

    def __init__(self, live: int) -> None:
        self.live, self.free, self.given, self.sizes = live, 0, 0, []

    def layer(self, more: int, free: int) -> str:
        self.live, self.free = self.live + more, self.free + free
        self.sizes.append(self.live + self.free)
        return "out"

    def size(self) -> int:
        return self.live + self.free

    def give_back(self, pad: int) -> int:
        self.free, self.given = 0, self.given + 1
        return 1


def slack_of(process: Process) -> Slack:
    slack = Slack(100, process.size)
    slack.give_back = process.give_back
    slack.look(0)
    return slack


def test_gaps_stay_within_the_slack():
    process = Process(1000)
    slack, before = slack_of(process), process.given
    for _ in range(200):
        assert slack.around(process.layer, False, 1, 30) == "out"
    assert process.live == 1200
    assert max(process.sizes) <= 1200 + 100 + 31, "200 x 30 bytes of gaps came and went"
    assert 0 < process.given - before < 70
    assert slack.most == 100


def test_layers_that_need_more_than_the_slack_are_given_it():
    """Else each of them would give back what the next takes."""
    process = Process(1000)
    slack, before = slack_of(process), process.given
    for _ in range(200):
        process.free = max(process.free, 500)  # what a layer takes, from what is free where there is some
        slack.around(process.layer, False, 0, 0)
    assert slack.most >= 500
    assert process.given - before < 10


def test_the_head_finds_room():
    process = Process(1000)
    slack = slack_of(process)
    slack.around(process.layer, False, 0, 30)
    assert process.free == 30
    slack.around(process.layer, True, 0, 0)
    assert process.free == 0
    assert slack.most == 100


def test_a_system_that_does_not_say_its_size_is_left_alone():
    def unknown() -> int:
        raise FileNotFoundError("/proc/self/statm")

    slack = Slack(100, unknown)
    assert slack.around(lambda x: x + 1, True, 1) == 2


GAPS = """
import torch
from qwen2.train.memory import Slack, keep_freed, resident
keep_freed()
slack = Slack(64 << 20)
slack.look(0)
base, kept, sizes = resident(), [], []
def layer(number):
    parts = [torch.ones((2 + number % 5) << 18) for _ in range(6)]  # 12 to 36 MiB
    kept.append(torch.ones(1 << 16))  # lives on between pieces that do not
    sizes.append(resident())
    return len(parts)
for number in range(60):
    slack.around(layer, False, number)
print(slack.most >> 20, max(sizes) - base)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="a C library without malloc_trim: memory.py leaves it as it is")
def test_what_is_free_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", GAPS], capture_output=True, text=True, check=True)
    slack, most = map(int, done.stdout.split())
    assert slack <= 96, "what layers need beside what they had is less"
    assert most < (15 + slack + 36 + 16) << 20, "what lives on, the slack, and the pieces of a layer"
