"""Reports and pages of what comes after pre-training: fine-tuning, sampling, evaluations, and the stages of the run before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen2.cli.app import main
from qwen2.train.page import write_page
from qwen2.train.report import add, follow, report, stages, summary, write_report
from tests.train.test_report import Balanced, training


def estimate(value: float, low: float, high: float, count: int = 2000) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "count": count}


def evaluation(folder: Path, value: float, bits: float | None, gain: dict[str, Any] | None = None) -> None:
    folder.mkdir()
    match = estimate(value, value - 0.02, value + 0.03)
    found = {"model": "m", "exact_match": match, "by_source": {"add story": match}, "by_language": {"de": match}, "not_judged": {}}
    (folder / "exact.json").write_text(json.dumps({**found, **({} if gain is None else {"difference": gain}), "problems": []}))
    if bits is not None:
        (folder / "bits.json").write_text(json.dumps({"model": "m", "bits_per_byte": {"de": bits, "lo": bits + 1}, "mean": bits + 0.5}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that goes on from another one."""
    base, run = tmp_path / "base", tmp_path / "out" / "tiny"
    base.mkdir()
    training(base / "short", 800_000, 7.0, 3.0, (4.0, 2.0))
    add(base, "short", "training", 600.0)
    follow(run, base)
    (run / "problems").mkdir()
    (run / "problems" / "train.jsonl").write_text('{"prompt": "1 + 1?"}\n{"prompt": "1 + 2?"}\n\n')
    training(run / "sft", 50_000, 2.0, 1.0, (1.5, 0.75))
    lines = (run / "sft" / "metrics.jsonl").read_text().replace('"de"', '"held-out loss"').replace('"lo"', '"reward_chosen"')
    (run / "sft" / "metrics.jsonl").write_text(lines)
    evaluation(run / "after-sft", 0.25, 2.5)
    (run / "reject").mkdir()
    group = {"prompts": 10, "solved": 8, "answers": 160, "right": 40}
    counts = {"prompts": 10, "finished": 10, "solved": 8, "answers": 160, "right": 40, "wrong": 110, "cut": 10, "sft_rows": 22, "pairs": 7}
    passes = {"1": 0.25, "2": 0.375, "16": 0.8}
    (run / "reject" / "summary.json").write_text(
        json.dumps({**counts, "pass_at": passes, "by_source": {"add": group}, "by_language": {"de": group}})
    )
    evaluation(run / "after-dpo", 0.5, None, {"against": "<sft>", **estimate(0.25, 0.22, 0.28)})
    for name, kind in (
        ("problems", "rows"),
        ("sft", "tuning"),
        ("after-sft", "evaluation"),
        ("reject", "sampling"),
        ("after-dpo", "evaluation"),
    ):
        add(run, name, kind, 10.0)
    return run


def test_figures(run: Path) -> None:
    found = {stage["name"]: stage for stage in write_report(run)["stages"]}
    assert list(found) == ["short", "problems", "sft", "after-sft", "reject", "after-dpo"]
    assert found["short"]["tokens"] == 800_000
    assert found["problems"]["rows"] == {"train.jsonl": 2}
    assert found["sft"]["held_out"]["after"] == {"held-out loss": 0.75, "reward_chosen": 1.75, "xx": None}
    assert "bits_per_byte" not in found["sft"]
    assert found["after-sft"]["exact_match"]["low"] == pytest.approx(0.23)
    assert (found["after-sft"]["difference"], found["after-sft"]["bits_per_byte_mean"]) == (None, 3.0)
    assert found["after-dpo"]["difference"]["against"] == "<sft>"
    assert "bits_per_byte" not in found["after-dpo"]
    assert (found["reject"]["pass_at"]["16"], found["reject"]["pairs"]) == (0.8, 7)


def test_the_summary_and_the_page(run: Path) -> None:
    rows = summary(report(run))
    assert [row["exact match"] for row in rows] == ["", "", "", "25.0 % (23.0 to 28.0)", "", "50.0 % (48.0 to 53.0)"]
    assert [row["bits per byte"] for row in rows] == ["4.500 -> 2.500", "", "", "3.000", "", ""]
    page = Balanced()
    page.feed(write_page(run, "tiny").read_text())
    assert page.open == []
    words = " ".join(page.words)
    assert "standard error" not in words
    for shown in (
        "25% \u2192 50% exact match, after-sft to after-dpo",
        "1.500 \u2192 0.750 held-out loss",
        "2.500 \u2192 1.750 reward chosen, held-out",
        "8 of 10 prompts solved",
        "80.0% pass@16",
        "22 rows for fine-tuning",
        "25.0 % (22.0 to 28.0) more than <sft>",
        "3.000 bits per byte",
    ):
        assert shown in words


def test_a_run_goes_on_from_another_once(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stages(run)
    assert main(["report", "follow", str(run), str(tmp_path / "base")]) == 0
    assert stages(run) == before
    assert stages(run)[0]["folder"] == "../../base/short"
    assert main(["report", "follow", str(run), str(tmp_path / "none")]) == 1
    assert "none: no finished stages here" in capsys.readouterr().err
    shutil.rmtree(run / "after-dpo")
    (run / "after-dpo").mkdir()
    with pytest.raises(ValueError, match=r"neither exact\.json nor bits\.json; nothing was measured there"):
        report(run)


def test_held_out_figures_are_shown_with_their_errors(run: Path) -> None:
    path = run / "sft" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"reward_chosen"', '"held-out loss standard error"'))
    page = Balanced()
    page.feed(write_page(run, "tiny").read_text())
    words = " ".join(page.words)
    assert "1.500\u00a0\u00b1\u00a02.500 \u2192 0.750\u00a0\u00b1\u00a01.750 held-out loss" in words
    assert "standard error" not in words


def test_each_model_is_compared_with_itself(run: Path) -> None:
    """A second model's evaluations begin a line of their own: its last figure is not set against the first one's first."""
    evaluation(run / "before-large", 0.6, None)
    evaluation(run / "after-large", 0.7, None, {"against": "<large>", **estimate(0.1, 0.08, 0.12)})
    for name in ("before-large", "after-large"):
        add(run, name, "evaluation", 10.0)
    page = Balanced()
    page.feed(write_page(run, "two").read_text())
    words = " ".join(page.words)
    assert "25% \u2192 50% exact match, after-sft to after-dpo" in words
    assert "60% \u2192 70% exact match, before-large to after-large" in words


def test_an_answer_stands_below_its_prompt(run: Path) -> None:
    (run / "answers").mkdir()
    for name, text in (("1-en.prompt", "What is 1 + 1?"), ("1-en.answer", "2"), ("2-de.prompt", "Es war"), ("2-de.text", " einmal")):
        (run / "answers" / name).write_text(text + "\n")
    add(run, "answers", "samples", 1.0)
    text = write_page(run, "answers").read_text()
    assert "<b>What is 1 + 1?</b><br>2</blockquote>" in text
    assert "<b>Es war</b> einmal</blockquote>" in text
