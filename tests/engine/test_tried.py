"""What is kept of trials: how each ended, if the form was to blame; and that a verdict does not depend on who else is at work."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qwen2.engine import grammar as grammar_module
from qwen2.engine.constraint import Constraint, ConstraintError
from qwen2.engine.grammar import TRIAL, Grammars, UntriedError, no_trials
from tests.engine.conftest import byte_tokenizer

V = 512


def test_what_failed_is_remembered_and_what_could_not_be_tried_is_not(monkeypatch):
    grammars, tried, ends = Grammars(byte_tokenizer(), V), [], [OSError("no process"), ConstraintError("regex: bad"), None]

    def trial(kind, grammar):
        tried.append(kind)
        if ends[len(tried) - 1] is not None:
            raise ends[len(tried) - 1]

    monkeypatch.setattr(grammar_module, "_try", trial)
    with no_trials(), pytest.raises(UntriedError):
        grammars.compiled(Constraint.regex("a"))
    with pytest.raises(OSError, match="no process"):
        grammars.compiled(Constraint.regex("a"))
    for _ in range(3):
        with pytest.raises(ConstraintError, match=r"^regex: bad$"):
            grammars.compiled(Constraint.regex("a"))
    with no_trials(), pytest.raises(ConstraintError, match=r"^regex: bad$"):
        grammars.compiled(Constraint.regex("a"))
    monkeypatch.setattr(grammar_module, "MOST_KEPT_CHARACTERS", 0)
    grammars.compiled(Constraint.regex("b"))
    assert (tried, grammars._tried) == (["regex"] * 3, {}), "failures count among what is kept"


def test_of_many_tools_not_each_is_tried_for_seconds(monkeypatch):
    tried, now = [], [0.0]

    def slow(kind, grammar):
        tried.append(kind)
        now[0] += 2.9
        if kind == "call":
            raise ConstraintError("call: not compiled within 3 s; make it simpler")

    monkeypatch.setattr(grammar_module, "_try", slow)
    monkeypatch.setattr(grammar_module.time, "monotonic", lambda: now[0])
    tools = {f"tool{i}": {"type": "object", "properties": {f"p{i}": {}}} for i in range(100)}
    with pytest.raises(ConstraintError, match=r"^the tools together: not compiled within 3 s; make it simpler$"):
        Grammars(byte_tokenizer(), V).compiled(Constraint.call(tools, "hermes", forced=True))
    assert len(tried) < 6


@pytest.mark.skipif(sys.platform != "linux", reason="the processor's time is counted on POSIX systems")
def test_a_trial_is_given_time_of_the_processor():
    """A process that is stopped for longer than its time is not to blame."""
    job = {"grammar": json.dumps({"grammars": [{"lark_grammar": "start: /a/"}]}), "limits": {}, "seconds": 0.5, "memory": 1 << 30}
    with subprocess.Popen([sys.executable, str(TRIAL)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            answer, _ = process.communicate(json.dumps(job) + "\n", timeout=30)
        finally:
            process.kill()
    assert json.loads(answer) == {"error": ""}
