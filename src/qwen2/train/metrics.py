"""What a run says of itself: JSON lines, TensorBoard events, the picture at its end.

`metrics.jsonl` has one object a line: logged steps {step, tokens, loss, lr, grad_norm, tokens_per_s, mfu, ...}, evaluations
{step, eval: {name: value}}, standard errors among them (standard_error.py), and events {step, event, text}: batches left out, spikes,
going back, settings that were changed. When a run is resumed or goes back, lines behind the checkpoint's step are taken away, since
those steps come again.

    for line in read_lines(Path("RUN/metrics.jsonl")): print(line.get("loss"))
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TextIO

from qwen2.train.charts import COLOURS, GRID
from qwen2.train.standard_error import is_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXTRA = "needs packages that are not installed; get them with: pip install 'qwen2[train]'"


def read_lines(path: Path, say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """All whole lines of a metrics file, in order; a last one that a killed process left half written is left out, and said."""
    lines: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            if number < len(text.splitlines()):
                raise ValueError(f"{path}:{number}: not a line of JSON") from None
            if say is not None:
                say(f"{path}: its last line was half written when the run was killed; left out")
    return lines


class Metrics:
    """Writes a run's lines, and the same numbers for TensorBoard. `resumed_at` takes away what lies behind that step."""

    def __init__(self, folder: Path, resumed_at: int, tensorboard: bool, say: Callable[[str], None]) -> None:
        self.path, self.tensorboard = folder / "metrics.jsonl", tensorboard
        self._begin([line for line in read_lines(self.path, say) if line.get("step", 0) <= resumed_at], resumed_at)

    def _begin(self, kept: list[dict[str, Any]], at: int) -> None:
        draft = self.path.with_name(f".{self.path.name}.part")
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(draft, self.path)
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        self._failed = False
        self._events = _writer(self.path.parent / "tensorboard", at) if self.tensorboard else None

    def back_to(self, step: int) -> None:
        """The run went back to that step: what is behind it goes, but for the events, which do not come again."""
        self.close()
        self._begin([line for line in read_lines(self.path) if line.get("step", 0) <= step or "event" in line], step)

    def write(self, line: Mapping[str, Any]) -> None:
        """One line, at once. Numbers that are not finite are written as null, which JSON has no other word for. OSError on a full disk."""
        clean = {name: _plain(value) for name, value in line.items()}
        try:
            self._write(clean)
        except OSError as error:
            self._failed = True
            raise self._told(error) from None

    def _told(self, error: OSError) -> OSError:
        said = f"its metrics could not be written ({error.strerror}); make room and go on with --resume"
        return OSError(error.errno, said, str(self.path.parent))

    def _write(self, clean: dict[str, Any]) -> None:
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._events is None:
            return
        for name, value in clean.items():
            if name == "eval" and isinstance(value, dict):
                for language, bits in value.items():
                    self._events.add_scalar(f"eval/{language}", bits, clean["step"])
            elif name == "event":
                self._events.add_text("events", str(clean.get("text")), clean["step"])
            elif isinstance(value, (int, float)) and name != "step":
                self._events.add_scalar(name, value, clean["step"])

    def close(self) -> None:
        """Write out what TensorBoard still holds back."""
        try:
            if self._events is not None:
                self._events.close()
            self._file.close()
        except OSError as error:
            if not self._failed:  # else it has been said
                raise self._told(error) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_there(tensorboard: bool) -> None:
    """ValueError where what a run's events are written with is not installed."""
    if tensorboard and find_spec("tensorboard") is None:
        raise ValueError(f"tensorboard {EXTRA}, or say --no-tensorboard")


def _writer(folder: Path, resumed_at: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(f"tensorboard {EXTRA}, or say --no-tensorboard") from None
    return SummaryWriter(str(folder), purge_step=resumed_at + 1 if resumed_at > 0 else None)


CURVES = "curves.png"
UNDRAWN = f"the picture of the curves {EXTRA}; the run goes on without it, all its numbers are in metrics.jsonl"


def can_draw() -> bool:
    """Whether the package that draws is here."""
    return find_spec("matplotlib") is not None


def where_curves_are(folder: Path) -> str:
    """The end of a line about a finished run: where its curves are, where it has any."""
    return f"; curves in {folder / CURVES}" if (folder / CURVES).exists() else ""


PANELS = {
    "loss": "loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
    "mfu": "share of the products' rate",
}
EACH = 8  # evaluations that are drawn a line each; of more their mean is, and the ends
ENDS = 3  # lowest and highest that are named then


def draw(folder: Path, evaluated: str = "bits per byte") -> Path:
    """The curves of a run as `curves.png`. Needs matplotlib (`can_draw`)."""
    path, draft = folder / CURVES, folder / ".curves.part.png"
    curves(read_lines(folder / "metrics.jsonl"), evaluated).savefig(draft, dpi=100)
    os.replace(draft, path)
    return path


def curves(lines: list[dict[str, Any]], evaluated: str) -> Figure:
    """A panel for each of loss, rate, norm, speed, share of the products' rate and evaluations, by step; events are red uprights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=False):
        drawn = [(line["step"], line[name]) for line in lines if "loss" in line and line.get(name) is not None]
        axis.plot([step for step, _ in drawn], [value for _, value in drawn], color=COLOURS[0], linewidth=1)
        axis.set(title=title if drawn else f"{title}: not measured", xlabel="step")
    if axes.flat[2].has_data():
        axes.flat[2].set_yscale("log")  # else one spike hides the rest
    for line in lines:
        if "event" in line:
            axes.flat[0].axvline(line["step"], color="tab:red", linewidth=0.5)
    _draw_evaluations(axes.flat[5], [line for line in lines if "eval" in line])
    axes.flat[5].set(title=evaluated if evaluated else "evaluation", xlabel="step")
    return figure


def _draw_evaluations(axis: Any, evaluations: list[dict[str, Any]]) -> None:
    """A line for each thing that is evaluated; of more than `EACH` their mean, what all lie between, and the ends by name."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in evaluations:
        for name, value in line["eval"].items():
            if value is not None and not is_error(name):
                series.setdefault(name, []).append((line["step"], value))
    if not series:
        return
    named = sorted(series, key=lambda name: -series[name][-1][1])  # the legend as the lines lie at the end
    if len(named) > EACH:
        steps: dict[int, list[float]] = {}
        for step, value in (point for points in series.values() for point in points):
            steps.setdefault(step, []).append(value)
        axis.fill_between(
            list(steps), list(map(min, steps.values())), list(map(max, steps.values())), color=GRID, label=f"all {len(named)}"
        )
        series[mean := f"mean of {len(named)}"] = [(step, fmean(values)) for step, values in steps.items()]
        named = [*named[:ENDS], mean, *named[-ENDS:]]
    for name, colour in zip(named, COLOURS, strict=False):
        wide = 2.4 if name.startswith("mean of ") else 1.2
        axis.plot(
            *zip(*series[name], strict=True), color=colour, marker=".", linewidth=wide, label=f"{name}: {series[name][-1][1]:.3f}", gid=name
        )
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
