"""The training loop: one for pre-training, fine-tuning, preference training and RL, which differ in the `Task` they hand in.

A step: gradients of a sum over targets divided by their count over the whole step (all micro-batches and ranks), clipped, then AdamW
at the schedule's rate, then the average. Everything between is bookkeeping, in files of its own: what a number that is not finite
is traced to (faults.py), checkpoints (checkpoint.py), lines and pictures (metrics.py), progress. Where ranks matter the `World` is
asked (world.py).

What is left out: a critic, a replay buffer, or anything else that is a job's and not a step's.

    loop = Loop(network, task, Settings(steps=200), RunFolder(Path("run")), World())
    loop.run(resume=False)                                          # -> State; the network holds the last step's weights
    loop.draw()                                                     # once the job has exported them
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NoReturn

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from qwen2.train import checkpoint
from qwen2.train.faults import Spike, Spikes, TrainingError, trace
from qwen2.train.memory import Slack, keep_freed
from qwen2.train.metrics import UNDRAWN, Metrics, can_draw, draw
from qwen2.train.optim import Average, clip, make_adamw, rate_share, set_rate
from qwen2.train.precision import chosen, computing, in_words, product_rate
from qwen2.train.progress import Progress
from qwen2.train.standard_error import said
from qwen2.train.task import B

if TYPE_CHECKING:
    from qwen2.model import Qwen2
    from qwen2.train.folder import RunFolder
    from qwen2.train.settings import Settings
    from qwen2.train.task import Task
    from qwen2.train.world import World


@dataclass
class State:
    """How far a run is, and what happened on the way."""

    step: int = 0  # steps done
    tokens: int = 0  # read, over all ranks
    skipped: int = 0  # batches left out because a number was not finite
    skipped_in_a_row: int = 0
    spikes: int = 0
    rollbacks: int = 0


@dataclass
class Step:
    """What came of one step's forward and backward passes, over all ranks."""

    loss: float
    norm: float
    tokens: int
    sums: dict[str, float] = field(default_factory=dict)


