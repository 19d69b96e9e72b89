"""`make chat` as a person meets it: in a terminal, in the repository's own environment, with the real model.

It belongs to `make test`, which has made that environment. A run from elsewhere that finds none, or one that is out of date, skips
it: installing is no test's business.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qwen2.weights.registry import DEFAULT_MODEL
from qwen2.weights.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

pexpect = pytest.importorskip("pexpect")  # Unix only

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv"
READY = "a message, or /help"


@pytest.fixture(scope="module")
def home(coder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A QWEN2_HOME that has the default model: nothing is left to download, and nobody's history is written."""
    if Path(sys.prefix) != VENV and not up_to_date():
        pytest.skip("no .venv that is up to date: run it through make test")
    assert up_to_date(), "make test has made .venv, and yet make would install it again"
    home = tmp_path_factory.mktemp("home")
    Store(home).pull(DEFAULT_MODEL, local=coder)
    yield home
    shutil.rmtree(home)  # half a gigabyte


def up_to_date() -> bool:
    return shutil.which("make") is not None and subprocess.run(["make", "-q", ".venv/.base"], cwd=ROOT, check=False).returncode == 0


def make_chat(home: Path):
    """`make chat` in a terminal of its own; PROMPT_TOOLKIT_NO_CPR as pexpect does not say where the cursor is."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    env = {**kept, "QWEN2_HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"}
    return pexpect.spawn(
        "make",
        ["chat"],
        cwd=str(ROOT),
        env=env,
        timeout=300,
        encoding="utf-8",
        dimensions=(40, 100),
        codec_errors="replace",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a suite that runs in the background may find ignored
    )


@pytest.mark.slow
def test_make_chat_asks_streams_answers_is_interrupted_and_goes_on(home):
    child = make_chat(home)
    child.expect_exact(READY)
    assert re.search(rf"{re.escape(DEFAULT_MODEL)} \(Q4_K_M\) on cpu", child.before)
    assert "install:" not in child.before  # the environment was there
    child.send("/set temperature 0\r")
    child.expect_exact(READY)
    child.send("The password is swordfish. Repeat the password.\r")
    child.expect(r"(?s)reading the prompt.*swordfish")
    child.expect_exact(READY)
    child.send("Write a story of a thousand words about a river.\r")
    child.expect(r"(?s)reading the prompt.*?\w+ \w+ \w+ \w+ \w+ \w+")  # the first words are here, the rest is to come
    child.sendintr()
    child.expect_exact("(stopped)")
    child.expect_exact(READY)
    child.send("What was the password? Answer in one word.\r")
    child.expect("(?s)reading the prompt.*swordfish")
    child.expect_exact(READY)
    child.send("/bye\r")
    child.expect(pexpect.EOF)
    child.wait()  # on a busy machine make is not yet gone, and `close` would end it by a signal of its own
    child.close()
    assert child.signalstatus == signal.SIGINT  # make's, whom Ctrl-C reached too: it waits for qwen2, which went on, and then says so
    assert "Traceback" not in child.before
    assert "Error" not in child.before  # make would say it of a recipe that failed


@pytest.mark.slow
def test_second_call_installs_and_downloads_nothing(home):
    for _ in range(2):
        child = make_chat(home)
        child.expect_exact(READY)
        assert "install:" not in child.before
        assert "pull" not in child.before
        child.send("/bye\r")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0
