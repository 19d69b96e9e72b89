"""Preference training: pairs become batches in which a prompt is computed once for both answers, a loss of losses.py is minimised.

A step: the answers' log-probabilities, chunk by chunk and never as N x V logits (train/logprobs.py); their ratios to the reference's, which
were computed once (reference.py) or come from the base under the adapter; the loss, a sum over pairs that the loop divides by the step's
number of them. A run by epochs ends with the last pair of its last epoch, however few that step has. KTO's divergence is estimated from
the whole step before any of its micro-batches, so that these change nothing. Over weights in blocks the reference, the divergence and
evaluations are computed as steps are, with inputs in floating point.

Ranks share out a step's pairs, and those that the reference reads; each computes all of an evaluation and of KTO's divergence.

What is left out: reading files (readers.py) and tokens (pairs.py), ranks that share a sequence, and the balancing loss of a mixture of
experts.

    dpo(Job(collect(read(["pairs.jsonl"]), template, settings), model, settings, Path("run")))     # RUN/model
"""

# P pairs (or single answers) of a micro-batch, A answers, n scored tokens

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen2.engine.progress import Progress
from qwen2.model import packed_attend
from qwen2.model.lora import LoraSettings, without_lora
from qwen2.post.adapters import adapted, check_device, check_weights, keep_start, weights_sha256
from qwen2.post.chat_model import as_chat, export, gather_adapters, keep_texts
from qwen2.post.preference.branches import Branches, Group, branch, branched_attend
from qwen2.post.preference.losses import divergence_of
from qwen2.post.preference.objective import answers_objective, pairs_objective
from qwen2.post.preference.pairs import Order, last_of
from qwen2.post.preference.reference import Reference
from qwen2.train.changes import AS_MODEL
from qwen2.train.folder import RunFolder
from qwen2.train.logprobs import token_logprobs
from qwen2.train.loop import Loop, State
from qwen2.train.metrics import check_there
from qwen2.train.place import ADAPTER, origin
from qwen2.train.precision import chosen, computing, settled, unrecorded
from qwen2.train.pretrain import whole_network
from qwen2.train.settings import as_dict
from qwen2.train.standard_error import named, of_share
from qwen2.train.task import Task
from qwen2.train.world import World
from qwen2.weights.adapter import digest_of, save_adapter

if TYPE_CHECKING:
    from qwen2.config import ModelConfig
    from qwen2.model import Qwen2
    from qwen2.post.preference.pairs import Collected, Items
    from qwen2.post.preference.settings import DpoSettings
    from qwen2.weights.model import Model

READ_TOKENS = 4096  # of a batch that is only read


@dataclass(frozen=True)
class Job:
    """One run: its data, the model that it starts from and that is trained in place, where it is kept.

    With `lora`, an adapter that `start` has beside it is the one that is trained.
    """

    data: Collected
    start: Model
    settings: DpoSettings
    out: Path
    source: str | None = None  # what `start` was loaded from
    resume: bool = False
    lora: LoraSettings | None = None  # adapters are trained instead of the weights

    def sections(self, weights: str) -> dict[str, dict[str, Any]]:
        """What the run's config.json says; `weights` is their hash at the start."""
        items, held_out, template, own = self.data.items, self.data.held_out, self.start.template, self.start.adapter
        data = {"sha256": items.sha256(), "items": len(items), "held_out": len(held_out), "held_out_sha256": held_out.sha256()}
        form = "packed" if self.start.network.packed else "float32"
        return {
            "settings": as_dict(self.settings),
            "model": self.start.config.to_hf(),
            "data": data,
            "start": {"template": template.style, "system": template.default_system, "weights": form},
            "from": {**origin(self.source, self.out), "weights": weights, **({} if own is None else {"adapter": digest_of(own)})},
            **({} if self.lora is None else {"lora": asdict(self.lora)}),
        }


