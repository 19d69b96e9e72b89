"""What became of a recipe: the stages of a run in one folder, as the figures of report.json.

A recipe (runs/*.sh) does its stages one after the other, each in a folder of RUN, and writes down each that is finished: RUN/stages.json
holds {name, kind, folder, seconds} in their order, and is all that a recipe has to know. What a stage's folder holds is read by its kind;
a later job (fine-tuning, preference training, evaluation) is one more line there, and one more reader here where its kind is new.

What is left out: how it looks (page.py), and stages that are not finished.

    add(run, "short", "training", seconds=612); write_report(run)
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from qwen2.data.report import notes
from qwen2.data.shards import Shards
from qwen2.data.steps import KEPT
from qwen2.train.metrics import read_lines
from qwen2.train.place import found_again
from qwen2.weights.json_object import read_json

Figures = dict[str, Any]

JOURNAL, REPORT = "stages.json", "report.json"
EXACT, BITS = "exact.json", "bits.json"  # of an evaluation
VERSION = 1
ENTRY = {"name", "kind", "folder", "seconds"}
LAST = 10  # logged steps at the end whose mean is the loss of a stage


def stages(run: Path) -> list[Figures]:
    """The finished stages, in order. ValueError where the journal is not one."""
    path = run / JOURNAL
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(one, dict) and one.keys() == ENTRY for one in found):
        raise ValueError(f"{path}: not a list of stages with {', '.join(sorted(ENTRY))}")
    return found


def add(run: Path, name: str, kind: str, seconds: float, folder: str | None = None) -> None:
    """Write down that a stage is finished, in `folder` (by default its name); one of that name is replaced, in its place.

    Raises ValueError for a kind that is unknown and for a stage without its folder.
    """
    if kind not in READERS:
        raise ValueError(f"kind {kind!r} of stage {name}: must be one of {', '.join(READERS)}")
    folder = name if folder is None else folder
    if not (run / folder).exists():
        raise ValueError(f"{run / folder}: not there; a stage is finished when its folder is")
    entry = {"name": name, "kind": kind, "folder": folder, "seconds": round(seconds, 1)}
    known = stages(run)
    places = [i for i, one in enumerate(known) if one["name"] == name]
    if places:
        known[places[0]] = entry
    else:
        known.append(entry)
    _write(run / JOURNAL, known)


def follow(run: Path, earlier: Path) -> None:
    """Begin with the finished stages of the run that this one goes on from; what is there already is kept, behind them.

    ValueError where that run has none.
    """
    before = stages(earlier)
    if not before:
        raise ValueError(f"{earlier}: no finished stages here ({JOURNAL} is missing or empty)")
    taken = [{**one, "folder": Path(os.path.relpath(earlier / one["folder"], run)).as_posix()} for one in before]
    names = {one["name"] for one in taken}
    run.mkdir(parents=True, exist_ok=True)
    _write(run / JOURNAL, taken + [one for one in stages(run) if one["name"] not in names])


def report(run: Path) -> Figures:
    """Every finished stage with its figures, by the reader of its kind, and the machine that this ran on."""
    entries = stages(run)
    if not entries:
        raise ValueError(f"{run}: no finished stages here ({JOURNAL} is missing or empty)")
    read = [{**one, **READERS[one["kind"]](run / one["folder"])} for one in entries]
    return {"version": VERSION, "machine": machine(), "seconds": round(sum(one["seconds"] for one in read), 1), "stages": read}


def write_report(run: Path) -> Figures:
    """report.json in the run's folder; returned too."""
    found = report(run)
    _write(run / REPORT, found)
    return found


def begins(found: Figures, run: Path) -> dict[str, int]:
    """For each training stage the tokens that were read before it, by the stages that it started from, one from the other."""
    ends: dict[Path, int] = {}
    starts: dict[str, int] = {}
    for stage in found["stages"]:
        folder = (run / stage["folder"]).resolve()
        start = ends.get((run / stage["from"]).resolve(), 0) if stage.get("from") else 0
        if stage["kind"] == "training":
            starts[stage["name"]] = start
            ends[folder] = ends[folder / "model"] = start + stage["tokens"]
        elif stage["kind"] == "upcycling":
            ends[folder] = start
    return starts


