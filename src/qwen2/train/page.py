"""A run as one HTML page: for each finished stage its figures, its curves, its samples. Self-contained, no scripts, nothing loaded.

The page shows what report.py read and draws what the stages' folders hold; a stage of a kind that has no section of its own gets a
table of its figures. What is left out: interaction, and stages that are not finished.

    write_page(Path("runs/out/base"))         # -> report.json and report.html there
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from qwen2.train.charts import dot_chart, line_chart
from qwen2.train.metrics import read_lines
from qwen2.train.report import Figures, begins, in_percent, write_report
from qwen2.train.standard_error import is_error, named

PAGE = "report.html"
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; color: #1f2937; background: #fff;
  max-width: 52rem; margin: 2rem auto 4rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .4rem; border-top: 1px solid #e5e7eb; padding-top: 1.2rem; }
h2 small { font-weight: normal; color: #6b7280; float: right; font-size: .85rem; }
p { margin: .4rem 0 .8rem; }
.faint { color: #6b7280; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .6rem; margin: 1.2rem 0; }
.cards div { background: #f8fafc; border: 1px solid #e5e7eb; border-radius: .5rem; padding: .5rem .8rem; }
.cards b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.cards span { color: #6b7280; font-size: .82rem; display: block; line-height: 1.35; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { text-align: right; padding: .12rem .7rem; border-bottom: 1px solid #eef0f3; }
th { color: #6b7280; font-weight: 500; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.words th:last-child, .words td:last-child { text-align: left; }
svg, img { width: 100%; height: auto; display: block; margin: .6rem 0; }
blockquote { margin: .5rem 0; padding: .5rem .9rem; background: #f8fafc; border-left: 3px solid #cbd5e1; white-space: pre-wrap;
  overflow-wrap: anywhere; }
blockquote b { font-weight: 600; color: #2563eb; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: #6b7280; }
"""
Section = Callable[[Figures, Path], list[str]]


def write_page(run: Path, title: str | None = None) -> Path:
    """report.json and report.html of a run's folder; returns the page's path. ValueError where no stage is finished."""
    found = write_report(run)
    text = page(found, run, title if title is not None else run.name)
    path, draft = run / PAGE, run / f".{PAGE}.{os.getpid()}.part"
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
    return path


def page(found: Figures, run: Path, title: str) -> str:
    """The whole page as text."""
    machine = found["machine"]
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{escape(machine["processor"])}, {machine["cores"]} cores, torch {escape(machine["torch"])}; '
        f"{len(found['stages'])} stages in {duration(found['seconds'])}</p>",
        _cards(_headline(found)),
        *_curves(found, run),
        *_languages(found),
        *_matches(found),
    ]
    for stage in found["stages"]:
        body.append(f"<h2>{escape(stage['name'])} <small>{duration(stage['seconds'])}</small></h2>")
        body += SECTIONS.get(stage["kind"], _plain)(stage, run / stage["folder"])
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


# ------------------------------------------------------------------------------------------------------ over all stages


def _trainings(found: Figures) -> list[Figures]:
    return [stage for stage in found["stages"] if stage["kind"] == "training"]


def _headline(found: Figures) -> list[tuple[str, str]]:
    """What one looks for first: (figure, what it is)."""
    cards = [(duration(found["seconds"]), "all stages together")]
    budgets = [stage for stage in found["stages"] if stage["kind"] == "budget"]
    trained = _trainings(found)
    if budgets:
        cards.append((short(budgets[-1]["parameters"]), "parameters"))
    if trained:
        cards.append((short(sum(stage["tokens"] for stage in trained)), "tokens trained on"))
        cards.append((f"{trained[-1]['loss']:.3f}", "loss, nats a token, at the end"))
        means = [stage["bits_per_byte_mean"] for stage in trained if "bits_per_byte_mean" in stage]
        if means and means[0]["before"] is not None and means[-1]["after"] is not None:
            cards.append((f"{means[0]['before']:.2f} \u2192 {means[-1]['after']:.2f}", "bits per byte, mean of languages"))
    for line in _lines(_measured(found)):
        ends = line if len(line) == 1 else (line[0], line[-1])
        figures = (f"{stage['exact_match']['value']:.0%}" for stage in ends)
        cards.append((" \u2192 ".join(figures), f"exact match, {' to '.join(stage['name'] for stage in ends)}"))
    return cards


