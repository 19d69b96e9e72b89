"""Conversations in files: they come back as they were, or with one clear line."""

from __future__ import annotations

import json
import os
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2.cli.conversation import FORMAT, Conversation, Turn, read_conversation
from qwen2.engine.request import SamplingParams


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.none() | st.text(), st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), st.text(), st.booleans())),
    st.builds(SamplingParams, temperature=st.none() | st.floats(0, 2), seed=st.none() | st.integers(-(2**63), 2**63 - 1),
              stop=st.lists(st.text(min_size=1)), logit_bias=st.dictionaries(st.integers(0, 500), st.floats(-100, 100))),
)  # fmt: skip
def test_saved_conversation_reads_back_the_same(tmp_path, system, turns, params):
    path = tmp_path / "talk.json"
    conversation = Conversation("tiny", system, params, turns)
    conversation.save(path)
    assert read_conversation(path) == conversation
    assert os.listdir(tmp_path) == ["talk.json"]


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "talk.json"
    old = Conversation("tiny", turns=[Turn("user", "old")])
    old.save(path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        Conversation("tiny", turns=[Turn("user", "new")]).save(path)
    assert read_conversation(path) == old
    assert os.listdir(tmp_path) == ["talk.json"]


GOOD = {"format": FORMAT, "model": "tiny", "system": None, "parameters": {}, "messages": []}
BAD = [
    ("{", "not a saved conversation (no JSON)"),
    ("[" * 100_000, "not a saved conversation (no JSON)"),
    ("[]", f'not a saved conversation (no "format": "{FORMAT}")'),
    ("{}", f'not a saved conversation (no "format": "{FORMAT}")'),
    ({**GOOD, "extra": 1}, "unknown key 'extra'"),
    ({**GOOD, "model": 1}, "model and system are texts, parameters an object"),
    ({**GOOD, "system": []}, "model and system are texts, parameters an object"),
    ({**GOOD, "messages": {}}, "messages is no list"),
    ({**GOOD, "messages": ["x"]}, "messages[0]: must be an object with role, content and perhaps stopped"),
    ({**GOOD, "messages": [{"role": "root", "content": ""}]},
     "messages[0]: role must be user or assistant, content a text, stopped true or false"),
    ({**GOOD, "messages": [{"role": "user", "content": None}]},
     "messages[0]: role must be user or assistant, content a text, stopped true or false"),
    ({**GOOD, "parameters": {"top_p": 0}}, "top_p 0: must be above 0 and at most 1 (off)"),
    ({**GOOD, "parameters": {"logit_bias": {"x": 1}}}, "invalid literal for int() with base 10: 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD)
def test_bad_file_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")) as caught:
        read_conversation(path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_no_conversation(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match="not a saved conversation"):
        read_conversation(path)
