"""Programs that a model might write: each limit holds, with namespaces and without, and nothing is left behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from qwen2.post.checks.sandbox import Limits, Sandbox

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a sandbox needs Linux or macOS, and says so")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and filters are Linux's")


@pytest.fixture(scope="module", params=[True, False], ids=["namespaces", "none"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return Sandbox(Limits(seconds=30.0, memory=256 << 20, output=1000, disk=1 << 20), isolate=request.param)


@pytest.fixture(scope="module", params=[True, False], ids=["namespaces", "none"])
def hasty(request: pytest.FixtureRequest) -> Sandbox:
    return Sandbox(Limits(seconds=0.3), isolate=request.param)


def run(sandbox: Sandbox, *lines: str, stdin: str = "") -> tuple[str, str, str]:
    ran = sandbox.run({"main.py": "\n".join(lines)}, stdin)
    return ran.end, ran.stdout, ran.why(sandbox.limits)


def test_a_program_runs(sandbox: Sandbox) -> None:
    assert sandbox.run({"main.py": "import part.two; print(input(), part.two.x)", "part/two.py": "x = 7"}, "\u4e2d").stdout == "\u4e2d 7\n"
    assert run(sandbox, "raise ValueError('so')") == ("exit", "", "exit code 1: ValueError: so")
    assert run(sandbox, "import os; os.abort()") == ("signal", "", "was ended by SIGABRT")
    if sys.platform == "linux":  # a signal without a name
        assert run(sandbox, "import signal; signal.raise_signal(40)") == ("signal", "", "was ended by signal 40")


@pytest.mark.parametrize("line", ["while True: pass", "import time; time.sleep(60)", "import signal; signal.pause()"])
def test_time(hasty: Sandbox, line: str) -> None:
    assert run(hasty, line) == ("time", "", "ran longer than 0.3 s")


def test_output_is_bounded(sandbox: Sandbox) -> None:
    end, stdout, why = run(sandbox, "while True: print('x' * 100)")
    assert (end, stdout[:3], why) == ("output", "xxx", "wrote more than 1,000 bytes")
    assert len(stdout) == 1000


@LINUX
@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("bytearray(10**9)", "MemoryError"),
        ("open('a', 'wb').write(bytes(10**7))", "OSError"),
        ("files = [open('a', 'w') for _ in range(1000)]", "OSError"),
        ("import os; os.fork()", "BlockingIOError"),
        ("import subprocess; subprocess.run(['true'])", "BlockingIOError"),
        ("import socket; socket.create_connection(('127.0.0.1', 80))", "PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
        ("import os; os.setsid()", "PermissionError"),
    ],
)
def test_what_is_refused(sandbox: Sandbox, line: str, error: str) -> None:
    end, stdout, why = run(sandbox, line, "print('went through')")
    assert (end, stdout) == ("exit", "")
    assert error in why


def test_the_environment_is_scrubbed(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "do not tell")
    told = run(sandbox, "import os", "print(sorted(os.environ))", "print(os.listdir('.'))")[1]
    assert told == "['HOME', 'LANG', 'OMP_NUM_THREADS', 'PATH', 'PYTHONHASHSEED', 'TMPDIR']\n['main.py']\n" or "LC_CTYPE" in told


def test_no_descriptor_of_ours_is_open(sandbox: Sandbox) -> None:
    assert run(sandbox, "import os", "for d in range(3, 60):", "  try: os.fstat(d); print(d)", "  except OSError: pass")[1] == ""


@LINUX
def test_other_files_can_only_be_read(tmp_path: Path) -> None:
    sandbox = Sandbox()
    if sandbox.missing:  # a system that permits no namespaces: then this is what is said
        assert "files of yours could be changed" in sandbox.missing[0]
        return
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    end, _, why = run(sandbox, f"import os; print(open({str(kept)!r}).read()); os.unlink({str(kept)!r})")
    assert (end, "Read-only file system" in why) == ("exit", True)
    assert kept.read_text() == "as it was"
    assert run(sandbox, "import os; print(os.getuid(), os.getpid() < 10)")[1] == "65534 True\n"
    _, stdout, why = run(sandbox, f"print(open('/proc/{os.getpid()}/environ').read())")
    assert (stdout, "FileNotFoundError" in why) == ("", True)


@LINUX
def test_what_a_system_lacks_is_named() -> None:
    assert Sandbox(isolate=False).missing == ("user namespaces: files of yours could be changed, processes of yours ended",)


def test_nothing_is_left_behind(hasty: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()
    run(hasty, "open('a', 'w').write('x')", "import time; time.sleep(60)")
    assert list(tmp_path.iterdir()) == []
    assert sys.platform != "linux" or set(os.listdir("/proc/self/fd")) == before


def test_limits_that_leave_nothing() -> None:
    with pytest.raises(ValueError, match="sandbox: seconds 0: must be above 0"):
        Limits(seconds=0)
