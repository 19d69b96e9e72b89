"""Pre-training: shards and a mixture become batches, the next token's cross-entropy is the loss, bits per byte the evaluation.

A stage (short context, long context, after upcycling) is a run of its own that starts from another run's model. What is left out:
how documents become shards (`qwen2.data`), and the step itself (loop.py).

    folder = pretrain(Job(shards, tokenizer, config, settings, Path("run")))        # RUN/model is a Hugging Face folder
"""

from __future__ import annotations

import os
import shutil
from collections import UserList
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen2.config import GenerationDefaults, ModelConfig
from qwen2.data.batches import Batch, Row, Rows, pack
from qwen2.data.mixture import order
from qwen2.model import Qwen2, load_balancing_loss
from qwen2.tokenizer import ChatTemplate, Tokenizer
from qwen2.train.evaluate import bits_per_byte, bytes_by_token, held_out
from qwen2.train.folder import WHERE, RunFolder, numbered, write_json
from qwen2.train.loop import Loop, State
from qwen2.train.loss import IGNORE, cross_entropy
from qwen2.train.place import origin
from qwen2.train.precision import chosen, settled
from qwen2.train.saved import GENERATION
from qwen2.train.settings import as_dict
from qwen2.train.stage import PretrainSettings, balance_weight
from qwen2.train.start import Start
from qwen2.train.task import Task
from qwen2.train.world import World
from qwen2.weights.export import to_hf_folder
from qwen2.weights.model import Model

if TYPE_CHECKING:
    from qwen2.data.shards import Shards


@dataclass(frozen=True)
class Job:
    """One stage: its data, its model, what it starts from, where it is kept."""

    shards: Shards
    tokenizer: Tokenizer
    config: ModelConfig
    settings: PretrainSettings
    out: Path
    start: Start | None = None  # whose weights it starts from
    source: str | None = None  # what `start` was loaded from; without `start`, the run goes on from a checkpoint
    resume: bool = False

    def sections(self) -> dict[str, dict[str, Any]]:
        """What the run's config.json says."""
        hashes = [record.sha256_tokens for record in self.shards.shards]
        place = os.path.relpath(self.shards.folder.absolute(), self.out.absolute())
        data = {"tokenizer": self.shards.tokenizer.sha256, "shards": hashes, WHERE: place}
        return {"settings": as_dict(self.settings), "model": self.config.to_hf(), "data": data, "from": origin(self.source, self.out)}