@dataclass(frozen=True)
class PairBatch:
    """A micro-batch: the tokens, what the reference says of each answer (P, 1 or 2), KTO's labels (P,) and its divergence.

    The first `pairs` of them count; another fills up a rank's share of a step.
    """

    branches: Branches
    reference: Tensor
    wanted: Tensor
    pairs: int
    tokens: int  # of these pairs
    divergence: float = 0.0

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch, its tensors on `device`."""
        return replace(self, branches=self.branches.to(device), reference=self.reference.to(device), wanted=self.wanted.to(device))


def answer_logprobs(network: Qwen2, batch: Branches) -> Tensor:
    """The sum over each answer's sampled tokens (A,) of log p(token | all before it)."""
    attend = branched_attend(packed_attend(network.config, batch.positions, batch.lengths), batch)
    logprobs = token_logprobs(network, network(batch.tokens, attend), batch.rows, batch.targets)  # (n,)
    return logprobs.new_zeros(len(batch.counts)).index_add(0, batch.owners, logprobs)


class Reader:
    """Log-probabilities that no gradient follows: of the reference, of held-out pairs, of KTO's mismatched answers."""

    def __init__(self, network: Qwen2, dtype: torch.dtype, device: torch.device) -> None:
        self.network, self.dtype, self.device = network, dtype, device

    def __call__(self, groups: Sequence[Group], bar: Progress | None = None) -> Tensor:
        """Groups of as many answers each -> (number of groups, answers), in their order."""
        found, at, training = [], 0, self.network.training
        self.network.eval()
        with unrecorded(self.network), computing(self.dtype, self.device):
            while at < len(groups):
                part = [groups[at]]
                while at + len(part) < len(groups) and sum(group.tokens for group in part) + groups[at + len(part)].tokens <= READ_TOKENS:
                    part.append(groups[at + len(part)])
                sums = answer_logprobs(self.network, branch(part).to(self.device))
                found.append(sums.view(len(part), -1))
                at += len(part)
                if bar is not None:
                    for group in part:
                        bar.advance(group.tokens, finished=True)
        self.network.train(training)
        return torch.cat(found)