class Loop(Generic[B]):
    """A run: its network, optimizer and average, and where it stands."""

    def __init__(self, network: Qwen2, task: Task[B], settings: Settings, folder: RunFolder, world: World) -> None:
        self.network, self.task, self.settings, self.folder, self.world = network, task, settings, folder, world
        self.dtype = chosen(settings.precision, world.device)
        world.prepare(network, self.dtype)
        train_all_or_chosen(network.train())
        if world.device.type == "cpu":
            keep_freed()
        if settings.recompute == "layers":
            recompute_layers(network, world.device.type == "cpu")
        self.optimizer = make_adamw(network, settings.beta1, settings.beta2, settings.eps, settings.weight_decay)
        decay = settings.ema_decay if settings.average == "ema" else None
        self.average = None if settings.average == "none" else Average(network, decay)
        self.state, self.spikes = State(), (Spikes(settings.spike), Spikes(settings.spike))  # of steps without and with `apart`
        self.rate = product_rate(self.dtype, world.device) * world.size if settings.measure else 0.0  # FLOP/s of all devices

    def run(self, resume: bool = False, changed: Sequence[str] = ()) -> State:
        """Train to the last step; `changed` is what has to be said of settings that were others before.

        ValueError (TrainingError among them) or OSError in one line where that is not possible.
        """
        if resume:
            self.restore(fresh=True)
        settings, state, say = self.settings, self.state, partial(print, file=sys.stderr, flush=True)
        if self.world.main:
            say(in_words(self.dtype, self.world.device))
            if not can_draw():
                say(UNDRAWN)
        kept = state.step if state.step else -1  # a run that starts anew keeps no line of an earlier start
        self.metrics = Metrics(self.folder.path, kept, settings.tensorboard, say) if self.world.main else None
        with self._closing(), Progress(settings.steps, state.step, self.world.main) as self.progress:
            for text in changed:
                self._event("changed", text)
            if state.step == 0:
                self.evaluate()
            since, tokens = time.perf_counter(), state.tokens
            while state.step < settings.steps:
                step = self.step()
                if step is None:  # the run went back
                    continue
                self.progress.step(state.step, step.loss)
                last = state.step == settings.steps
                if last or state.step % settings.log_every == 0:
                    self._log(step, (state.tokens - tokens) / (time.perf_counter() - since))
                    since, tokens = time.perf_counter(), state.tokens
                if last or (settings.eval_every and state.step % settings.eval_every == 0):
                    paused = time.perf_counter()
                    self.evaluate()
                    since += time.perf_counter() - paused
                if last or (settings.save_every and state.step % settings.save_every == 0):
                    paused = time.perf_counter()
                    self.save()
                    since += time.perf_counter() - paused
        return state

    def draw(self) -> None:
        """The curves of the run, where they can be drawn: the last of all, behind what the job exports."""
        if self.world.main and can_draw():
            draw(self.folder.path, self.task.evaluated)

    def step(self) -> Step | None:
        """One optimizer step, unless its numbers forbid it: then the weights stay as they are, or go back to a checkpoint's (None)."""
        batches = self.task.next_step()
        step = self.gradients(batches)
        self.state.tokens += step.tokens
        bad = self.world.any(not (abs(step.loss) < float("inf") and step.norm < float("inf")))
        spike = None if bad else self.spikes[self.apart(batches)].look(step.loss)
        if bad:
            self._leave_out(batches)
        elif spike is not None and self._goes_back(spike):
            return None
        else:
            self._apply(step)
        self.state.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        return step

    def apart(self, batches: Sequence[B]) -> bool:
        """Whether a step's loss is compared with those of its own kind alone, on all ranks alike."""
        told = self.task.apart
        return told is not None and self.world.any(any(map(told, batches)))

    def gradients(self, batches: Sequence[B]) -> Step:
        """The gradients of a step: of each micro-batch's sum over the count of all targets of the step."""
        task, world = self.task, self.world
        tokens = sum(map(task.tokens, batches))  # before a rank's part is filled up to an even one
        batches = [task.local(batch) for batch in batches]
        counts = world.sum([float(sum(map(task.targets, batches))), float(tokens)])
        count = max(counts[0], 1.0)
        self.losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, start=1):
            with world.accumulate(self.network, last=number == len(batches)):
                with computing(self.dtype, world.device):
                    total, more = task.loss(self.network, batch)
                (total / count).backward()
            self.losses.append(total.detach())
            for name, value in more.items():
                sums[name] = sums[name] + value if name in sums else value
        norm = world.grad_norm(self.network.parameters())
        self.norm = norm
        values = world.sum([float(sum(self.losses)), *(float(value) for value in sums.values())])
        shares = {name: value / count for name, value in zip(sums, values[1:], strict=True)}
        return Step(values[0] / count, float(norm), round(counts[1] * world.data_size / world.size), shares)

    def _apply(self, step: Step) -> None:
        settings, state = self.settings, self.state
        if settings.clip:
            clip(list(self.network.parameters()), self.norm, settings.clip)
        set_rate(self.optimizer, self.learning_rate(state.step))
        self.optimizer.step()
        state.skipped_in_a_row = 0
        if self.average is not None and (settings.average == "ema" or state.step >= settings.steps - settings.tail_steps):
            self.average.update(self.network)

    def learning_rate(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        s = self.settings
        return s.lr * rate_share(s.schedule, step, s.steps, s.warmup_steps, s.decay_steps, s.final_lr)

    def _leave_out(self, batches: Sequence[B]) -> None:
        """A loss or a gradient is not finite: say where, then stop, or go on without this step's batches."""
        state, settings, world = self.state, self.settings, self.world

        def forward(number: int) -> None:
            with computing(self.dtype, world.device):
                self.task.loss(self.network, self.task.local(batches[number]))

        with world.evaluating(self.network):
            text = f"step {state.step + 1}: {trace(self.network, self.losses, forward, world)}"
        state.skipped += 1
        state.skipped_in_a_row += 1
        last = state.skipped_in_a_row > settings.most_skips
        if settings.on_nonfinite == "stop" or last:
            more = (
                f"; {settings.most_skips} batches were left out before it"
                if last
                else ", or with --on-nonfinite skip, which leaves such batches out"
            )
            self._stop(text, f"go on with --resume and a lower --lr{more}")
        self._event("left out", f"{text}; its batches are left out, {state.skipped} so far")

    def _goes_back(self, spike: Spike) -> bool:
        """A spike: written down, and where that is wanted the run goes back to its last checkpoint, on with the batches behind."""
        state, settings = self.state, self.settings
        state.spikes += 1
        text = f"step {state.step + 1}: {spike.text}"
        if settings.on_spike == "log" or spike.lasting or not checkpoint.numbered(self.folder.checkpoints):
            self._event("spike", text)
            return False
        if state.rollbacks >= settings.most_rollbacks:
            self._stop(text, f"the run went back {state.rollbacks} times already: go on with --resume and a lower --lr")
        happened, kept = state.step, (self.task.state(), state.tokens, state.skipped, state.spikes, state.rollbacks + 1)
        self.optimizer.zero_grad(set_to_none=True)
        self.restore(fresh=False)
        position, state.tokens, state.skipped, state.spikes, state.rollbacks = kept
        self.task.resume(position)
        if self.metrics is not None:
            self.metrics.back_to(state.step)
        self._event("went back", f"{text}; back to step {state.step}, and on with the batches that come now", happened)
        return True

    def _stop(self, text: str, more: str) -> NoReturn:
        """End the run, on all ranks; what happened is written down before any of them ends, which would end the others."""
        self._event("stopped", text)
        self.world.barrier()
        raise TrainingError(f"{text}; {more}")

    def _event(self, event: str, text: str, step: int | None = None) -> None:
        if self.metrics is not None:
            self.metrics.write({"step": self.state.step if step is None else step, "event": event, "text": text})
        self.progress.say(text)

    def _log(self, step: Step, tokens_per_s: float) -> None:
        state = self.state
        wanted = tokens_per_s * self.task.flops
        if wanted > self.rate > 0:  # something else ran when it was measured
            self.rate = max(self.rate, product_rate(self.dtype, self.world.device) * self.world.size)
        used = wanted / self.rate if self.rate and wanted else None
        line: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "loss": step.loss, **step.sums}
        line |= {"lr": self.learning_rate(state.step - 1), "grad_norm": step.norm, "tokens_per_s": tokens_per_s, "mfu": used}
        if state.skipped:
            line["skipped"] = state.skipped
        if self.metrics is not None:
            self.metrics.write(line)
        self.progress.logged(line)

    def evaluate(self) -> Mapping[str, float]:
        """What the weights are worth, the averaged ones where there are some; written down by name."""
        if self.task.evaluate is None:
            return {}
        self.network.eval()
        with torch.no_grad(), self.averaged(), self.world.evaluating(self.network), computing(self.dtype, self.world.device):
            values = self.task.evaluate(self.network)
        self.network.train()
        if values:
            if self.metrics is not None:
                self.metrics.write({"step": self.state.step, "eval": dict(values)})
            mean = sum(values.values()) / len(values)
            self.progress.say(
                f"step {self.state.step:,}: {mean:.4f} {self.task.evaluated}, the mean of {len(values)}"
                if len(values) > 1 and self.task.evaluated
                else f"step {self.state.step:,}: " + ", ".join(said(values))
            )
        return values

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network holds the averaged weights meanwhile, where there are any; nothing is copied."""
        if self.average is None or not self.average.count:
            yield
            return
        self.average.swap(self.network)
        try:
            yield
        finally:
            self.average.swap(self.network)

    def save(self) -> None:
        """Write a checkpoint of the step that is done."""
        state = {
            "state": vars(self.state).copy(),
            "task": self.task.state(),
            "spikes": [[list(spikes.recent), list(spikes.high)] for spikes in self.spikes],
            "averaged": 0 if self.average is None else self.average.count,
            "model": self.network.config.to_hf(),
        }
        tensors = checkpoint.tensors_of(self.network, self.optimizer, self.average)
        checkpoint.save(self.folder.checkpoints, self.state.step, state, tensors, self.world, self.settings.keep)

    def restore(self, fresh: bool) -> None:
        """Put everything where the newest whole checkpoint has it; `fresh` says so, and takes a run without any from its start.

        ValueError naming the field where the checkpoint is of another model.
        """
        say = partial(print, file=sys.stderr, flush=True) if self.world.main else lambda text: None
        found = checkpoint.newest(self.folder.checkpoints, say, self.world)
        if found is None:
            say(f"{self.folder.path}: no checkpoint yet, so from the start")
            return
        path, saved = found
        checkpoint.check_fits(path, saved["model"], self.network.config.to_hf())
        self.world.read(path, checkpoint.tensors_of(self.network, self.optimizer, self.average))
        checkpoint.restore_random(saved["random"], self.world)
        vars(self.state).update(saved["state"])
        self.task.resume(saved["task"])
        of_both = saved.get("spikes", [[saved.get("recent", ()), saved.get("high", ())]])  # the first versions told no kinds apart
        for spikes, (recent, high) in zip(self.spikes, [*of_both, ((), ())], strict=False):
            spikes.restore(recent, high)
        if self.average is not None:
            begun = self.settings.average == "ema" or self.state.step > self.settings.steps - self.settings.tail_steps
            self.average.count = saved["averaged"] if begun else 0  # a mean that a moved end leaves begins anew
        if fresh:
            say(f"{path}: going on from step {self.state.step} of {self.settings.steps}")

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """Around the steps: whatever ends them, lines are written out, and who pressed Ctrl-C is told how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            kept = [path.name for path in checkpoint.numbered(self.folder.checkpoints)]
            if self.world.main:
                print(f"stopped after step {self.state.step}; --resume goes on from {kept[-1] if kept else 'the start'}", file=sys.stderr)
            raise
        finally:
            if self.metrics is not None:
                self.metrics.close()


def train_all_or_chosen(network: Qwen2) -> None:
    """What wants a gradient is trained, such as adapters (model/lora.py); where nothing does, as in a model that was loaded, all is."""
    if not any(parameter.requires_grad for parameter in network.parameters()):
        network.requires_grad_(True)


def recompute_layers(network: Qwen2, on_cpu: bool) -> None:
    """Keep only each layer's input for the backward pass, which computes the layer again. Names of parameters stay."""
    layers, slack = list(network.model.layers), Slack()
    for layer in layers:
        forward = partial(slack.around, layer.forward, layer is layers[-1]) if on_cpu else layer.forward
        layer.forward = partial(recomputed, forward, use_reentrant=False)
