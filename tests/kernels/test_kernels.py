"""The native library's Python face. The oracle of the features is the kernel's own list, where there is one."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qwen2 import kernels
from qwen2.kernels.cores import allowed_cores, physical_cores, processors, share_of_time, sysctl

SOURCE = Path(__file__).parents[2] / "src" / "qwen2" / "kernels" / "features.cpp"
LINUX_X86 = {  # our name: the kernel's
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avxvnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512vl": "avx512vl",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
}
LINUX_ARM = {"neon": "asimd", "dotprod": "asimddp", "i8mm": "i8mm", "bf16": "bf16"}

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")


def flags_of_this_machine() -> tuple[dict[str, str], set[str]]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("no /proc/cpuinfo to compare with")
    lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))]
    return (LINUX_X86 if platform.machine() == "x86_64" else LINUX_ARM), set(lines[0].split(":")[1].split())


@needs_compiler
def test_where_something_compiles_there_is_a_library() -> None:
    """Otherwise a build that broke would leave a pure installation, and all tests of kernels skipped."""
    assert kernels.library() is not None, "the native library was not built: cmake -S . -B build/check && cmake --build build/check"


def test_features_are_those_the_kernel_lists() -> None:
    if kernels.library() is None:
        pytest.skip("this installation has no native library")
    names, flags = flags_of_this_machine()
    assert kernels.features() == {ours for ours, theirs in names.items() if theirs in flags}


@needs_compiler
def test_another_abi_is_refused(tmp_path: Path) -> None:
    header = tmp_path / "kernels.h"
    header.write_text((SOURCE.parent / "kernels.h").read_text().replace(f"QWEN2_ABI_VERSION {kernels.ABI_VERSION}", "QWEN2_ABI_VERSION 99"))
    source = tmp_path / "features.cpp"
    source.write_text(SOURCE.read_text())
    library = tmp_path / "library.so"
    subprocess.run(["c++", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    with pytest.raises(
        OSError,
        match=rf"library\.so: ABI 99, this package needs {kernels.ABI_VERSION}; rebuild it with: pip install --force-reinstall qwen2$",
    ):
        kernels.open_library(library)


@needs_compiler
def test_a_foreign_library_is_refused(tmp_path: Path) -> None:
    source, library = tmp_path / "other.cpp", tmp_path / "other.so"
    source.write_text('extern "C" int other(void) { return 1; }\n')
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    with pytest.raises(OSError, match=r"other\.so: not the native library of qwen2 \(no qwen2_abi_version\)"):
        kernels.open_library(library)


def test_without_a_library_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert kernels.features() == frozenset()
    assert kernels.report().endswith("no native library in this installation")


def test_names_stand_in_the_order_of_the_bits() -> None:
    """The enumeration of kernels.h, read as text, gives each name's bit."""
    header = (SOURCE.parent / "kernels.h").read_text()
    bits = {}
    for line in header.splitlines():
        words = line.replace(",", "").split()
        if len(words) == 5 and words[1:4] == ["=", "1", "<<"]:
            bits[words[0].removeprefix("QWEN2_").lower()] = int(words[4])
    assert bits == {name: index for index, name in enumerate(kernels.FEATURES)}


def test_an_installed_library_is_loaded() -> None:
    """Only where this installation has one: the path search finds it, and it is a library of ours."""
    path = kernels.library_path()
    if path is None:
        pytest.skip("this installation has no native library")
    assert isinstance(kernels.library(), ctypes.CDLL)
    assert f"native library with ABI {kernels.ABI_VERSION}, kernels for {kernels.isa()}" in kernels.report()


def test_an_instruction_set_is_chosen_by_name_or_refused() -> None:
    with pytest.raises(ValueError, match=r"^isa 'sse2': must be one of avx512, avx2, neon, or none$"):
        kernels.select_isa("sse2")
    lacking = "neon" if platform.machine() == "x86_64" else "avx2"
    with pytest.raises(ValueError, match=rf"^isa '{lacking}': this (processor cannot run it; it has|installation has no native library)"):
        kernels.select_isa(lacking)
    before = kernels.isa()
    if before is not None:
        kernels.select_isa(before)
        assert kernels.isa() == before


