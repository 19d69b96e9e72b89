"""Samples to medians, medians to a Markdown table and a picture.

A sample is (column, variant, measure, value): llama.cpp runs in two variants, and its column shows the better median of the two.
Left out: measuring.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Samples = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]  # column -> variant -> measure -> one value per round
SMALLER = ("load", "peak")  # measures that are better when small; the others are speeds
SHOWN = {"load": "load to first token, s", "peak": "peak memory, MiB"}


def label(measure: str) -> str:
    """What a measure is called in the table: "prefill 512", "decode 0", "streams 16", "load", "peak"."""
    kind, _, number = measure.partition(" ")
    if kind in SHOWN:
        return SHOWN[kind]
    if kind == "streams":
        return f"decode of {number} streams together, tok/s"
    if kind == "decode":
        return f"decode at depth {int(number):,}, tok/s"
    return f"prefill {int(number):,}, tok/s"


def medians(samples: Samples) -> dict[str, dict[str, float]]:
    """Column -> measure -> the median of the rounds, of the column's best variant."""
    out: dict[str, dict[str, float]] = {}
    for column, variants in samples.items():
        out[column] = {}
        for measure in dict.fromkeys(name for measures in variants.values() for name in measures):
            best = min if measure.split()[0] in SMALLER else max
            out[column][measure] = best(statistics.median(m[measure]) for m in variants.values() if m.get(measure))
    return out


def ratio(measure: str, ours: float, theirs: float) -> float:
    """How many times better ours is."""
    return theirs / ours if measure.split()[0] in SMALLER else ours / theirs


def table(middle: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A row per measure, a column per engine; with "ours", how it stands beside llama.cpp and beside the best of the others."""
    columns = list(middle)
    measures = list(dict.fromkeys(name for values in middle.values() for name in values))
    compared = "ours" in middle and len(columns) > 1
    heads = [*columns, *(["ours / llama.cpp", "ours / best other"] if compared else [])]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for measure in measures:
        cells = [shown(measure, middle[column].get(measure)) for column in columns]
        if compared:
            own = middle["ours"].get(measure)
            others = {column: middle[column][measure] for column in columns if column != "ours" and measure in middle[column]}
            ratios = {column: ratio(measure, own, value) for column, value in others.items()} if own is not None else {}
            cells.append(f"{ratios['llama.cpp']:.2f}" if "llama.cpp" in ratios else "")
            cells.append(f"{min(ratios.values()):.2f}" if ratios else "")
        lines.append(f"| {label(measure)} | " + " | ".join(cells) + " |")
    return lines


def shown(measure: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 2**20:,.0f}" if measure == "peak" else f"{value:.2f}" if measure == "load" else f"{value:.1f}"


def bandwidth(middle: Mapping[str, Mapping[str, float]], model: Mapping[str, Any], ceiling: float) -> list[str]:
    """What decoding reads per second, of the engines that read this very file, beside what the machine can read."""
    lines = []
    for column in ("ours", "llama.cpp"):
        for measure, speed in middle.get(column, {}).items():
            kind, _, depth = measure.partition(" ")
            if kind == "decode" and model["weight_bytes"]:
                rate = speed * (model["weight_bytes"] + int(depth) * model["cache_bytes"])
                lines.append(f"- {column}, depth {int(depth):,}: {rate / 1e9:.1f} GB/s of weights and cache, {rate / ceiling:.0%}")
    return lines


def document(run: Mapping[str, Any]) -> str:
    """The whole report in Markdown: `run` is what the raw JSON holds."""
    cpu, middle = run["machine"], medians(run["samples"])
    forced = f", held to {run['isa']}" if run["isa"] else ""
    lines = [
        f"# {run['model']['name']} beside its peers, {cpu['kind']} machine{forced}",
        "",
        f"{cpu['name']}, {cpu['cores']} cores ({', '.join(cpu['flags'])}); {run['threads']} threads; other load {cpu['load']:.2f} cores; "
        f"read ceiling {run['read_ceiling'] / 1e9:.1f} GB/s; {run['date']}.",
        f"Medians of {run['rounds']} rounds, alternating, a fresh random prompt each; idle engines used at most "
        f"{run['idle_share']:.1%} of a core. Command: `{run['command']}`",
        "",
        *table(middle),
        "",
        *bandwidth(middle, run["model"], run["read_ceiling"]),
        "",
        *(
            f"- {name}: {', '.join(f'{k} {v}' for k, v in about['versions'].items())}; {about['notes']}"
            for name, about in run["about"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def picture(run: Mapping[str, Any], path: Path) -> None:
    """A panel per speed, a bar per engine, into a PNG file. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    middle = medians(run["samples"])
    measures = [m for m in dict.fromkeys(name for values in middle.values() for name in values) if m.split()[0] not in SMALLER]
    figure, axes = pyplot.subplots(1, len(measures), figsize=(3.2 * len(measures), 0.45 * len(middle) + 1.2), sharey=True, squeeze=False)
    names = list(middle)
    for axis, measure in zip(axes[0], measures, strict=True):
        values = [middle[name].get(measure, 0.0) for name in names]
        bars = axis.barh(names, values, color=["#6d4aff" if name == "ours" else "#b8bcc6" for name in names])
        axis.bar_label(bars, [f"{value:.0f}" if value else "" for value in values], padding=3, fontsize=9)
        axis.set_title(label(measure), fontsize=9)
        axis.set_xlim(0, 1.2 * max(values))
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0][0].invert_yaxis()  # shared: once for all panels
    kind = run["machine"]["kind"] if not run["isa"] else f"{run['machine']['kind']}, held to {run['isa']}"
    figure.suptitle(f"{run['model']['name']}, {run['threads']} threads, {run['machine']['name']} ({kind})", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
