"""Supervised fine-tuning: conversations become rows, the loss is that of what an assistant says, and the end is a chat model.

Examples are packed into rows (packing.py) and attended to each inside itself, so that a row's neighbours change nothing; the batch is
ragged, so there is no padding. The loss is the sum over all learned tokens of a step divided by their number. A run by epochs ends
with the last row of its last epoch, however few rows that step has.

What is left out: reading files (readers.py) and tokens (encode.py, examples.py), and the step itself (train/loop.py).

    sft(Job(collect(read(["data.jsonl"]), template, settings), model, settings, Path("run")))     # RUN/model answers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen2.config.lora import LoraSettings
from qwen2.data.batches import IGNORE, Batch, Row, pack
from qwen2.model.packed import TiedEmbedding
from qwen2.post.adapters import adapted, check_device, check_weights, keep_start, weights_sha256
from qwen2.post.chat_model import as_chat, export, gather_adapters, keep_texts
from qwen2.post.finetuning.noise import with_noise
from qwen2.post.finetuning.samples import Samples
from qwen2.post.rows.packing import PackedRows
from qwen2.train.changes import AS_MODEL
from qwen2.train.folder import RunFolder
from qwen2.train.logprobs import token_logprobs
from qwen2.train.loop import Loop, State
from qwen2.train.loss import cross_entropy
from qwen2.train.metrics import check_there
from qwen2.train.place import ADAPTER, origin
from qwen2.train.precision import settled, unrecorded
from qwen2.train.pretrain import flops_per_token, next_token_loss, whole_network
from qwen2.train.settings import as_dict
from qwen2.train.standard_error import named, of_ratio
from qwen2.train.task import Task
from qwen2.train.world import World
from qwen2.weights.adapter import digest_of, save_adapter

if TYPE_CHECKING:
    from qwen2.config import ModelConfig
    from qwen2.model import Qwen2
    from qwen2.post.finetuning.settings import SftSettings
    from qwen2.post.rows.examples import Collected, Examples
    from qwen2.weights.model import Model

HELD_OUT_LOSS = "held-out loss"


@dataclass(frozen=True)
class Job:
    """One run: its data, the model that it starts from and that is trained in place, where it is kept.

    With `lora`, an adapter that `start` has beside it is the one that is trained.
    """

    data: Collected
    start: Model
    settings: SftSettings
    out: Path
    source: str | None = None  # what `start` was loaded from
    resume: bool = False
    lora: LoraSettings | None = None  # adapters that are trained instead of the weights

    def sections(self) -> dict[str, dict[str, Any]]:
        """What the run's config.json says."""
        examples, held_out, template, own = self.data.examples, self.data.held_out, self.start.template, self.start.adapter
        data = {"sha256": examples.sha256(), "examples": len(examples), "held_out": len(held_out), "held_out_sha256": held_out.sha256()}
        weights = "packed" if self.start.network.packed else "float32"
        base = {} if self.lora is None else {"weights": weights_sha256(self.start.network)}  # checkpoints have the adapters alone
        return {
            "settings": as_dict(self.settings),
            "model": self.start.config.to_hf(),
            "data": data,
            "start": {"template": template.style, "system": template.default_system, "weights": weights},
            "from": {**origin(self.source, self.out), **base, **({} if own is None else {"adapter": digest_of(own)})},
            **({} if self.lora is None else {"lora": asdict(self.lora)}),
        }


