"""How much a machine can train in the time there is: a budget in FLOPs, a model that it suits, and steps for each stage.

First the rate of the machine's matrix product, which times the seconds and a share that training reaches is the budget. Of the rungs
below the largest is taken that the budget gives `ratio` tokens a parameter (Hoffmann et al. 2022, arXiv 2203.15556, ask for 20; a
machine with less trains the smallest, and is told so). Then real steps of that model on the real shards are timed, stage by stage,
and what fits into each stage's share of the seconds is what it trains: a slow machine trains less.

What is left out: several devices (`qwen2 plan` computes those) and the time of evaluations, which comes on top.

    make_budget(Shards.open("shards"), tokenizer, 600.0).stages["short"].steps
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2.config import ModelConfig, nano, tiny
from qwen2.data.mixture import sizes
from qwen2.train.folder import RunFolder
from qwen2.train.loop import Loop
from qwen2.train.page import duration
from qwen2.train.precision import chosen, product_rate
from qwen2.train.pretrain import Job, flops_per_token, make_network, make_task, new_config
from qwen2.train.stage import PretrainSettings, of_recipe
from qwen2.train.world import World

if TYPE_CHECKING:
    from qwen2.data.shards import Shards
    from qwen2.tokenizer import Tokenizer

RUNGS = {  # head size 64, so that the kernels and every GGUF format can take them; the vocabulary is the tokenizer's
    "tiny": tiny(tied=True),
    "2m": nano(layers=4, hidden=128, heads=2, kv_heads=1, ffn=352),
    "4m": nano(layers=6, hidden=192, heads=3, kv_heads=1, ffn=512),
    "8m": nano(layers=6, hidden=256, heads=4, kv_heads=2, ffn=704),
    "nano": nano(),
    "40m": nano(layers=12, hidden=512, heads=8, kv_heads=2, ffn=1408),
    "110m": nano(layers=16, hidden=768, heads=12, kv_heads=2, ffn=2048),
}
SMALLEST = "2m"  # of those that are chosen; "tiny" is for tests and has to be asked for
REACHED = 0.4  # of the matrix product's rate, in a first guess
WARM_UP = 2  # steps that are not timed


@dataclass(frozen=True)
class Stage:
    """A stage as it is planned: rows of `length` tokens, `batch` to a step, its share of the time, its rotary base."""

    name: str
    length: int
    batch: int
    share: float
    rope_theta: float

    def __post_init__(self) -> None:
        if self.length < 2 or self.batch < 1:
            raise ValueError(f"stage {self.name}: {self.batch} rows of {self.length} tokens: give at least 1 row of 2")
        if not 0 < self.share <= 1:
            raise ValueError(f"stage {self.name}: share {self.share}: must be above 0, and 1 at most")

    @property
    def step_tokens(self) -> int:
        return self.length * self.batch


STAGES = (  # the Qwen2 report, section 3.2, in small: rows eight times as long at the end, and the base 1,000,000
    Stage("short", 256, 16, 0.8, 10_000.0),
    Stage("long", 2048, 2, 0.2, 1_000_000.0),
)


@dataclass(frozen=True)
class Planned:
    """What a stage gets: optimizer steps, and the speed that was measured."""

    stage: Stage
    steps: int
    tokens_per_s: float

    @property
    def tokens(self) -> int:
        return self.steps * self.stage.step_tokens


@dataclass(frozen=True)
class Budget:
    """The machine's rates in FLOP/s, the model, and the stages."""

    seconds: float
    product_rate: float
    precision: str
    rung: str
    config: ModelConfig
    ratio: float
    stages: Mapping[str, Planned]

    @property
    def tokens(self) -> int:
        return sum(planned.tokens for planned in self.stages.values())

    @property
    def flops(self) -> float:
        """What will be spent: six for each weight and token."""
        return float(self.tokens * flops_per_token(self.config))

    def lines(self) -> list[str]:
        """What was found and what follows, for people."""
        parameters, per_second = self.config.parameters(), self.flops / self.seconds
        got = self.tokens / parameters
        said = [
            f"this machine multiplies {self.product_rate / 1e9:.0f} GFLOP/s in {self.precision}, "
            f"and trains at {per_second / 1e9:.0f} GFLOP/s",
            f"{duration(self.seconds)} of training: {self.flops / 1e12:,.4g} TFLOP, "
            f"{self.tokens:,} tokens for {parameters:,} parameters ({self.rung})",
        ]
        if got < self.ratio:
            longer = self.seconds * self.ratio / got
            said.append(f"that is {got:.1f} tokens a parameter; the {self.ratio:g} that are wanted would take {duration(longer)} here")
        return said

    def to_json(self) -> dict[str, Any]:
        """As budget.json has it."""
        stages = {
            name: {**vars(planned.stage), "steps": planned.steps, "tokens": planned.tokens, "tokens_per_s": planned.tokens_per_s}
            for name, planned in self.stages.items()
        }
        return {
            "seconds": self.seconds,
            "product_flops_per_s": self.product_rate,
            "precision": self.precision,
            "flops": self.flops,
            "model": self.rung,
            "parameters": self.config.parameters(),
            "tokens": self.tokens,
            "tokens_per_parameter": self.tokens / self.config.parameters(),
            "wanted_tokens_per_parameter": self.ratio,
            "stages": stages,
            "said": self.lines(),
        }


