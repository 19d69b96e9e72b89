"""Rows that several threads encode: the same ones in the same order, few at a time, and it is said how far that is."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from qwen2.post.preference.pairs import collect as collect_pairs
from qwen2.post.preference.settings import DpoSettings
from qwen2.post.rows import reading as module
from qwen2.post.rows.examples import collect
from qwen2.post.rows.reading import AHEAD, Reading
from qwen2.post.rows.records import Example, PlainText, Preference, Record, Skipped
from tests.conftest import tiny_model
from tests.post.conftest import small, talk


def records(count: int) -> list[Record]:
    """Of all kinds, also such as are left out, short and long enough to be encoded beside other threads."""
    rng, made = random.Random(0), list[Record]()
    for number in range(count):
        where, turns = f"f:{number}", talk(rng, rng.choice((1, 2, 20)))
        kinds = (
            Example(turns, None, where),
            Example(turns, None, where, label=False),
            Preference(turns[:1], turns[1:2], [{"role": "assistant", "content": "other"}], None, where),
            PlainText(" ".join(message["content"] for message in turns), where),
            Skipped("not JSON", where),
        )
        made.append(kinds[number % len(kinds)])
    return made


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    template, rows = tiny_model().template, records(3 * AHEAD)
    of_sft = [collect(rows, template, small(eval_share=0.2, samples=2), None, Reading(threads)) for threads in (1, 2, 5)]
    for found in of_sft[1:]:
        for ours, first in ((found.examples, of_sft[0].examples), (found.held_out, of_sft[0].held_out)):
            assert (ours.sha256(), ours.where) == (first.sha256(), first.where)
        assert found.lines() == of_sft[0].lines()
        assert (found.prompts, found.first) == (of_sft[0].prompts, of_sft[0].first)
    assert of_sft[0].skipped.keys() >= {"longer than a row", "not JSON", "an unwanted answer (label false)"}
    for loss in ("dpo", "kto"):
        settings = DpoSettings(loss=loss, length=128, eval_share=0.2)  # type: ignore[arg-type]
        of_dpo = [collect_pairs(rows, template, settings, None, Reading(threads)) for threads in (1, 4)]
        assert of_dpo[0] == of_dpo[1]


def test_threads_work_beside_each_other_in_order_and_not_far_ahead() -> None:
    meet, drawn = threading.Barrier(2, timeout=60), 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for item in range(4 * AHEAD):
            drawn += 1
            yield item

    def work(item: int) -> int:
        if item < 2:
            meet.wait()  # which one thread alone never passes
        return item * item

    for number, (item, made) in enumerate(Reading(2)(work, items())):
        assert (item, made) == (number, number * number)
        assert drawn <= number + AHEAD


def test_what_is_raised_comes_at_its_turn_and_ends_the_threads() -> None:
    def work(item: int) -> int:
        if item == 5:
            raise RuntimeError("five")
        return item

    found = Reading(3)(work, range(100))
    assert [next(found)[0] for _ in range(5)] == list(range(5))
    with pytest.raises(RuntimeError, match="five"):
        next(found)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rows")]


@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_said_how_far_it_is(threads: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "EVERY", 0.0)
    assert len(list(Reading(threads)(str, range(30)))) == 30
    assert capsys.readouterr().err == ""
    with Reading(threads, shown=True) as reading:
        assert len(list(reading(str, range(30)))) == 30
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 30
    assert lines[-1].startswith("30 rows read, ")
    assert lines[-1].endswith(" a second")
