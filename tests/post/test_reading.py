"""Rows that several processes encode: the same ones in the same order, few at a time, and it is said how far that is."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterator

import pytest

from qwen2.post.preference.pairs import collect as collect_pairs
from qwen2.post.preference.settings import DpoSettings
from qwen2.post.rows import reading as module
from qwen2.post.rows.examples import collect
from qwen2.post.rows.reading import AHEAD, CHUNK, Reading
from qwen2.post.rows.records import Example, PlainText, Preference, Record, Skipped
from tests.conftest import tiny_model
from tests.post.conftest import small, talk


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST", 20)


def records(count: int) -> list[Record]:
    """Of all kinds, also such as are left out."""
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


def test_results_do_not_depend_on_the_number_of_processes() -> None:
    template, rows = tiny_model().template, records(20 + 3 * CHUNK + 5)
    of_sft = [collect(rows, template, small(eval_share=0.2, samples=2), None, Reading(workers)) for workers in (1, 2)]
    for found in of_sft[1:]:
        for ours, first in ((found.examples, of_sft[0].examples), (found.held_out, of_sft[0].held_out)):
            assert (ours.sha256(), ours.where) == (first.sha256(), first.where)
        assert found.lines() == of_sft[0].lines()
        assert (found.prompts, found.first) == (of_sft[0].prompts, of_sft[0].first)
    assert of_sft[0].skipped.keys() >= {"longer than a row", "not JSON", "an unwanted answer (label false)"}
    settings = DpoSettings(loss="kto", length=128, eval_share=0.2)
    of_dpo = [collect_pairs(rows, template, settings, None, Reading(workers)) for workers in (1, 2)]
    assert of_dpo[0] == of_dpo[1]


def work(item: int) -> tuple[int, int]:
    if item == 250:
        raise RuntimeError("two hundred and fifty")
    if item == 450:
        os._exit(1)
    return item * item, os.getpid()


def test_processes_work_in_order_and_not_far_ahead() -> None:
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for item in range(1000, 1000 + 20 * CHUNK):
            drawn += 1
            yield item

    processes = set[int]()
    for number, (item, (made, process)) in enumerate(Reading(2)(work, items())):
        assert (item, made) == (1000 + number, (1000 + number) ** 2)
        assert drawn <= number + (2 * AHEAD + 2) * CHUNK
        assert (process == os.getpid()) == (number < 20), "the first ones are made here"
        processes.add(process)
    assert len(processes) >= 2
    assert not multiprocessing.active_children()


def test_few_rows_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ProcessPoolExecutor", None)
    assert len(list(Reading(2)(str, range(20)))) == 20
    assert len(list(Reading(1)(str, range(500)))) == 500


@pytest.mark.parametrize(
    ("start", "error", "message"), [(200, RuntimeError, "fifty"), (400, OSError, "a process that encodes rows was ended")]
)
def test_what_goes_wrong_is_raised_and_ends_the_processes(start: int, error: type[Exception], message: str) -> None:
    found = Reading(2)(work, range(start, start + 100))
    assert [next(found)[0] for _ in range(20)] == list(range(start, start + 20))
    with pytest.raises(error, match=message):
        list(found)
    assert not multiprocessing.active_children()


def test_it_is_said_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "EVERY", 0.0)
    assert len(list(Reading()(str, range(30)))) == 30
    assert capsys.readouterr().err == ""
    with Reading(shown=True) as reading:
        assert len(list(reading(str, range(30)))) == 30
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 30
    assert lines[-1].startswith("30 rows read, ")
    assert lines[-1].endswith(" a second")
