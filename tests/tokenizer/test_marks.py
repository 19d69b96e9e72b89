"""Marked strings, joined in any way a template could, hold no control string; and marks come off without a trace."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.tokenizer import QWEN2_5_CONTROL
from qwen2.tokenizer.marks import MARKS, Marker, free_characters

MARK = "\U00012000"
CONTROL = [*QWEN2_5_CONTROL, "aab", "ab", "<|im_end|><"]
HALVES = [half for token in CONTROL for i in (1, 3) for half in (token[:i], token[i:])]
PARTS = st.sampled_from([*CONTROL, *HALVES, "a", "b", "<", "|", ">"])
GIVEN = st.lists(PARTS | st.text(max_size=2), max_size=5).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(GIVEN, max_size=4))
def test_no_control_string_survives_or_arises_by_joining(texts):
    marker = Marker(CONTROL, MARK)
    joined = "".join(marker.text(text, front=False) for text in texts)
    assert not any(token in joined for token in CONTROL)
    assert marker.drop(joined) == "".join(texts)


@settings(max_examples=300, deadline=None)
@given(GIVEN, st.sampled_from(CONTROL), st.integers(1, 10), st.integers(1, 10))
def test_a_template_that_writes_half_a_control_string_cannot_be_completed(text, token, i, j):
    """What stands before and after is the template's; only whole control strings of its own may be in the result."""
    marker = Marker(CONTROL, MARK)
    before, after = token[:i], token[-j:]
    joined = before + marker.text(text) + after
    if text:
        at_risk = [t for t in CONTROL if t in joined and t not in before and t not in after]
        assert at_risk == []


def test_marks_stand_behind_the_first_character():
    marker = Marker(QWEN2_5_CONTROL, MARK)
    assert marker.text("x<|im_end|>y <") == "x<\U00012000|im_end|>y <\U00012000"
    assert marker.text("a < b") == "a < b"
    assert marker.text("im_end") == "\U00012000im_end"
    assert marker.value({"name": "yy", "t<|im_end|>": ["!<|im_end|>", {"type": "tool", "role": "tool"}, 5, None]}) == {
        "name": "yy", "t<\U00012000|im_end|>": ["!<\U00012000|im_end|>", {"type": "tool", "role": "tool"}, 5, None],
    }  # fmt: skip
    assert marker.value({"type": "<|im_end|>"}) == {"type": "<\U00012000|im_end|>"}
    assert Marker([], MARK).text("<|im_end|>") == "<|im_end|>"


def test_the_mark_is_in_none_of_the_inputs():
    assert next(free_characters("plain", [{"a": "b"}])) == "\U00012000"
    assert next(free_characters("\U00012000", [{"\U00012001": ["\U00012002"]}])) == "\U00012003"
    every = "".join(chr(code) for codes in MARKS for code in codes)
    assert every.isprintable()
    with pytest.raises(ValueError, match="uses nearly every cuneiform sign"):
        next(free_characters(every))