def _lines(measured: Sequence[Figures]) -> list[list[Figures]]:
    """Evaluations of one model after the other: one that is not compared with an earlier one begins anew."""
    lines: list[list[Figures]] = []
    for stage in measured:
        if stage["difference"] is None or not lines:
            lines.append([])
        lines[-1].append(stage)
    return lines


def _measured(found: Figures) -> list[Figures]:
    return [stage for stage in found["stages"] if "exact_match" in stage]


def _matches(found: Figures) -> list[str]:
    """The exact match of every evaluation, with its interval."""
    measured = _measured(found)
    if len(measured) < 2:
        return []
    rows = {stage["name"]: {name: 100 * stage["exact_match"][name] for name in ("low", "value", "high")} for stage in measured}
    table = _table(["evaluation", "exact match"], [[stage["name"], in_percent(stage["exact_match"])] for stage in measured])
    chart = dot_chart(rows, "exact match in percent, with the interval that holds it in 95 of 100 cases")
    return [chart, f"<details><summary>as a table</summary>{table}</details>"]


def _curves(found: Figures, run: Path) -> list[str]:
    """The loss of all training stages over the tokens, each from where the one that it goes on from ended."""
    series: dict[str, list[tuple[float, float]]] = {}
    starts = begins(found, run)
    for stage in _trainings(found):
        before = starts[stage["name"]]
        lines = [line for line in read_lines(run / stage["folder"] / "metrics.jsonl") if line.get("loss") is not None]
        series[stage["name"]] = smoothed([(before + line["tokens"], line["loss"]) for line in lines])
    marks = [(float(start), "") for start in sorted(set(starts.values())) if start]
    return [line_chart(series, "tokens", "loss, nats a token", marks)] if series else []


def _languages(found: Figures) -> list[str]:
    """Bits per byte by language before training, after each stage, and at each evaluation."""
    rows: dict[str, dict[str, float]] = {}
    for number, stage in enumerate(stage for stage in _trainings(found) if "bits_per_byte" in stage):
        moments = {"untrained": stage["bits_per_byte"]["before"]} if number == 0 else {}
        moments[f"after {stage['name']}"] = stage["bits_per_byte"]["after"]
        for moment, values in moments.items():
            for code, value in values.items():
                if value is not None:
                    rows.setdefault(code, {})[moment] = value
    for stage in found["stages"]:
        if stage["kind"] == "evaluation":
            for code, value in stage.get("bits_per_byte", {}).items():
                rows.setdefault(code, {})[stage["name"]] = value
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = _table(["language", *names], [[code, *(_fixed(row.get(name), 3) for name in names)] for code, row in sorted(rows.items())])
    chart = dot_chart(dict(sorted(rows.items())), "bits per byte of held-out text (less is better)")
    return [chart, f"<details><summary>as a table</summary>{table}</details>"]


# ------------------------------------------------------------------------------------------------- a section for each kind


def _training(stage: Figures, folder: Path) -> list[str]:
    means = stage.get("bits_per_byte_mean")
    if not means or means["before"] is None or means["after"] is None:
        return _run(stage, folder, [])
    return _run(stage, folder, [(f"{means['before']:.3f} \u2192 {means['after']:.3f}", "bits per byte, mean of languages")])


def _tuning(stage: Figures, folder: Path) -> list[str]:
    held_out = stage.get("held_out", {"before": {}, "after": {}})
    cards = []
    for name in held_out["before"]:
        sides = [_with_error(held_out[when], name) for when in ("before", "after")]
        if not is_error(name) and all(sides):
            cards.append((" \u2192 ".join(sides), _held_out(name)))
    return _run(stage, folder, cards)


def _with_error(values: Figures, name: str) -> str:
    """A figure with its standard error, where it has one; nothing where there is none."""
    value, error = values.get(name), values.get(named(name))
    return "" if value is None else f"{value:.3f}" + ("" if error is None else f"\u00a0\u00b1\u00a0{error:.3f}")


def _held_out(name: str) -> str:
    return name if "held-out" in name else f"{name.replace('_', ' ')}, held-out"