def make_budget(
    shards: Shards,
    tokenizer: Tokenizer,
    seconds: float,
    stages: Sequence[Stage] = STAGES,
    size: str | None = None,
    ratio: float = 4.0,
    trial: float = 5.0,
) -> Budget:
    """Measure this machine and plan `seconds` of training. `size` names a rung, `trial` is how long a stage's steps are timed.

    Raises ValueError where the time, the shares or the size make no plan.
    """
    if not seconds > 0 or not ratio > 0:
        raise ValueError(f"{seconds:g} seconds at {ratio:g} tokens a parameter: both must be above 0")
    if abs(sum(stage.share for stage in stages) - 1) > 1e-6:
        raise ValueError(f"the stages' shares add up to {sum(stage.share for stage in stages):g}, not to 1")
    if size is not None and size not in RUNGS:
        raise ValueError(f"size {size!r}: must be one of {', '.join(RUNGS)}")
    world = World()
    dtype = chosen("auto", world.device)
    rate = product_rate(dtype, world.device)
    longest = max(stage.length for stage in stages)
    shapes = {
        name: new_config(shape, tokenizer, shards.tokenizer.end, longest, stages[0].rope_theta)
        for name, shape in RUNGS.items()
        if name == size or (size is None and name != "tiny")
    }
    rung = size if size is not None else choose(shapes, REACHED * rate * seconds, ratio)
    config = shapes[rung]
    planned = {}
    for stage in stages:
        speed = tokens_per_second(shards, tokenizer, config, stage, trial)
        planned[stage.name] = Planned(stage, max(1, int(stage.share * seconds * speed / stage.step_tokens)), speed)
    return Budget(seconds, rate, str(dtype).removeprefix("torch."), rung, config, ratio, planned)


def choose(shapes: Mapping[str, ModelConfig], flops: float, ratio: float) -> str:
    """The largest shape that `flops` can give `ratio` tokens a parameter, the smallest where there is none."""
    fits = [name for name, shape in shapes.items() if flops_per_token(shape) * ratio * shape.parameters() <= flops]
    return fits[-1] if fits else next(iter(shapes))


def tokens_per_second(shards: Shards, tokenizer: Tokenizer, config: ModelConfig, stage: Stage, seconds: float) -> float:
    """Real steps of the loop on the stage's own batches, timed for about `seconds`, in a folder that is thrown away."""
    mixture, _ = of_recipe(shards.manifest["recipe"], sizes(shards))
    rows = PretrainSettings(length=stage.length, batch=stage.batch, micro_batch=stage.batch, eval_bytes=1, **mixture)
    settings = replace(rows, spike=0.0, tensorboard=False, measure=False)
    with tempfile.TemporaryDirectory() as place, RunFolder(Path(place)) as folder:
        job = Job(shards, tokenizer, replace(config, rope_theta=stage.rope_theta), settings, folder.path)
        world = World()
        loop = Loop(make_network(job), make_task(job, world), settings, folder, world)
        for _ in range(WARM_UP):
            loop.step()
        start, before = time.perf_counter(), loop.state.tokens
        while True:
            loop.step()
            spent = time.perf_counter() - start
            if spent >= seconds:
                return (loop.state.tokens - before) / spent
