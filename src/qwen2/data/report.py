"""What each step of a preparation kept, by language and source, with samples of what went: JSON, a picture, and lines.

Left out: judging it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen2.data.languages import LANGUAGES
from qwen2.data.prepare import COMPARED, TEXT
from qwen2.data.recipe import STEPS
from qwen2.data.shards import MANIFEST, write_json
from qwen2.data.steps import KEPT, SAMPLES, UNKNOWN

ORDER = ("read", *STEPS)
BARS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")


def gather(out: Path) -> dict[str, Any]:
    """All counts of a folder: per step kept and dropped documents and bytes, by reason, language and source; samples; missing packages.

    The contamination step has the evaluation sets, and the held-out texts, that the text was compared with, with the items of each,
    and how many of them are too short to be compared.
    FileNotFoundError where nothing was prepared there.
    """
    if not (out / "counts").is_dir():
        raise FileNotFoundError(f"{out}: nothing was prepared here; qwen2 data prepare RECIPE {out}")
    steps = []
    for name in ORDER:
        parts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "counts" / name).glob("*.json"))]
        if parts:
            compared = {"compared_with": _read(out / COMPARED)} if name == "contamination" else {}
            steps.append({"step": name, **_added(parts), **compared})
    manifest = _read(out / TEXT / MANIFEST) or {}
    missing = manifest.get("missing", [])
    packages = sum(bool(source["package"]) for source in manifest["recipe"]["sources"]) if missing else 0
    return {"steps": steps, "quality": _read(out / "quality.json"), "packages": packages, "missing": missing}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _added(parts: list[dict[str, Any]]) -> dict[str, Any]:
    outcomes: dict[str, Counter[str]] = {}
    groups: dict[tuple[str, str], Counter[str]] = {}
    samples: dict[str, list[tuple[str, str, str]]] = {}
    for part in parts:
        for language, source, outcome, documents, size in part["rows"]:
            outcomes.setdefault(outcome, Counter()).update(documents=documents, bytes=size)
            kind = "kept" if outcome == KEPT else "dropped"
            groups.setdefault((language, source), Counter()).update({f"{kind}_documents": documents, f"{kind}_bytes": size})
        for outcome, found in part["samples"].items():
            samples.setdefault(outcome, []).extend(map(tuple, found))
    broken = {path: why for part in parts for path, why in part["files"].items()}
    return {
        "outcomes": {outcome: dict(counts) for outcome, counts in sorted(outcomes.items())},
        "by_language_and_source": [
            {"language": language, "source": source, **dict(counts)} for (language, source), counts in sorted(groups.items())
        ],
        "samples": {
            outcome: [{"id": id, "text": text} for _, id, text in sorted(found)[:SAMPLES]] for outcome, found in sorted(samples.items())
        },
        **({"broken_files": dict(sorted(broken.items()))} if broken else {}),
    }


def write_report(out: Path) -> Path:
    """report.json and report.png in the folder; returns the picture's path."""
    report = gather(out)
    write_json(out / "report.json", report)
    draw(report, out / "report.png")
    return out / "report.png"


def left(report: dict[str, Any], key: str, unit: str = "kept_bytes") -> list[Counter[str]]:
    """For each step, what it left, by language or source."""
    found = []
    for step in report["steps"]:
        counted: Counter[str] = Counter()
        for row in step["by_language_and_source"]:
            counted[row[key]] += row.get(unit, 0)
        found.append(counted)
    return found


def left_by_language(report: dict[str, Any]) -> list[Counter[str]]:
    """For each step, the bytes it left of our languages, and of all others, declared or not known, together as "?"."""
    found = []
    for counted in left(report, "language"):
        ours = Counter({code: counted[code] for code in LANGUAGES if counted[code]})
        ours[UNKNOWN] = counted.total() - ours.total()
        found.append(ours)
    return found


def notes(report: dict[str, Any]) -> Iterator[str]:
    """What no count of documents shows: missing packages, what text was compared with, files that could not be read to their end."""
    missing = report.get("missing", [])
    if missing:
        names = ", ".join(one["package"] for one in missing)
        sets = [one["package"] for one in missing if one["role"] == "evaluation"]
        said = f"; evaluation sets that no text is compared with: {', '.join(sets)}" if sets else ""
        yield f"{len(missing)} of {report['packages']} packages were gone when the corpus was fetched: {names}{said}"
    for step in report["steps"]:
        if step.get("compared_with") is not None:
            sets = [f"{name} ({_items(counts)})" for name, counts in step["compared_with"].items()]
            yield f"{step['step']}: compared with {', '.join(sets) or 'nothing: no evaluation set and no held-out text was there'}"
        for path, why in step.get("broken_files", {}).items():
            yield f"{path}: not read to its end: {why}"


def _items(counts: dict[str, int] | int) -> str:
    """A folder of an older version has the number of items alone."""
    if isinstance(counts, int):
        return f"{counts:,} items"
    short = counts["too_short"]
    return f"{counts['items']:,} items" + (f", {short:,} too short to be compared" if short else "")


def show(out: Path) -> Iterator[str]:
    """The report in lines."""
    report = gather(out)
    for step in report["steps"]:
        kept = step["outcomes"].get(KEPT, {"documents": 0, "bytes": 0})
        dropped = {o: c["documents"] for o, c in step["outcomes"].items() if o != KEPT}
        why = "; ".join(f"{reason} {count:,}" for reason, count in sorted(dropped.items(), key=lambda entry: -entry[1]))
        yield f"{step['step']:14} kept {kept['documents']:>9,} documents, {kept['bytes'] / 1e6:>8.1f} MB   dropped: {why or 'none'}"
    yield from notes(report)
    stages = left_by_language(report)
    first, last = stages[0], stages[-1]
    codes = [code for code in (*LANGUAGES, UNKNOWN) if first[code]]
    yield "  ".join(f"{code} {last[code] / 1e6:.2f}/{first[code] / 1e6:.2f}" for code in codes) + "  MB kept/read"


def draw(report: dict[str, Any], path: Path) -> None:
    """Megabytes by language that were read and that are left, and what each step dropped by source."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(11, 8), layout="constrained")
    stages = left_by_language(report)
    codes = [code for code in (*LANGUAGES, UNKNOWN) if any(stage[code] for stage in stages)]
    above.bar(codes, [stages[0][code] / 1e6 for code in codes], color="#d0d0d0", label="read")
    above.bar(codes, [stages[-1][code] / 1e6 for code in codes], color=BARS[0], label="left")
    above.set_ylabel("MB of text")
    above.legend()
    _draw_losses(below, report)
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=110, format="png")
    pyplot.close(figure)
    partial.replace(path)


def _draw_losses(axes: Any, report: dict[str, Any]) -> None:
    names = sorted({row["source"] for step in report["steps"] for row in step["by_language_and_source"]})
    bottom = [0.0] * len(names)
    for step, colour in zip(report["steps"][1:], BARS, strict=False):
        lost: Counter[str] = Counter()
        for row in step["by_language_and_source"]:
            lost[row["source"]] += row.get("dropped_documents", 0)
        axes.bar(names, [lost[name] for name in names], bottom=bottom, color=colour, label=step["step"])
        bottom = [height + lost[name] for height, name in zip(bottom, names, strict=True)]
    axes.set_ylabel("documents dropped")
    axes.tick_params(axis="x", rotation=90)
    axes.legend()