def _run(stage: Figures, folder: Path, more: Sequence[tuple[str, str]]) -> list[str]:
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line.get("loss") is not None]
    cards = [
        (short(stage["tokens"]), f"tokens in {stage['steps']:,} steps"),
        (f"{stage['length']:,}", f"tokens a row, rotary base {stage['rope_theta']:,.0f}"),
        (f"{stage['loss']:.3f}", "loss at the end"),
        (f"{stage['tokens_per_s']:,.0f}", "tokens/s" + (f", {stage['mfu']:.0%} of the products' rate" if stage["mfu"] is not None else "")),
    ]
    what = "loss" if any("margin" in line for line in lines) else "loss, nats a token"  # of preferences: what a pair has, or an answer
    out = [
        _cards([*cards, *more]),
        line_chart({"loss": smoothed([(line["step"], line["loss"]) for line in lines])}, "step", what),
    ]
    if stage["events"]:
        events = "".join(f"<li>{escape(text)}</li>" for text in stage["events"])
        out.append(f"<details open><summary>{len(stage['events'])} events</summary><ul>{events}</ul></details>")
    return out


def _corpus(stage: Figures, folder: Path) -> list[str]:
    rows = [[name, one["version"], one["licence"], f"{one['documents']:,}", short(one["bytes"])] for name, one in stage["packages"].items()]
    table = _table(["package", "version", "licence", "documents", "bytes"], rows)
    gone = "".join(f"<li>{escape(name)} could not be had: {escape(str(why))}</li>" for name, why in stage["gone"].items())
    text = f"{len(rows)} packages with {short(stage['bytes'])} bytes of text."
    return [
        f"<p>{text}</p>",
        f"<ul>{gone}</ul>" if gone else "",
        f"<details><summary>packages and their licences</summary>{table}</details>",
    ]


def _texts(stage: Figures, folder: Path) -> list[str]:
    rows = []
    for step in stage["steps"]:
        most = sorted(step["dropped"].items(), key=lambda item: -item[1])
        why = ", ".join(f"{reason} {count:,}" for reason, count in most[:4]) + (", ..." if len(most) > 4 else "")
        rows.append([step["step"], f"{step['documents']:,}", short(step["bytes"]), f"{sum(step['dropped'].values()):,}", why])
    out = [_table(["step", "documents kept", "bytes kept", "dropped", "most of them for"], rows, words=True)]
    out += ["<ul>", *(f"<li>{escape(line)}</li>" for line in stage["notes"]), "</ul>"] if stage["notes"] else []
    picture = folder / "report.png"
    if picture.exists():
        data = b64encode(picture.read_bytes()).decode()
        out.append(
            f'<details open><summary>by language</summary><img alt="what each step kept" src="data:image/png;base64,{data}"></details>'
        )
    return out


def _shards(stage: Figures, folder: Path) -> list[str]:
    rows = []
    for code, row in stage["languages"].items():
        train, held = row["train"], row["held-out"]
        rows.append([code, f"{train['documents']:,}", short(train["bytes"]), short(train["tokens"]), short(held["tokens"])])
    table = _table(["language", "documents", "bytes", "tokens", "held-out tokens"], rows)
    shares = {code: {"tokens": float(row["train"]["tokens"])} for code, row in stage["languages"].items()}
    text = (
        f"{stage['documents']:,} documents, {short(stage['bytes'])} bytes, {short(stage['tokens'])} tokens in {len(rows)} languages; "
        f"{short(stage['held_out_tokens'])} more are held out."
    )
    return [f"<p>{text}</p>", dot_chart(shares, "tokens to train on"), f"<details><summary>as a table</summary>{table}</details>"]


def _tokenizer(stage: Figures, folder: Path) -> list[str]:
    out = [f"<p>{stage['vocab']:,} entries, learned from {short(stage['learned_from_bytes'])} bytes.</p>"]
    rows = stage["bytes_per_token"]
    if rows:
        names = list(next(iter(rows.values())))
        out.append(dot_chart(rows, "bytes a token (more is better)"))
        table = _table(["language", *names], [[code, *(_fixed(row[name], 2) for name in names)] for code, row in rows.items()])
        out.append(f"<details><summary>as a table</summary>{table}</details>")
    return out


def _budget(stage: Figures, folder: Path) -> list[str]:
    said = "".join(f"<li>{escape(line)}</li>" for line in stage["said"])
    rows = [
        [name, f"{one['length']:,}", f"{one['batch']:,}", f"{one['steps']:,}", short(one["tokens"]), f"{one['tokens_per_s']:,.0f}"]
        for name, one in stage["planned"].items()
    ]
    return [f"<ul>{said}</ul>", _table(["stage", "tokens a row", "rows a step", "steps", "tokens", "tokens/s"], rows)]


def _files(stage: Figures, folder: Path) -> list[str]:
    return [_table(["file", "bytes"], [[name, f"{size:,}"] for name, size in stage["files"].items()])]