class Data:
    """The rows of a run, cut into this rank's micro-batches."""

    def __init__(self, examples: Examples, settings: SftSettings, world: World) -> None:
        if settings.batch % world.data_size:
            raise ValueError(f"batch {settings.batch}: {world.data_size} ranks that read different rows need a multiple of that")
        self.examples, self.settings, self.world = examples, settings, world
        self.rows = examples.rows(settings)
        total = self.rows.total(settings.epochs) if settings.epochs else 0
        self.last = total if settings.steps == -(-total // settings.batch) else None  # rows of the run, where epochs end it

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step; every rank reads all rows and keeps its own.

        Where the last rows are no multiple of the ranks, further ones without targets fill them up.
        """
        left = 0 if self.last is None else self.last - self.rows.taken
        rows = [self.examples.row(next(self.rows)) for _ in range(min(self.settings.batch, left) if left > 0 else self.settings.batch)]
        while len(rows) % self.world.data_size:
            rows.append(without_targets(rows[-1]))
        own, size = rows[self.world.data_rank :: self.world.data_size], self.settings.at_once
        return [pack(own[start : start + size]) for start in range(0, len(own), size)]


def without_targets(row: Row) -> Row:
    """The same row, of which nothing is learned."""
    return Row(row.tokens, np.full_like(row.labels, IGNORE), row.lengths)


def steps_of(examples: Examples, settings: SftSettings) -> int:
    """Steps of a run by epochs."""
    return -(-examples.rows(settings).total(settings.epochs) // settings.batch)


def held_out_batches(examples: Examples, settings: SftSettings) -> list[Batch]:
    """At most `eval_rows` rows of held-out examples, the same ones every time."""
    if not len(examples):
        return []
    stream = PackedRows(examples.lengths, settings.length, settings.packing, 0)
    rows = [examples.row(indices) for indices in stream.rows[: settings.eval_rows]]
    return [pack(rows[start : start + settings.at_once]) for start in range(0, len(rows), settings.at_once)]


def held_out_loss(network: Qwen2, batches: list[Batch], world: World) -> float:
    """The mean loss, in nats, of all learned tokens of the batches. Every rank computes all of it."""
    total, count = 0.0, 0
    for whole in batches:
        batch = world.local(whole)
        with unrecorded(network):
            hidden = network(batch.tokens, world.attend(network.config, batch))
            _, _, sums = cross_entropy(network, hidden, batch.labels)
        total += float(sums["nll"])
        count += whole.targets
    return world.sum([total])[0] / world.data_size / max(count, 1)


def evaluation(network: Qwen2, batches: list[Batch], world: World) -> dict[str, float]:
    """The held-out loss with its standard error over examples. A network that is divided among ranks has the loss alone."""
    if world.divided:
        return {HELD_OUT_LOSS: held_out_loss(network, batches, world)}
    sums, counts = torch.cat([example_losses(network, world.local(batch), world) for batch in batches]).unbind(1)
    error = of_ratio(sums, counts)
    mean = float(sums.sum()) / max(float(counts.sum()), 1)
    return {HELD_OUT_LOSS: mean, **({} if error is None else {named(HELD_OUT_LOSS): error})}


def example_losses(network: Qwen2, batch: Batch, world: World) -> Tensor:
    """(E, 2) float64, of each of a batch's examples: the loss of its learned tokens in nats, and how many these are."""
    rows = (batch.labels != IGNORE).nonzero().squeeze(1)  # (n,)
    with unrecorded(network):
        hidden = network(batch.tokens, world.attend(network.config, batch))
        losses = -token_logprobs(network, hidden, rows, batch.labels[rows]).detach().cpu().double()
    owners = torch.arange(len(batch.lengths)).repeat_interleave(torch.tensor(batch.lengths))[rows.cpu()]
    found = torch.zeros(len(batch.lengths), 2, dtype=torch.float64)
    return found.index_add(0, owners, torch.stack([losses, torch.ones_like(losses)], 1))


def make_task(job: Job, world: World, evaluate: Callable[[Qwen2], Mapping[str, float]] | None = None) -> Task[Batch]:
    """Fine-tuning as the loop takes it."""
    data = Data(job.data.examples, job.settings, world)
    loss = next_token_loss(job.settings.z_loss, job.settings.balance, world)
    return Task(
        next_step=data.next_step,
        loss=with_noise(loss, job.settings.neftune) if job.settings.neftune else loss,
        targets=lambda batch: batch.targets,
        tokens=lambda batch: len(batch.tokens),
        local=world.local,
        state=data.rows.state,
        resume=data.rows.resume,
        evaluate=evaluate,
        evaluated="",
        flops=flops_per_token(job.start.config) * (1 if job.lora is None else 2 / 3),  # frozen weights have no gradient
        apart=has_text,
    )


def has_text(batch: Batch) -> bool:
    """Whether one of its pieces is a text, in which all is learned but the first token, as in no conversation.

    Among answers that a model knows nearly by heart, texts are learned at ten times their loss; which steps have some is chance.
    """
    lengths = torch.tensor(batch.lengths)
    owners = torch.arange(len(lengths)).repeat_interleave(lengths)
    learned = torch.bincount(owners, (batch.labels.cpu() != IGNORE).float(), len(lengths))
    return bool(((learned >= lengths - 1) & (lengths > 1)).any())


def sft(job: Job, world: World | None = None) -> State:
    """Run the job and export its model, or its adapter; returns how it went. Errors as `Loop.run` and `RunFolder` have them."""
    world = World() if world is None else world
    with RunFolder(job.out, world.main, AS_MODEL) as folder:
        job = replace(job, settings=settled(world.agreed(job.settings), job.out, job.resume, world), start=as_chat(job.start))
        check(job)
        check_device(job.start, world.device)
        sections, network = job.sections(), job.start.network
        network.config = job.start.config  # what checkpoints say of the model: its end is the chat's
        own = job.start.adapter
        if job.lora is not None:
            job = replace(job, start=adapted(job.start, job.lora, job.settings.seed))
        torch.manual_seed(job.settings.seed)  # of what training draws, such as dropout
        batches = held_out_batches(job.data.held_out, job.settings)
        samples = Samples(job.data.prompts or job.data.first, job.start, job.settings, folder.path / "samples.jsonl")

        def evaluate(network: Qwen2) -> dict[str, float]:
            found = evaluation(network, batches, world) if batches else {}
            if not world.divided:  # a network that is divided cannot be asked by one rank
                samples(network, loop.state.step)
            return found

        loop = Loop(network, make_task(job, world, evaluate), job.settings, folder, world)
        changed = folder.begin(sections, job.resume)  # when nothing is left that may be refused, so that the folder stays free till then
        if world.main:
            keep_texts(job.start, folder.tokenizer)
            keep_start(own, folder.path)
        world.barrier()
        state = loop.run(job.resume, changed)
        with loop.averaged():
            if job.lora is None:
                export(job.start, whole_network(loop.network, world), folder.model, job.settings.export_dtype, world)
            else:
                gather_adapters(loop.network, world)
                if world.main:
                    texts, dtype = (job.start.tokenizer, job.start.generation), getattr(torch, job.settings.export_dtype)
                    save_adapter(loop.network, job.lora, folder.path / ADAPTER, job.source, dtype, texts)
                world.barrier()
        loop.draw()
        return state


def check(job: Job) -> None:
    """ValueError where the model cannot be trained on these rows, or the run that is resumed is one of adapters and this one is not."""
    check_there(job.settings.tensorboard)
    check_window(job.start.config, job.settings)
    if job.lora is None:
        check_weights(job.start, job.out if job.resume else None)
    if job.settings.neftune and isinstance(job.start.network.model.embed_tokens, TiedEmbedding):
        raise ValueError(f"neftune {job.settings.neftune:g}: the embedding of this model stays in blocks with its head; leave it out")


def check_window(config: ModelConfig, settings: SftSettings) -> None:
    """ValueError where rows are longer than the model reads."""
    if settings.length > config.window:
        raise ValueError(f"length {settings.length:,}: the model's window is {config.window:,} tokens; take --length of at most that")