def new_config(shape: ModelConfig, tokenizer: Tokenizer, end: int, length: int, theta: float) -> ModelConfig:
    """A shape of the family table for a tokenizer and a context: the vocabulary is the tokenizer's in whole blocks of 64 rows.

    The one that a released shape has is kept for a tokenizer that fills it.
    """
    rows = -(-tokenizer.vocab_size // 64) * 64
    kept = tokenizer.vocab_size <= shape.vocab and rows > 0.99 * shape.vocab
    return replace(shape, vocab=shape.vocab if kept else rows, context=length, rope_theta=theta, bos=end, eos=(end,), dtype="float32")


def flops_per_token(config: ModelConfig) -> int:
    """Forward and backward: six for each weight that a token is multiplied by; attention's own products are left out."""
    return 6 * (config.non_embedding_parameters(active_only=True) + config.embedding_parameters())


STREAMS = 64  # documents that rows are cut from in turn at least, so that the next steps are not more of the same few


class Data:
    """The rows of a run, cut into this rank's micro-batches. A thread makes those of the next step while the present one is computed."""

    def __init__(self, shards: Shards, settings: PretrainSettings, world: World) -> None:
        if settings.batch % world.data_size:
            raise ValueError(f"batch {settings.batch}: {world.data_size} ranks that read different rows need a multiple of that")
        self.settings, self.world = settings, world
        walk = order(shards, settings.mixture(), settings.seed, least=settings.least_document)
        self.rows = Rows(walk, settings.length, max(settings.batch, STREAMS))
        self.position = self.rows.state()  # behind the step that was handed over last
        self.maker, self.coming = ThreadPoolExecutor(1, "rows"), list[Future[tuple[list[Batch], dict[str, Any]]]]()

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step. What went wrong with its rows is raised here, however early they were made."""
        if not self.coming:
            self.coming = [self.maker.submit(self._make)]
        batches, self.position = self.coming[0].result()
        self.coming = [self.maker.submit(self._make)]
        return batches

    def _make(self) -> tuple[list[Batch], dict[str, Any]]:
        """A step's micro-batches, and where the rows stand behind it; those of other ranks are passed by."""
        own, size = list[Row](), self.settings.at_once
        for number in range(self.settings.batch):
            if number % self.world.data_size == self.world.data_rank:
                own.append(next(self.rows))
            else:
                self.rows.skip()
        return [pack(own[start : start + size]) for start in range(0, len(own), size)], self.rows.state()

    def state(self) -> dict[str, Any]:
        """Where the data stands, as JSON can hold it: behind the steps that were handed over, not behind what was made ahead."""
        return self.position

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; what was made ahead is dropped. Errors as `Rows.resume` has them."""
        wait(self.coming)
        self.coming = []
        self.position = self.rows.resume(state).state()


class RouterLogits(UserList[Tensor]):
    """What each mixture layer's router said. No list: FSDP hands on copies of lists among a layer's arguments, and appending is lost."""


def next_token_loss(z_loss: float, balance_loss: float | None, world: World) -> Any:
    """The loss of a micro-batch: cross-entropy, with the z-loss and the balance of experts by their weights (None: the model's own)."""

    def loss(network: Qwen2, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        moe = network.config.moe
        router_logits = None if moe is None else RouterLogits()
        hidden = network(batch.tokens, world.attend(network.config, batch), router_logits)
        total, count, sums = cross_entropy(network, hidden, batch.labels, z_loss)
        if moe is None or not router_logits:
            return total, sums
        rows = world.together(torch.where(batch.labels != IGNORE, batch.rows, -1))
        if not (rows >= 0).any():
            return total, sums
        balance = count * load_balancing_loss([world.together(logits) for logits in router_logits], moe, rows)  # a mean, by its tokens
        return total + balance_weight(balance_loss, moe) * balance, {**sums, "balance": balance.detach()}

    return loss


def make_task(job: Job, world: World) -> Task[Batch]:
    """Pre-training as the loop takes it."""
    settings = job.settings
    data = Data(job.shards, settings, world)
    batches = held_out(job.shards, job.tokenizer, settings.length, settings.at_once * settings.length, settings.eval_bytes)
    return Task(
        next_step=data.next_step,
        loss=next_token_loss(settings.z_loss, settings.balance, world),
        targets=lambda batch: batch.targets,
        tokens=lambda batch: len(batch.tokens),
        local=world.local,
        state=data.state,
        resume=data.resume,
        evaluate=bits_per_byte(batches, bytes_by_token(job.tokenizer), world) if batches else None,
        flops=flops_per_token(job.config),
    )


def make_network(job: Job, world: World | None = None) -> Qwen2:
    """The network that a stage begins with: new weights from the seed, or those of the model it starts from."""
    world = World() if world is None else world
    dtype = chosen(job.settings.precision, world.device)
    if job.start is None:
        return world.new_network(job.config, job.settings.seed, dtype)
    job.start.check_fits(job.config, job.source)
    return job.start.network(job.config, world, dtype)


def pretrain(job: Job, world: World | None = None) -> State:
    """Run a stage and export its model; returns how it went. Errors as `Loop.run` and `RunFolder` have them."""
    world = World() if world is None else world
    with RunFolder(job.out, world.main) as folder:
        job = replace(job, settings=settled(world.agreed(job.settings), job.out, job.resume, world))
        changed = folder.begin(job.sections(), job.resume)
        if job.source is not None and job.start is None and not numbered(folder.checkpoints):
            raise ValueError(f"{job.out}: there is no checkpoint yet to go on from without {job.source}, which the run starts from")
        if world.main:
            keep_tokenizer(job, folder.tokenizer)
        world.barrier()
        loop = Loop(make_network(job, world), make_task(job, world), job.settings, folder, world)
        state = loop.run(job.resume, changed)
        with loop.averaged():
            export(job, folder.model, whole_network(loop.network, world), world)
        loop.draw()
        return state


def keep_tokenizer(job: Job, folder: Path) -> None:
    """The run's own copy of its tokenizer, so that a checkpoint is a model whatever becomes of the shards (saved.py)."""
    if folder.exists():
        return
    draft = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    job.tokenizer.save(draft)
    write_json(draft / GENERATION, GenerationDefaults(eos=(job.shards.tokenizer.end,)).to_hf())
    os.rename(draft, folder)


def whole_network(network: Qwen2, world: World) -> Qwen2 | None:
    """The network with all its weights, on the main rank; on the others, which only hand on what they have of it, None."""
    if not world.divided:
        return network
    alone = Qwen2(network.config, dtype=torch.float32) if world.main else None
    kept = [None for _ in network.parameters()] if alone is None else list(alone.parameters())
    with torch.no_grad():
        for mine, divided in zip(kept, network.parameters(), strict=True):
            whole = world.whole(divided)
            if mine is not None:
                mine.copy_(whole)
            del whole
    return alone


def export(job: Job, folder: Path, network: Qwen2 | None, world: World) -> None:
    """Write the model as a Hugging Face folder, in the place of one that an earlier end of this run left; the main rank has it."""
    if network is not None:
        end = job.shards.tokenizer.end
        template = ChatTemplate.of(job.tokenizer)
        defaults = GenerationDefaults(eos=(end,))
        model = Model(job.config, job.tokenizer, template, defaults, network, job.out.name, folder, "float32")
        draft = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(draft, ignore_errors=True)
        to_hf_folder(model, draft, dtype=getattr(torch, job.settings.export_dtype))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(draft, folder)
    world.barrier()