def test_without_a_library_no_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    kernels.select_isa(None)
    with pytest.raises(
        ValueError, match=r"^isa 'avx2': this installation has no native library; reinstall it with a C\+\+ compiler at hand$"
    ):
        kernels.select_isa("avx2")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_of_a_fork_goes_on_computing() -> None:
    """Workers asleep in the parent are not there in the child; an alarm ends it where it waits for them."""
    native = kernels.library()
    if kernels.isa() is None or not isinstance(native, ctypes.CDLL):
        pytest.skip("no kernels of this process")
    kernels.set_threads(2)
    memory = np.ones(4 << 20, dtype=np.uint8)
    try:
        for _ in range(3):
            assert native.qwen2_read(memory.ctypes.data, memory.nbytes) == 0
            time.sleep(0.02)  # the worker falls asleep
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            codes = []
            for _ in range(6):
                codes.append(native.qwen2_read(memory.ctypes.data, memory.nbytes))
                time.sleep(0.02)
            os._exit(0 if codes == [0] * 6 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert native.qwen2_read(memory.ctypes.data, memory.nbytes) == 0  # and so does the parent
    finally:
        kernels.set_threads(1)


def test_more_threads_than_the_pool_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^threads 1,000: the kernels take at most 256$"):
        kernels.set_threads(1000)


V2, NESTED = "0::/\n", "0::/user.slice/job/inner\n"
V1 = "12:memory:/docker/a1\n4:cpu,cpuacct:/docker/a1\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        (V2, {"cpu.max": "max 100000"}, None),
        (V2, {"cpu.max": "200000 100000"}, 2),
        (V2, {"cpu.max": "150000 100000"}, 2),
        (V2, {"cpu.max": "1000 100000"}, 1),
        (V2, {"cpu.max": "nonsense"}, None),
        (V2, {"cpu.max": "100 0"}, None),
        (V2, {}, None),
        ("", {"cpu.max": "200000 100000"}, None),
        (NESTED, {"user.slice/job/inner/cpu.max": "300000 100000"}, 3),
        (
            NESTED,
            {
                "user.slice/job/inner/cpu.max": "max 100000",
                "user.slice/job/cpu.max": "400000 100000",
                "user.slice/cpu.max": "500000 100000",
            },
            4,
        ),
        ("0::/../../outer\n", {"cpu.max": "200000 100000"}, 2),
        (V1, {"cpu,cpuacct/docker/a1/cpu.cfs_quota_us": "250000", "cpu,cpuacct/docker/a1/cpu.cfs_period_us": "100000"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "50000"}, 1),  # in a container its group is the root
        (V1, {"cpu/docker/a1/cpu.cfs_quota_us": "-1", "cpu/docker/a1/cpu.cfs_period_us": "100000"}, None),
        (V1, {"memory/docker/a1/cpu.cfs_quota_us": "100000", "memory/docker/a1/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_a_group_s_share_of_time_limits_the_threads(groups: str, files: dict[str, str], cores: int | None, tmp_path: Path) -> None:
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert share_of_time(tmp_path) == cores


@pytest.mark.parametrize(("siblings", "cores"), [(("0,4", "1,5", "0,4", "1,5"), 2), (("0", "1", None, "3"), 4), ((None,) * 4, 4)])
def test_two_threads_of_a_core_count_once(
    siblings: tuple[str | None, ...], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    for cpu, text in enumerate(siblings):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        if text is not None:
            (folder / "thread_siblings_list").write_text(text + "\n")
    assert allowed_cores(tmp_path) == cores


@pytest.mark.parametrize(("share", "found"), [(None, 6), (2, 2), (8, 6)])
def test_workers_are_those_that_the_process_may_have(share: int | None, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine of 64 processors: a container that may use six of them, or the time of two."""
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr("qwen2.kernels.cores.share_of_time", lambda: share)
    assert processors() == found


def test_macos_is_asked_for_its_physical_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("qwen2.kernels.cores.share_of_time", lambda: None)
    monkeypatch.setattr("qwen2.kernels.cores.allowed_cores", lambda: 99)
    monkeypatch.setattr("qwen2.kernels.cores.sysctl", {"hw.physicalcpu": 6}.get)
    assert physical_cores() == 6
    monkeypatch.setattr("qwen2.kernels.cores.share_of_time", lambda: 4)
    assert physical_cores() == 4
    monkeypatch.setattr("qwen2.kernels.cores.sysctl", lambda _: None)
    assert physical_cores() == 4


@pytest.mark.skipif(sys.platform != "darwin", reason="only macOS has it")
def test_what_macos_says() -> None:
    said = subprocess.run(["sysctl", "-n", "hw.physicalcpu"], capture_output=True, text=True, check=True).stdout
    assert sysctl("hw.physicalcpu") == int(said)
    assert sysctl("hw.nothing") is None
