"""The whole of a conversation in a pseudo-terminal, with a tiny random model and with the real one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect")  # Unix only


def spawn(model: str | Path, home: Path, *flags: str):
    env = {
        **os.environ, "QWEN2_HOME": str(home), "PYTHONPATH": "src", "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1",
        "PROMPT_TOOLKIT_COLOR_DEPTH": "DEPTH_1_BIT", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    arguments = ["-m", "qwen2", "run", str(model), *flags]
    return pexpect.spawn(sys.executable, arguments, env=env, timeout=120, encoding="utf-8", dimensions=(40, 100), codec_errors="replace")


READY = r"a message, or /help"


@pytest.mark.parametrize("flags", [(), ("--plain",)])
def test_conversation_in_a_terminal(tiny_folder, tmp_path, flags):
    child = spawn(tiny_folder, tmp_path, "--ignore-eos", "--seed", "3", *flags)
    child.expect_exact("tiny-qwen2 (float32) on cpu")
    child.expect(READY)
    child.send("/help\r")
    child.expect_exact("/set parameter NAME VALUE")
    child.expect(READY)
    child.send("the fox\r")
    child.expect("reading the prompt")
    child.expect(r"[^\x1b\r\n]{10}")
    child.sendintr()
    child.expect_exact("(stopped)")
    child.expect(READY)
    child.send("/set parameter max_tokens 5\r")
    child.expect_exact("max_tokens: 5")
    child.expect(READY)
    child.send("and the dog\r")
    child.expect_exact("(cut: max_tokens 5 reached)")
    child.expect(READY)
    child.send("/show history\r")
    child.expect_exact("user: the fox")
    child.expect_exact("assistant (stopped): ")
    child.expect_exact("user: and the dog")
    child.expect_exact("assistant: ")
    child.expect(READY)
    child.sendintr()
    child.expect_exact("(Ctrl-D or /bye ends the conversation)")
    child.expect(READY)
    child.send("/bye\r")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "the fox" in (tmp_path / "history").read_text()


BACKGROUND = """
import os, subprocess, sys
code = "from qwen2.cli.answer import silent_keyboard\\nwith silent_keyboard(): pass"
child = subprocess.Popen([sys.executable, "-c", code], preexec_fn=os.setpgrp)
_, status = os.waitpid(child.pid, os.WUNTRACED)
print("stopped" if os.WIFSTOPPED(status) else f"ended with {os.waitstatus_to_exitcode(status)}")
child.kill()
"""


def test_a_job_in_the_background_leaves_the_keyboard_alone():
    """Else the terminal's driver stops it: `qwen2 run "..." > out &`."""
    environment = {**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
    child = pexpect.spawn(sys.executable, ["-c", BACKGROUND], env=environment, timeout=60, encoding="utf-8")
    assert child.read().strip() == "ended with 0"


ECHO = """
import sys, termios
from qwen2.cli.answer import silent_keyboard
echo = lambda: bool(termios.tcgetattr(0)[3] & termios.ECHO)
before = echo()
with silent_keyboard(): print(before, echo())
print(echo())
"""


def test_keys_do_not_echo_into_an_answer():
    environment = {**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
    child = pexpect.spawn(sys.executable, ["-c", ECHO], env=environment, timeout=60, encoding="utf-8")
    assert child.read().split() == ["True", "False", "True"]


TYPED_AHEAD = """
import sys, termios, types
from pathlib import Path
from qwen2.cli.prompt import converse

class Chat:
    done = False
    def handle(self, line):
        print("echo:", bool(termios.tcgetattr(0)[3] & termios.ECHO))
        self.done = line == "/bye"

converse(Chat(), Path(sys.argv[1]))
print("afterwards:", bool(termios.tcgetattr(0)[3] & termios.ECHO))
"""


def test_keys_do_not_echo_into_what_a_command_prints(tmp_path):
    environment = {**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1", "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn(sys.executable, ["-c", TYPED_AHEAD, str(tmp_path / "history")], env=environment, timeout=60, encoding="utf-8")
    for line in ("/load a.json", "/bye"):
        child.expect_exact(READY)
        child.send(f"{line}\r")
        child.expect("echo: (True|False)")
        assert child.match[1] == "False"
    child.expect("afterwards: (True|False)")
    assert child.match[1] == "True"
    child.expect(pexpect.EOF)


@pytest.mark.slow
def test_conversation_with_the_real_model(coder, tmp_path):
    """Asks, streams, answers, is interrupted, goes on and remembers."""
    child = spawn(coder, tmp_path, "--temperature", "0", "--plain")
    child.expect(READY, timeout=300)
    child.send("The password is swordfish. Repeat the password.\r")
    child.expect(r"(?s)reading the prompt.*swordfish")
    child.expect(READY)
    child.send("Count from 1 to 500, one number per line.\r")
    child.expect(r"\b5\r?\n6\r?\n7")
    child.sendintr()
    child.expect_exact("(stopped)")
    child.expect(READY)
    child.send("What was the password? Answer in one word.\r")
    child.expect("swordfish")
    child.expect(READY)
    child.send("/set parameter max_tokens 30\r")
    child.expect_exact("max_tokens: 30")
    child.send("\x04")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