class Data:
    """The items of a run in their order, cut into this rank's micro-batches, with what the reference says of them."""

    def __init__(self, items: Items, settings: DpoSettings, sums: Tensor, read: Reader, world: World | None = None) -> None:
        world = World() if world is None else world
        if settings.batch % world.data_size:
            raise ValueError(f"batch {settings.batch}: {world.data_size} ranks that read different pairs need a multiple of that")
        self.items, self.settings, self.sums, self.read, self.world = items, settings, sums, read, world
        self.order = Order(len(items), settings.seed)
        self.last = last_of(len(items), settings)

    def next_step(self) -> list[PairBatch]:
        """The micro-batches of the next step; the last one of a run by epochs has the items that are left.

        Where these are no multiple of the ranks, those that have one less compute an item more, which does not count.
        """
        left = 0 if self.last is None else self.last - self.order.drawn
        drawn = [next(self.order) for _ in range(min(self.settings.batch, left) if left > 0 else self.settings.batch)]
        own, share = drawn[self.world.data_rank :: self.world.data_size], -(-len(drawn) // self.world.data_size)
        return self.share((own or drawn)[:share], self.divergence(drawn), len(own), share)

    def batches(self, drawn: Sequence[int]) -> list[PairBatch]:
        """All of these items as micro-batches."""
        return self.share(drawn, self.divergence(drawn), len(drawn), len(drawn))

    def share(self, drawn: Sequence[int], divergence: float, counted: int, share: int) -> list[PairBatch]:
        """These items as micro-batches, filled up to a `share`; the first so many are `counted`."""
        filled, size = [*drawn, *[drawn[-1]] * (share - len(drawn))], self.settings.at_once
        return [self.batch(filled[at : at + size], divergence, min(max(counted - at, 0), size)) for at in range(0, share, size)]

    def batch(self, drawn: Sequence[int], divergence: float, counted: int | None = None) -> PairBatch:
        """These items as one, of which the first so many are `counted`; left out, all."""
        counted = len(drawn) if counted is None else counted
        groups, place = [self.items.groups[index] for index in drawn], torch.tensor(drawn)
        wanted = torch.tensor([self.items.wanted[index] for index in drawn]) if self.items.wanted else torch.empty(0, dtype=torch.bool)
        reference = self.sums[place]
        if self.items.wanted:  # the second answer is another prompt's
            groups, reference = [Group(group.prompt, group.answers[:1]) for group in groups], reference[:, :1]
        return PairBatch(branch(groups), reference, wanted, counted, sum(group.tokens for group in groups[:counted]), divergence)

    def divergence(self, drawn: Sequence[int]) -> float:
        """KTO's estimate from the items' second answers, by the weights as they are."""
        if not self.items.wanted:
            return 0.0
        groups = [Group(self.items.groups[index].prompt, self.items.groups[index].answers[1:]) for index in drawn]
        return float(divergence_of(self.read(groups)[:, 0].cpu() - self.sums[torch.tensor(drawn), 1]))


def pair_loss(settings: DpoSettings) -> Callable[[Qwen2, PairBatch], tuple[Tensor, dict[str, Tensor]]]:
    """The loss of a micro-batch, a sum over its pairs (or answers), and sums to report."""
    of_pairs, of_answers = pairs_objective(settings), answers_objective(settings)

    def loss(network: Qwen2, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        counts, reference, P = batch.branches.counts, batch.reference, batch.pairs
        if settings.reference == "adapter":
            with without_lora(network), unrecorded(network):
                reference = answer_logprobs(network, batch.branches).view(-1, 2)
        sums = answer_logprobs(network, batch.branches)
        if settings.loss == "kto":
            losses, said = of_answers(sums[:P], counts[:P], reference[:P, 0], batch.wanted[:P], batch.divergence)
            return losses.sum(), said
        losses, said = of_pairs(sums.view(-1, 2)[:P], counts.view(-1, 2)[:P], reference[:P])
        return losses.sum(), said

    return loss


def evaluation(data: Data, settings: DpoSettings, world: World) -> Callable[[Qwen2], dict[str, float]]:
    """What the loop calls: means over held-out pairs, the same ones every time."""
    loss, held_out = pair_loss(settings), range(min(len(data.items), settings.eval_pairs))

    def evaluate(network: Qwen2) -> dict[str, float]:
        total: dict[str, float] = {}
        for batch in data.batches(held_out):
            with unrecorded(network):
                value, sums = loss(network, batch.to(world.device))
            for name, sum_of in {"loss": value, **sums}.items():
                total[name] = total.get(name, 0.0) + float(sum_of)
        shown = ("loss", "imitation", "accuracy", "margin", "reward_chosen", "reward_rejected")
        found = {name: total[name] / len(held_out) for name in shown if name in total}
        if "wanted" in total:
            counts = {"wanted": total["wanted"], "unwanted": len(held_out) - total["wanted"]}
            found |= {f"reward_{name}": total[f"reward_{name}"] / count for name, count in counts.items() if count}
        return found | {named("accuracy"): of_share(found["accuracy"], len(held_out))}

    return evaluate


def flops_per_token(job: Job) -> float:
    """Forward and backward of the layers: six for each weight, four for a frozen one. Attention and head are left out."""
    return float((6 if job.lora is None else 4) * job.start.config.non_embedding_parameters(active_only=True))


def make_task(job: Job, data: Data, held_out: Data, world: World) -> Task[PairBatch]:
    """Preference training as the loop takes it."""
    return Task(
        next_step=data.next_step,
        loss=pair_loss(job.settings),
        targets=lambda batch: batch.pairs,
        tokens=lambda batch: batch.tokens,
        local=lambda batch: batch.to(world.device),
        state=data.order.state,
        resume=data.order.resume,
        evaluate=evaluation(held_out, job.settings, world) if len(held_out.items) else None,
        evaluated="",
        flops=flops_per_token(job),
    )


def dpo(job: Job, world: World | None = None) -> State:
    """Run the job; the end is RUN/model, or RUN/adapter where adapters were trained. Errors as `Loop.run` and `RunFolder` have them."""
    world = World() if world is None else world
    items, held_out = job.data.items, job.data.held_out
    if world.size > world.data_size:
        raise ValueError(
            "processes of dpo read different pairs each, and cannot share one: leave --context-parallel and --tensor-parallel out"
        )
    with RunFolder(job.out, world.main, AS_MODEL) as folder:
        settings = settled(world.agreed(job.settings), job.out, job.resume, world)
        job = replace(job, settings=settings, start=as_chat(job.start))
        check(job)
        check_device(job.start, world.device)
        network, weights = job.start.network, weights_sha256(job.start.network)
        sections = job.sections(weights)
        network.config = job.start.config  # what checkpoints say of the model: its end is the chat's
        torch.manual_seed(settings.seed)  # of what training draws, such as dropout
        own = job.start.adapter
        if job.lora is not None:
            job = replace(job, start=adapted(job.start, job.lora, settings.seed))
        changed = folder.begin(sections, job.resume)  # when nothing is left that may be refused, so that the folder stays free till then
        if world.main:
            keep_texts(job.start, folder.tokenizer)
            keep_start(own, folder.path)
        world.barrier()
        network.to(world.device)
        read = Reader(network, chosen(settings.precision, world.device), world.device)
        sums = reference_sums(job, read, weights, folder.path, world, own)
        data, kept = (
            Data(*each, read, world) for each in ((items, settings, sums[: len(items)]), (held_out, settings, sums[len(items) :]))
        )
        loop = Loop(network, make_task(job, data, kept, world), settings, folder, world)
        state = loop.run(job.resume, changed)
        with loop.averaged():
            if job.lora is None:
                export(job.start, whole_network(network, world), folder.model, settings.export_dtype, world)
            else:
                gather_adapters(network, world)
                if world.main:
                    texts = (job.start.tokenizer, job.start.generation)
                    save_adapter(network, job.lora, folder.path / ADAPTER, job.source, getattr(torch, settings.export_dtype), texts)
                world.barrier()
        loop.draw()
        return state


def reference_sums(job: Job, read: Reader, weights: str, folder: Path, world: World, own: Path | None = None) -> Tensor:
    """What the reference says of each item's answers, learned from and held out (n, 2); NaN where the run does not read it.

    The network is the reference here: no step was done yet, also to the adapter that it goes on with (`own`), or new ones are off. It is
    whole on every rank still; each computes some of them.
    """
    settings, groups = job.settings, [*job.data.items.groups, *job.data.held_out.groups]
    if not settings.has_reference or settings.reference == "adapter":
        return torch.empty(len(groups), 0)
    learned, data = len(job.data.items), hashlib.sha256((job.data.items.sha256() + job.data.held_out.sha256()).encode()).hexdigest()
    model = weights if own is None else f"{weights} {digest_of(own)}"
    found = Reference(folder, {"model": model, "data": data, "computed in": f"{read.dtype} as steps are"}, (len(groups), 2))
    say = partial(print, file=sys.stderr, flush=True) if world.main else lambda text: None
    if world.main:
        found.read(say)
    found.sums = world.agreed(found.sums)
    order = Order(learned, settings.seed)
    turns = range(min(settings.steps * settings.batch, learned))  # an epoch reads all
    wanted = [*(order.at(turn) for turn in turns), *range(learned, learned + min(len(groups) - learned, settings.eval_pairs))]
    missing = found.missing(wanted)
    if missing:
        say(f"the reference's log-probabilities of {len(missing):,} prompts with their answers, once: {found.path}")
    with (
        without_lora(read.network) if own is None else nullcontext(),
        Progress(-(-len(missing) // world.size), None if world.main else False) as bar,
    ):

        def compute(indices: Sequence[int]) -> Tensor:
            mine = indices[world.rank :: world.size]
            parts = world.every(read([groups[index] for index in mine], bar).cpu() if mine else torch.empty(0, 2))
            sums = torch.empty(len(indices), 2)
            for rank, part in enumerate(parts):
                sums[rank :: world.size] = part.float()
            return sums

        found.fill(wanted, compute, keep=world.main)
    return found.sums


def check(job: Job) -> None:
    """ValueError where the model cannot be trained on these pairs, or the run that is resumed is one of adapters and this one is not."""
    settings = job.settings
    check_there(settings.tensorboard)
    if job.lora is None:
        check_weights(job.start, job.out if job.resume else None)
    if settings.reference == "adapter" and job.lora is None:
        raise ValueError("reference adapter: there is none without --lora-rank; leave it out, and the reference's numbers are kept")
    if settings.reference == "adapter" and job.start.adapter is not None:
        raise ValueError(
            "reference adapter: training goes on with an adapter, and the base without it is not what it is compared with; leave it out, "
            "and the numbers of the model as it starts are kept"
        )
    check_window(job.start.config, settings)


def check_window(config: ModelConfig, settings: DpoSettings) -> None:
    """ValueError where prompts with their answers may be longer than the model reads."""
    if settings.length > config.window:
        raise ValueError(f"length {settings.length:,}: the model's window is {config.window:,} tokens; take --length of at most that")