def _rows(stage: Figures, folder: Path) -> list[str]:
    return [_table(["file", "rows"], [[name, f"{count:,}"] for name, count in stage["rows"].items()])]


def _sampling(stage: Figures, folder: Path) -> list[str]:
    passes = [(f"{share:.1%}", f"pass@{k}") for k, share in stage["pass_at"].items()]
    counted = f"{stage['solved']:,} of {stage['prompts']:,}"
    cards = [(counted, "prompts solved"), (short(stage["answers"]), "answers"), *passes[:1], *passes[1:][-1:]]
    cards += [(f"{stage['sft_rows']:,}", "rows for fine-tuning"), (f"{stage['pairs']:,}", "preference pairs")]
    rows = [
        [name, f"{one['prompts']:,}", f"{one['solved']:,}", f"{one['right'] / max(one['answers'], 1):.1%}"]
        for group in (stage["by_source"], stage["by_language"])
        for name, one in group.items()
    ]
    table = _table(["source or language", "prompts", "solved", "right answers"], rows)
    return [_cards(cards), f"<details><summary>by source and language</summary>{table}</details>"]


def _evaluation(stage: Figures, folder: Path) -> list[str]:
    cards, tables = [], []
    if "exact_match" in stage:
        match, gain = stage["exact_match"], stage["difference"]
        cards.append((in_percent(match), f"exact match, of {match['count']:,} problems"))
        if gain is not None:
            cards.append((in_percent(gain), f"more than {gain['against']}"))
        groups = [*stage["by_source"].items(), *stage["by_language"].items()]
        table = _table(
            ["source or language", "problems", "exact match"], [[key, f"{one['count']:,}", in_percent(one)] for key, one in groups]
        )
        tables.append(f"<details><summary>by source and language</summary>{table}</details>")
    if stage.get("bits_per_byte_mean") is not None:
        cards.append((f"{stage['bits_per_byte_mean']:.3f}", "bits per byte, mean of languages"))
    return [_cards(cards), *tables]


def _upcycling(stage: Figures, folder: Path) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in stage["settings"].items() if value is not None)
    return [f"<p>{stage['parameters']:,} parameters from {escape(str(stage['from']))}: {escape(settings)}.</p>"]


def _samples(stage: Figures, folder: Path) -> list[str]:
    """Each prompt, and how it goes on; an answer stands below it."""
    parts = [(escape(one["prompt"]), "<br>" if one["answer"] else "", escape(one["text"])) for one in stage["samples"]]
    return [f"<blockquote><b>{prompt}</b>{between}{text}</blockquote>" for prompt, between, text in parts]


def _plain(stage: Figures, folder: Path) -> list[str]:
    """Whatever figures there are."""
    rows = [[name, f"{value:,}" if isinstance(value, int) else str(value)] for name, value in stage.items() if _is_figure(name, value)]
    return [_table(["figure", "value"], rows)] if rows else []


SECTIONS: dict[str, Section] = {
    "corpus": _corpus,
    "texts": _texts,
    "training": _training,
    "shards": _shards,
    "tokenizer": _tokenizer,
    "budget": _budget,
    "upcycling": _upcycling,
    "rows": _rows,
    "tuning": _tuning,
    "sampling": _sampling,
    "evaluation": _evaluation,
    "export": _files,
    "samples": _samples,
}


def _is_figure(name: str, value: Any) -> bool:
    return name not in ("name", "kind", "folder", "seconds") and isinstance(value, (int, float, str))


# ---------------------------------------------------------------------------------------------------------- small pieces


def duration(seconds: float) -> str:
    """As a person says it: 48 s, 12 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def short(value: float) -> str:
    """A large number in three digits: 1234567 -> 1.23 M."""
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {letter}"
    return f"{value:.3g}"


def smoothed(points: Sequence[tuple[float, float]], most: int = 60) -> list[tuple[float, float]]:
    """Means of neighbours, `most` of them: the losses of single steps of a small batch jump about."""
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if points else []
    return [(group[-1][0], fmean(loss for _, loss in group)) for group in groups]


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _cards(cards: Sequence[tuple[str, str]]) -> str:
    return (
        '<div class="cards">'
        + "".join(f"<div><b>{escape(figure)}</b><span>{escape(what)}</span></div>" for figure, what in cards)
        + "</div>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> str:
    """Numbers to the right; with `words` the last column to the left."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table{' class=words' if words else ''}><tr>{cells}</tr>{lines}</table>"