def summary(found: Figures) -> list[dict[str, str]]:
    """A row for each stage: what took how long, and what came of it."""
    rows, exact = [], any("exact_match" in stage for stage in found["stages"])
    for stage in found["stages"]:
        means = stage.get("bits_per_byte_mean")
        if isinstance(means, dict):
            bits = f"{means['before']:.3f} -> {means['after']:.3f}" if None not in means.values() else ""
        else:
            bits = "" if means is None else f"{means:.3f}"
        loss = f"{stage['loss']:.4f}" if "loss" in stage else ""
        tokens = f"{stage['tokens']:,}" if "tokens" in stage else ""
        rows.append({"stage": stage["name"], "seconds": f"{stage['seconds']:.0f}", "tokens": tokens, "loss": loss, "bits per byte": bits})
        if exact:
            rows[-1]["exact match"] = in_percent(stage["exact_match"]) if "exact_match" in stage else ""
    return rows


def in_percent(estimate: Mapping[str, float]) -> str:
    """A share with its interval, as in 66.7 % (60.1 to 72.8)."""
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def machine() -> Figures:
    """The processor's name and cores, and torch."""
    from importlib.metadata import version

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return {"processor": name, "cores": os.cpu_count(), "torch": version("torch")}


# --------------------------------------------------------------------------------------------------- a reader for each kind


def read_training(folder: Path) -> Figures:
    """A run of pre-training: as any run of the loop, with bits per byte by language before and after."""
    figures, evaluations = _read_run(folder)
    if evaluations:
        before, after = evaluations[0], evaluations[-1]
        figures["bits_per_byte"] = {"before": before, "after": after}
        figures["bits_per_byte_mean"] = {"before": _mean(before), "after": _mean(after)}
    return figures


def read_tuning(folder: Path) -> Figures:
    """Fine-tuning or preference training: as any run of the loop, with what was measured on held-out examples before and after."""
    figures, evaluations = _read_run(folder)
    if evaluations:
        figures["held_out"] = {"before": evaluations[0], "after": evaluations[-1]}
    return figures


def _read_run(folder: Path) -> tuple[Figures, list[Figures]]:
    """A run of the loop: tokens, loss, speed, what went wrong on the way; and its evaluations in order."""
    written, lines = read_json(folder / "config.json"), read_lines(folder / "metrics.jsonl")
    logged = [line for line in lines if line.get("loss") is not None]
    if not logged:
        raise ValueError(f"{folder / 'metrics.jsonl'}: no logged steps; the stage has not trained")
    figures: Figures = {
        "steps": logged[-1]["step"],
        "tokens": logged[-1]["tokens"],
        "loss": fmean(line["loss"] for line in logged[-LAST:]),
        "length": written["settings"].get("length"),
        "rope_theta": written["model"].get("rope_theta"),
        "tokens_per_s": median(line["tokens_per_s"] for line in logged),
        "mfu": _median_of(logged, "mfu"),
        "events": [line["text"] for line in lines if "event" in line],
        "from": found_again(written.get("from", {}), folder),
    }
    return figures, [line["eval"] for line in lines if "eval" in line]


def read_shards(folder: Path) -> Figures:
    """Token shards: documents, tokens and bytes by language, of both splits."""
    shards = Shards.open(folder, verify=False)
    languages: dict[str, Figures] = {}
    for record in shards.shards:
        row = languages.setdefault(record.language, {"train": _counts(), "held-out": _counts()})[record.split]
        for name in row:
            row[name] += getattr(record, name)
    total = {split: {name: sum(row[split][name] for row in languages.values()) for name in _counts()} for split in ("train", "held-out")}
    return {
        "tokens": total["train"]["tokens"],
        "documents": total["train"]["documents"],
        "bytes": total["train"]["bytes"],
        "held_out_tokens": total["held-out"]["tokens"],
        "languages": {code: languages[code] for code in sorted(languages)},
    }


def read_tokenizer(folder: Path) -> Figures:
    """A vocabulary: its size, what it was learned from, and bytes a token by language beside others' (compare.json)."""
    written = read_json(folder / "training.json")
    fits = folder / "compare.json"
    return {
        "vocab": written["vocab"],
        "learned_from_bytes": sum(entry["sampled"] for entry in written["languages"].values()),
        "bytes_per_token": {code: fit["bytes_per_token"] for code, fit in read_json(fits).items()} if fits.exists() else {},
    }


def read_budget(folder: Path) -> Figures:
    """What `qwen2 budget` found; how long it planned for becomes `planned_seconds`."""
    found = read_json(folder / "budget.json")
    found["planned_seconds"] = found.pop("seconds")
    found["planned"] = found.pop("stages")
    return found


