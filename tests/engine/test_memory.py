"""The cache is bounded by what is free, by a container's limit too, and never below one window; texts are the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qwen2 import LLM
from qwen2.engine.memory import cache_blocks, free_memory
from tests.engine.oracle import WARM

GIB = 1 << 30


def system(root: Path, files: dict[str, str], available: int = 8 * GIB) -> Path:
    """A /proc and a /sys."""
    for name, text in ({"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {available >> 10} kB\nHugePages_Total: 0\n"} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(limit: object, used: int, cached: int, version: int) -> dict[str, str]:
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), 2: ("memory.max", "memory.current", "inactive_file")}[version]  # fmt: skip
    return {names[0]: f"{limit}\n", names[1]: f"{used}\n", "memory.stat": f"anon 5\n{names[2]} {cached}\n"}


def at(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"sys/fs/cgroup/{folder}{name}": text for name, text in files.items()}


CASES = {
    "no group": ({}, 8 * GIB),
    "no limit": ({"proc/self/cgroup": "0::/a\n"} | at("a/", group("max", GIB, 0, 2)), 8 * GIB),
    "own limit": ({"proc/self/cgroup": "0::/a/b\n"} | at("a/b/", group(4 * GIB, 2 * GIB, GIB // 2, 2)), 4 * GIB - 2 * GIB + GIB // 2),
    "a parent's": ({"proc/self/cgroup": "0::/a/b\n"} | at("a/", group(2 * GIB, GIB, 0, 2)) | at("a/b/", group("max", 5, 0, 2)), GIB),
    "within a container": (
        {"proc/self/cgroup": "4:cpu:/x\n5:memory:/docker/x\n0::/\n"} | at("memory/", group(3 * GIB, GIB, 0, 1)),
        2 * GIB,
    ),
    "version 1 without": ({"proc/self/cgroup": "5:memory:/\n"} | at("memory/", group(9223372036854771712, GIB, 0, 1)), 8 * GIB),
    "used up": ({"proc/self/cgroup": "0::/\n"} | at("", group(GIB, 2 * GIB, 0, 2)), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_free_is_the_least_of_what_the_system_allows(tmp_path: Path, case: str) -> None:
    files, free = CASES[case]
    assert free_memory(root=system(tmp_path, files)) == free


def test_this_machine_says_what_is_free() -> None:
    free = free_memory()
    assert free is None or free > 1 << 20


def test_a_share_of_what_is_free_between_one_window_and_one_for_each_answer() -> None:
    assert cache_blocks(512, 16, 1000, None) == 16 * 512
    assert cache_blocks(512, 16, 1000, 10**9) == 16 * 512
    assert cache_blocks(512, 16, 1000, 2_000_000) == 1000
    assert cache_blocks(512, 16, 1000, 5) == 512


def test_a_machine_with_little_memory_writes_the_same_texts(make_llm, model):
    size = LLM(model).engine.runner.memory.block_bytes
    params = replace(WARM, max_tokens=150, ignore_eos=True)
    prompts = [f"prompt {i}" for i in range(5)]
    plenty = make_llm(model, free_bytes=10**12)
    assert plenty.engine.cache.pool.limit == 16 * 8
    right = [output.token_ids for output in plenty.generate(prompts, params)]
    for free, blocks in ((0, 8), (2 * 9 * size, 9)):
        llm = make_llm(model, free_bytes=free)
        assert llm.engine.cache.pool.limit == blocks
        assert llm.engine.cache_limit_bytes == blocks * size
        assert [output.token_ids for output in llm.generate(prompts, params)] == right
        assert llm.engine.scheduler.preemptions > 0


def test_what_is_asked_for_is_not_bounded(make_llm, model):
    size = LLM(model).engine.runner.memory.block_bytes
    assert make_llm(model, cache_bytes=99 * size, free_bytes=0).engine.cache.pool.limit == 99
