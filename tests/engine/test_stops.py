"""Stop strings across every cut of a text, against a search of the whole; text that never takes anything back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.engine.stops import AnswerText, StopMatcher
from tests.engine.conftest import byte_tokenizer


def slow_end(text, stops):
    """The text before the stop string that is complete first, and that string, by trying every prefix."""
    for length in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:length].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: length - len(longest)], longest
    return text, None


@st.composite
def cut_texts(draw):
    """A text over a small alphabet, so that stop strings begin often and end seldom, in pieces of any size."""
    pieces = draw(st.lists(st.text("ab<", max_size=4), max_size=8))
    stops = draw(st.lists(st.text("ab<", min_size=1, max_size=5), max_size=3))
    return pieces, stops


@settings(deadline=None)
@given(cut_texts())
def test_any_cut_gives_the_text_before_the_first_complete_stop(case):
    pieces, stops = case
    matcher, shown = StopMatcher(stops), ""
    for piece in pieces:
        shown += matcher.push(piece)
        assert slow_end("".join(pieces), stops)[0].startswith(shown)  # nothing is shown that must be taken back
    shown += matcher.flush()
    assert (shown, matcher.found) == slow_end("".join(pieces), stops)


@settings(deadline=None)
@given(cut_texts())
def test_no_more_is_held_back_than_could_become_a_stop(case):
    pieces, stops = case
    matcher = StopMatcher(stops)
    for piece in pieces:
        matcher.push(piece)
        if matcher.found is None:
            assert matcher.held == "" or any(stop.startswith(matcher.held) and stop != matcher.held for stop in stops)


@settings(deadline=None)
@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_byte_by_byte_as_a_whole(text, stops):
    tokenizer = byte_tokenizer()
    answer = AnswerText(tokenizer, frozenset(), stops)
    for token in tokenizer.encode(text):
        answer.push(token)
    answer.flush()
    assert (answer.whole(), answer.stopped) == slow_end(tokenizer.decode(tokenizer.encode(text)), stops)


def test_special_tokens_have_no_text_but_tool_calls_do():
    tokenizer = byte_tokenizer()
    answer = AnswerText(tokenizer, frozenset(tokenizer.control[t] for t in tokenizer.special), ())
    for token in tokenizer.encode_trusted("a<|im_end|><tool_call>b"):
        answer.push(token)
    assert answer.whole() == "a<tool_call>b"


def test_a_stop_string_can_cover_the_replacement_of_an_unfinished_character():
    answer = AnswerText(byte_tokenizer(), frozenset(), ["\ufffd"])
    assert answer.push(0xE4) == ""
    assert answer.flush() == ""
    assert answer.stopped == "\ufffd"