def read_corpus(folder: Path) -> Figures:
    """Packages that were fetched, with version and licence, and those that could not be had."""
    found = read_json(folder / "corpus.json")
    kept = {name: {key: one[key] for key in ("version", "licence", "documents", "bytes")} for name, one in found["packages"].items()}
    return {"packages": kept, "gone": found["gone"], "bytes": sum(one["bytes"] for one in kept.values())}


def read_texts(folder: Path) -> Figures:
    """Prepared documents: what each step kept, and dropped for which reason; what was missing and compared, in words."""
    found, steps = read_json(folder / "report.json"), []
    for step in found["steps"]:
        kept = step["outcomes"].get(KEPT, {"documents": 0, "bytes": 0})
        reasons = {reason: counts["documents"] for reason, counts in step["outcomes"].items() if reason != KEPT}
        steps.append({"step": step["step"], "documents": kept["documents"], "bytes": kept["bytes"], "dropped": reasons})
    return {"steps": steps, "notes": list(notes(found))}


def read_upcycling(folder: Path) -> Figures:
    """A mixture made from a dense model: which, with which settings, and how large it is."""
    found = read_json(folder / "upcycling.json")
    return {"from": found_again(found, folder), "parameters": found["parameters"], "settings": found["settings"]}


def read_rows(folder: Path) -> Figures:
    """Files of examples or problems: how many lines each has."""
    return {"rows": {path.relative_to(folder).as_posix(): _lines(path) for path in sorted(folder.rglob("*.jsonl"))}}


def read_evaluation(folder: Path) -> Figures:
    """A model's exact match with its interval (exact.json of `qwen2 synth exact`), also by source and language, against which other one;
    and its bits per byte (bits.json of `qwen2 bits`), where these were measured."""
    exact, bits = folder / EXACT, folder / BITS
    if not exact.exists() and not bits.exists():
        raise ValueError(f"{folder}: neither {EXACT} nor {BITS}; nothing was measured there")
    figures: Figures = {}
    if exact.exists():
        found = read_json(exact)
        figures |= {name: found[name] for name in ("model", "exact_match", "by_source", "by_language", "not_judged")}
        figures["difference"] = found.get("difference")
    if bits.exists():
        found = read_json(bits)
        figures |= {
            "model": figures.get("model", found["model"]),
            "bits_per_byte": found["bits_per_byte"],
            "bits_per_byte_mean": found["mean"],
        }
    return figures


def read_sampling(folder: Path) -> Figures:
    """Rejection sampling: prompts, answers, how many were right, pass@k, and the rows that came of it."""
    found = read_json(folder / "summary.json")
    names = (
        "prompts",
        "finished",
        "solved",
        "answers",
        "right",
        "wrong",
        "cut",
        "pass_at",
        "by_source",
        "by_language",
        "sft_rows",
        "pairs",
    )
    return {name: found[name] for name in names}


def read_export(folder: Path) -> Figures:
    """Files that were written, in bytes."""
    return {"files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}}


def read_samples(folder: Path) -> Figures:
    """What a model wrote: for each NAME.prompt a NAME.text beside it, how the prompt goes on, or a NAME.answer to it."""
    pairs = [(path, path.with_suffix(suffix)) for path in sorted(folder.glob("*.prompt")) for suffix in (".text", ".answer")]
    return {
        "samples": [
            {
                "name": prompt.stem,
                "prompt": prompt.read_text(encoding="utf-8").rstrip("\n"),
                "text": text.read_text(encoding="utf-8").rstrip("\n"),
                "answer": text.suffix == ".answer",
            }
            for prompt, text in pairs
            if text.exists()
        ]
    }


READERS: dict[str, Callable[[Path], Figures]] = {
    "corpus": read_corpus,
    "texts": read_texts,
    "tokenizer": read_tokenizer,
    "shards": read_shards,
    "budget": read_budget,
    "upcycling": read_upcycling,
    "training": read_training,
    "rows": read_rows,
    "tuning": read_tuning,
    "sampling": read_sampling,
    "evaluation": read_evaluation,
    "export": read_export,
    "samples": read_samples,
}


def _counts() -> dict[str, int]:
    return {"documents": 0, "tokens": 0, "bytes": 0}


def _mean(values: Mapping[str, float | None]) -> float | None:
    known = [value for value in values.values() if value is not None]
    return fmean(known) if known else None


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _median_of(lines: list[Figures], name: str) -> float | None:
    known = [line[name] for line in lines if line.get(name) is not None]
    return median(known) if known else None


def _write(path: Path, values: object) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    draft.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)
