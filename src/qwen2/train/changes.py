"""What a run that is resumed may change of its settings, and what is said of it. Knows no torch.

Some change no number (`FREE`), or only what happens when something goes wrong. Some change numbers from then on (`SAID`): each gets a
line, which also goes into the run's metrics. The end may be moved where that leaves the steps that are done as they were: with a
constant rate, and with wsd until the rate begins to fall. Anything else has to be as the run was started.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FREE = frozenset(
    {
        *("log_every", "eval_every", "save_every", "keep", "tensorboard", "measure", "export_dtype"),
        *("eval_rows", "eval_pairs", "samples", "sample_tokens", "eval_bytes", "eval_tokens"),
        *("on_nonfinite", "most_skips", "spike", "on_spike", "most_rollbacks"),
    }
)
ROUNDED = "numbers are rounded otherwise from here on, so bits differ from those of an unchanged run"
SAID = {
    "lr": "numbers differ from those of an unchanged run from here on",
    "micro_batch": ROUNDED,
    "recompute": ROUNDED,
}
LATER = {"least_document": 0, "text_epochs": 1}  # settings that the first versions did not have, and what they did
RECORDED_LATER = frozenset({"weights"})  # what the first versions of sft did not write down
MISSING = "not there"
FROM = "--from, with the run's folder or one of its checkpoints"  # how another run begins with its model, in words of pre-training
AS_MODEL = "name its folder as the model, and another one with --out"  # and where a command takes a model
TOKEN_BYTES = 3  # about what a token stands for


def renamed(written: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings of a run under today's names, and what has to be said of those that an earlier version called otherwise."""
    found = dict(written)
    if "eval_tokens" not in found:
        return found, []
    tokens = found.pop("eval_tokens")
    found["eval_bytes"] = TOKEN_BYTES * tokens
    text = f"held-out text is cut by bytes: eval_bytes {found['eval_bytes']:,} in place of eval_tokens {tokens:,}, so not quite as before"
    return found, [text]


def with_end(written: Mapping[str, Any], steps: int | None, done: int, anew: str = FROM) -> dict[str, Any]:
    """The settings of a run that ends after `steps` instead, `done` of them being done; `anew`: how another begins with its model.

    Its warm-up stays as many steps where it is over; the fall at the end of wsd is at most what is left. ValueError where the steps
    that are done would have had other rates.
    """
    found = dict(written)
    if steps is None or steps == written.get("steps"):
        return found
    old, what = written["steps"], f"steps is {written['steps']} in the run, {steps} here"
    instead = f"start another run from it: {anew}"
    if steps < done:
        raise ValueError(f"{what}: {done} are done already")
    if written["schedule"] == "cosine":
        raise ValueError(f"{what}: under cosine the {done} steps that are done would have had other rates; {instead}")
    if written["schedule"] == "wsd" and done > old - falling(written):
        raise ValueError(f"{what}: the rate began to fall after step {old - falling(written)}, {done} are done; {instead}")
    warmup = rising(written)
    found["steps"] = steps
    if warmup <= done:
        found["warmup"] = warmup / steps
    found["decay"] = min(written["decay"], max(steps - done, 1) / steps)
    return found


def in_words(value: Any) -> Any:
    """A setting's value; None is one that nobody gave."""
    return "left out" if value is None else value


def rising(settings: Mapping[str, Any]) -> int:
    """The steps in which the rate rises."""
    return round(settings["warmup"] * settings["steps"])


def falling(settings: Mapping[str, Any]) -> int:
    """The steps in which it falls at the end, under wsd."""
    return max(1, round(settings["decay"] * settings["steps"]))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What a run was started with and what it is now asked for, where that is not allowed: a line each, in words."""
    if theirs.get("precision") == "auto":  # the first versions chose anew in each sitting, and wrote down nothing else
        theirs = {**theirs, "precision": ours.get("precision")}
    theirs = {**{name: value for name, value in LATER.items() if name in ours}, **theirs}
    unknown = RECORDED_LATER - theirs.keys()
    names = [name for name in {**theirs, **ours} if name not in FREE and name not in SAID and name not in unknown]
    return [
        f"{name} is {theirs.get(name, MISSING)!r} in the run, {ours.get(name, MISSING)!r} here"
        for name in names
        if theirs.get(name, MISSING) != ours.get(name, MISSING)
    ]


def changed(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What has to be said of settings that differ and may: a line each."""
    lines = [
        f"{name} was {in_words(theirs.get(name))} and is {in_words(ours[name])}: {text}"
        for name, text in SAID.items()
        if name in ours and ours[name] != theirs.get(name)
    ]
    if ours.get("steps") != theirs.get("steps"):
        falls = f" and falls in the last {falling(ours):,}" if ours["schedule"] == "wsd" else ""
        before = "" if rising(ours) == rising(theirs) else f" instead of {rising(theirs):,}"
        lines.append(
            f"the run was to end after {theirs['steps']:,} steps and ends after {ours['steps']:,}: "
            f"the rate rises in the first {rising(ours):,}{before}{falls}"
        )
    return lines
