"""Preference training end to end: losses and gradients against transformers and trl, whatever the micro-batches; the reference's cache;
exact resuming; what is said of it; what comes out."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen2.config import ModelConfig, tiny
from qwen2.config.lora import LoraSettings
from qwen2.engine.llm import LLM
from qwen2.model import Qwen2
from qwen2.model.lora import add_lora
from qwen2.post.preference import dpo as job_module
from qwen2.post.preference.dpo import Data, Job, PairBatch, Reader, dpo, pair_loss
from qwen2.post.preference.losses import divergence_of, kto
from qwen2.post.preference.pairs import Collected, Items, collect
from qwen2.post.preference.settings import DpoSettings
from qwen2.post.rows.records import Example, Preference, Record
from qwen2.train.metrics import read_lines
from qwen2.train.saved import take
from qwen2.weights.export import to_gguf, to_hf_folder
from qwen2.weights.model import Model, load
from tests.conftest import SHAPES, random_network, tiny_model
from tests.post.conftest import WORDS
from tests.post.test_branches import separate
from tests.post.test_preference import theirs_of

LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "normalised and smoothed, with an SFT term": {"length_normalised": True, "label_smoothing": 0.1, "sft": 0.5},
    "ipo": {"loss": "ipo"},
    "simpo": {"loss": "simpo"},
    "orpo": {"loss": "orpo"},
    "kto": {"loss": "kto", "desirable": 1.2},
}


def rows(count: int, seed: int = 0) -> list[Record]:
    """Answers with a fox in them are better; prompts and answers of unlike lengths."""
    rng = random.Random(seed)
    words = lambda least, most: " ".join(rng.choice(WORDS[4:]) for _ in range(rng.randint(least, most)))  # noqa: E731
    made: list[Record] = []
    for number in range(1, count + 1):
        prompt = [{"role": "user", "content": words(1, 30)}]
        sides = [[{"role": "assistant", "content": f"{word} {words(1, 8)}"}] for word in ("fox", "dog")]
        made.append(Preference(prompt, *sides, None, f"pairs:{number}"))
    return made


def small(**changes: Any) -> DpoSettings:
    given: dict[str, Any] = {"steps": 6, "epochs": 0.0, "length": 160, "batch": 6, "micro_batch": 4, "lr": 3e-3, "eval_share": 0.0}
    given |= {"log_every": 1, "save_every": 2, "eval_every": 3, "measure": False, "tensorboard": False, "precision": "float32"}
    return DpoSettings(**{**given, **changes})


def gathered(settings: DpoSettings, records: list[Record] | None = None, evaluation: list[Record] | None = None) -> Collected:
    held = rows(8, seed=1) if evaluation is None else evaluation
    return collect(rows(20) if records is None else records, tiny_model().template, settings, held)


def run(out: Path, resume: bool = False, lora: LoraSettings | None = None, model: Model | None = None, **changes: Any) -> Model:
    """Train a tiny model, as `qwen2 dpo` does; returns it."""
    settings, start = small(**changes), tiny_model() if model is None else model
    dpo(Job(gathered(settings), start, settings, out, resume=resume, lora=lora))
    return start


def reader(network: Qwen2) -> Reader:
    return Reader(network, torch.float32, torch.device("cpu"))


def reference_of(config: ModelConfig, items: Items) -> torch.Tensor:
    return reader(random_network(config, seed=7))(items.groups)


def gradients(network: Qwen2) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None}


def step(config: ModelConfig, settings: DpoSettings, batches: list[int] | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss of twelve items and its gradients, in micro-batches of these sizes."""
    network, items = random_network(config).requires_grad_(True), gathered(settings, rows(12)).items
    data = Data(items, settings, reference_of(config, items), reader(network))
    drawn, value, at = list(range(12)), 0.0, 0
    divergence = data.divergence(drawn)
    for size in [12] if batches is None else batches:
        total, _ = pair_loss(settings)(network, data.batch(drawn[at : at + size], divergence))
        (total / 12).backward()
        value, at = value + float(total.detach()) / 12, at + size
    assert at == 12
    return value, gradients(network)


def close(ours: tuple[float, dict[str, torch.Tensor]], theirs: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            ours[1][name], gradient, rtol=2e-3, atol=3e-4 * scale + 1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- losses and gradients


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_change_nothing(name: str):
    settings = small(**LOSSES[name])
    whole = step(tiny(), settings)
    for sizes in ([1] * 12, [5, 4, 3], [6, 6]):
        close(step(tiny(), settings, sizes), whole)


@pytest.mark.parametrize("shape", ["dense", "tied"])
@pytest.mark.parametrize(("name", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo"), ("normalised", "sigmoid_norm")])
def test_loss_and_gradients_are_those_of_trl_on_transformers(shape: str, name: str, theirs: str, tmp_path: Path):
    """The same pairs, padded, through transformers' model and trl's loss: equal loss, equal gradient of every weight."""
    from transformers import AutoModelForCausalLM

    config = replace(SHAPES[shape], eos=(511,), bos=509)
    changes = {"dpo": {}, "ipo": {"loss": "ipo"}, "normalised": {"length_normalised": True}}[name]
    settings = small(**changes)
    items = gathered(settings, rows(12)).items
    reference = reference_of(config, items)
    model = tiny_model(config)
    to_hf_folder(model, tmp_path / "model", dtype=torch.float32)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    value = trl_loss(network, items, reference, theirs, settings.strength)
    value.backward()
    found = {key: parameter.grad for key, parameter in network.named_parameters()}
    close(step(config, settings), (float(value.detach()), found))


def trl_loss(network: Any, items: Items, reference: torch.Tensor, loss: str, beta: float) -> torch.Tensor:
    """trl's own loss of a padded batch, all chosen answers first, on log-probabilities of all logits."""
    from tests.post.test_preference import Says, dpo_trainer

    texts = [(group.prompt, group.answers[side]) for side in (0, 1) for group in items.groups]
    longest = max(len(prompt) + len(answer.ids) for prompt, answer in texts)
    ids, mask = torch.full((len(texts), longest), 509), torch.zeros(len(texts), longest, dtype=torch.long)
    attention = torch.zeros_like(mask)
    for i, (prompt, answer) in enumerate(texts):
        end = len(prompt) + len(answer.ids)
        ids[i, :end] = torch.tensor([*prompt, *answer.ids])
        mask[i, len(prompt) : end] = 1
        attention[i, :end] = 1
    logprobs = network(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
    logprobs = logprobs.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    inputs = {"input_ids": ids, "attention_mask": attention, "completion_mask": mask}
    inputs |= {"ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    return theirs_of("DPOTrainer")._compute_loss(dpo_trainer(loss, beta), Says(logprobs), inputs, return_outputs=False)


def test_log_probabilities_are_the_engines():
    """Of each answer, from the text's own log-probabilities in the engine, prompt and all."""
    model = tiny_model()
    items = gathered(small()).items
    ours = reader(model.network)(items.groups)
    llm = LLM(model)
    for group, sums in zip(items.groups[:6], ours, strict=False):
        for answer, total in zip(group.answers, sums, strict=True):
            scored = llm.score([[*group.prompt, *answer.ids]])[0][len(group.prompt) :]
            assert float(total) == pytest.approx(sum(p for p, sampled in zip(scored, answer.mask, strict=True) if sampled and p), abs=2e-4)
    torch.testing.assert_close(ours[:6].flatten(), separate(model.network, items.groups[:6]).detach(), rtol=1e-5, atol=1e-4)


def test_ktos_divergence_is_that_of_the_step_by_hand():
    settings = small(loss="kto")
    config = tiny()
    network, items = random_network(config), gathered(settings, rows(6)).items
    reference = reference_of(config, items)
    data = Data(items, settings, reference, reader(network))
    drawn = [0, 3, 5, 8]
    ours = reader(network)(items.groups)
    divergence = divergence_of((ours - reference)[drawn, 1])
    assert data.divergence(drawn) == pytest.approx(float(divergence), rel=1e-5)
    data.divergence = lambda _: 0.7  # type: ignore[method-assign]
    (batch,) = data.batches(drawn)
    total, said = pair_loss(settings)(network, batch)
    wanted = torch.tensor([items.wanted[i] for i in drawn])
    by_hand = kto((ours - reference)[drawn, 0], wanted, 0.7, 0.1)
    assert float(total.detach()) == pytest.approx(float(by_hand.sum()), rel=1e-4)
    assert float(said["divergence"]) == pytest.approx(4 * 0.7)
    assert len(batch.branches.counts) == 4


def test_what_is_said_of_a_batch_by_hand():
    settings = small(beta=0.5)
    config = tiny()
    network, items = random_network(config), gathered(settings, rows(3)).items
    reference = reference_of(config, items)
    (batch,) = Data(items, settings, reference, reader(network)).batches([0, 1, 2])
    _, said = pair_loss(settings)(network, batch)
    sums = reader(network)(items.groups)
    rewards = 0.5 * (sums - reference)
    assert float(said["accuracy"]) == sum(float(chosen > rejected) for chosen, rejected in rewards)
    assert float(said["margin"]) == pytest.approx(float((rewards[:, 0] - rewards[:, 1]).sum()), abs=1e-3)
    for side, name in enumerate(("chosen", "rejected")):
        assert float(said[f"reward_{name}"]) == pytest.approx(float(rewards[:, side].sum()), abs=1e-3)
        assert float(said[f"logp_{name}"]) == pytest.approx(float(sums[:, side].sum()), abs=1e-3)
        assert float(said[f"length_{name}"]) == sum(group.answers[side].length for group in items.groups)


# --- the run


def test_a_model_learns_which_answers_are_better(tmp_path: Path):
    model = tiny_model()
    run(tmp_path / "run", model=model, steps=30)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    evals = [line["eval"] for line in lines if "eval" in line]
    assert evals[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the model is its own reference before the first step
    assert abs(evals[0]["margin"]) < 1e-3
    assert evals[-1]["accuracy"] == 1.0
    held = json.loads((tmp_path / "run" / "config.json").read_text())["data"]["held_out"]
    for found in evals:
        assert found["accuracy_standard_error"] == pytest.approx((found["accuracy"] * (1 - found["accuracy"]) / held) ** 0.5)
    assert evals[-1]["margin"] > 1 > 0.2 > evals[-1]["loss"]
    logged = [line for line in lines if "loss" in line]
    for name in ("accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "length_chosen", "length_rejected"):
        assert name in logged[-1]
    ended = take(tmp_path / "run", print)
    assert ended.generation.eos[0] == 511
    for ours, theirs in zip(ended.network.parameters(), model.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(("count", "epochs", "batch"), [(17, 1.0, 16), (3, 1.0, 16), (20, 2.0, 6), (20, 0.55, 6), (12, 1.0, 6)])
def test_a_run_by_epochs_reads_every_pair_as_often_as_it_has_epochs(count: int, epochs: float, batch: int):
    settings = small(epochs=epochs, batch=batch, micro_batch=2)
    items = gathered(settings, rows(count)).items
    total = round(epochs * count)
    settings = replace(settings, steps=-(-total // batch))
    data = Data(items, settings, torch.arange(count)[:, None].float(), reader(tiny_model().network))  # which pair it is, as a reference
    steps = [[int(index) for batch in data.next_step() for index in batch.reference[:, 0]] for _ in range(settings.steps)]
    read = Counter(index for step in steps for index in step)
    assert sum(read.values()) == total
    assert set(read.values()) <= {int(epochs), -int(-epochs // 1)}
    assert all(len(step) == batch for step in steps[:-1])
    assert len(steps[-1]) == total - batch * (settings.steps - 1)


class HaltError(Exception):
    pass


KINDS: dict[str, tuple[dict[str, Any], LoraSettings | None]] = {
    "dpo": ({}, None),
    "kto, averaged": ({"loss": "kto", "average": "ema", "ema_decay": 0.5}, None),
    "by epochs, the last step of four pairs": ({"epochs": 2.0}, None),
    "adapters with dropout": ({}, LoraSettings(rank=4, dropout=0.2)),
    "the base as the reference": ({"reference": "adapter"}, LoraSettings(rank=4, dropout=0.2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_bit_for_bit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped in step 6 of 7 with checkpoints of 2 and 4: every number as in one go, and the reference is not computed again."""
    changes, lora = KINDS[kind]
    run(tmp_path / "whole", lora=lora, steps=7, **changes)
    plain = Data.next_step

    def stopping(self: Data) -> list[PairBatch]:
        if self.order.drawn == 5 * 6:
            raise HaltError
        return plain(self)

    monkeypatch.setattr(Data, "next_step", stopping)
    with pytest.raises(HaltError):
        run(tmp_path / "cut", lora=lora, steps=7, **changes)
    monkeypatch.setattr(Data, "next_step", plain)
    monkeypatch.setattr(job_module.Reference, "write", lambda self: pytest.fail("the reference was computed again"))
    run(tmp_path / "cut", resume=True, lora=lora, steps=7, **changes)
    names = ("step", "tokens", "loss", "grad_norm", "margin", "eval")
    cut, whole = ([[line.get(n) for n in names] for line in read_lines(tmp_path / out / "metrics.jsonl")] for out in ("cut", "whole"))
    assert cut == whole
    file = "model/model.safetensors" if lora is None else "adapter/adapter_model.safetensors"
    ours, theirs = (load_file(tmp_path / out / file) for out in ("cut", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_pairs_of_another_kind_are_no_resumption(tmp_path: Path):
    run(tmp_path / "run", steps=2)
    settings = small(steps=2)
    with pytest.raises(ValueError, match="data: sha256 is"):
        dpo(Job(gathered(settings, rows(20, seed=5)), tiny_model(), settings, tmp_path / "run", resume=True))
    with pytest.raises(ValueError, match="from: weights is"):
        dpo(Job(gathered(settings), tiny_model(seed=3), settings, tmp_path / "run", resume=True))


# --- adapters, and what is refused


def test_an_adapters_run_is_the_base_and_its_adapter(tmp_path: Path):
    base = tmp_path / "base"
    to_hf_folder(tiny_model(), base)
    settings = small(steps=3)
    model = take(base, print, dtype="float32")
    dpo(Job(gathered(settings), model, settings, tmp_path / "run", str(base), lora=LoraSettings(rank=4)))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lora"]["rank"] == 4
    assert not (tmp_path / "run" / "model").exists()
    ended = take(tmp_path / "run", print)
    group = gathered(settings).items.groups[0]
    sums = reader(model.network)([group])
    torch.testing.assert_close(reader(ended.network)([group]), sums, rtol=1e-4, atol=1e-4)
    assert (sums - reader(tiny_model().network)([group])).abs().max() > 1e-2


def test_adapters_of_a_base_that_stays_packed(tmp_path: Path):
    """QLoRA: the reference is the packed base, the policy its adapters over it; what comes out is those adapters."""
    to_gguf(tiny_model(), tmp_path / "base.gguf", "Q8_0")
    settings = small(steps=4)
    losses = []
    for kind in ("cache", "adapter"):
        model = load(tmp_path / "base.gguf", packed=True)
        job = Job(gathered(settings), model, replace(settings, reference=kind), tmp_path / kind, str(tmp_path / "base.gguf"))
        if kind == "cache":
            with pytest.raises(ValueError, match="weights in blocks cannot be trained themselves"):
                dpo(job)
        dpo(replace(job, lora=LoraSettings(rank=4)))
        losses.append([line["loss"] for line in read_lines(tmp_path / kind / "metrics.jsonl") if "loss" in line])
        assert (tmp_path / kind / "adapter" / "adapter_config.json").exists()
    assert losses[0][0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[0][-1] < 0.68
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_frozen_head_gets_the_same_adapter_gradients():
    """With adapters the head is frozen, which is computed another way: the gradients of the adapters are those of a trained head."""
    settings, found = small(), []
    items = gathered(settings, rows(4)).items
    for frozen in (True, False):
        network = random_network(tiny())
        add_lora(network, LoraSettings(rank=4), torch.Generator().manual_seed(0))
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith("lora_B"):
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        network.head.weight.requires_grad_(not frozen)
        (batch,) = Data(items, settings, reference_of(tiny(), items), reader(network)).batches([0, 1, 2, 3])
        pair_loss(settings)(network, batch)[0].backward()
        found.append({name: g for name, g in gradients(network).items() if "adapter" in name})
    close((0.0, found[0]), (0.0, found[1]))


def test_a_window_that_is_too_short_is_said(tmp_path: Path):
    with pytest.raises(ValueError, match=r"length 100,000: the model's window is .* tokens"):
        run(tmp_path / "run", length=100_000)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_traced(tmp_path: Path):
    model = tiny_model()
    with torch.no_grad():
        model.network.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"step 1: the loss of micro-batch 1 of 2 is not finite.*layers.1"):
        run(tmp_path / "run", model=model)


def test_labels_alone_are_ktos(tmp_path: Path):
    records: list[Record] = [
        Example([{"role": "user", "content": f"the {i}"}, {"role": "assistant", "content": word}], None, f"x:{i}", label=word == "fox")
        for i in range(20)
        for word in ("fox", "dog")
    ]
    settings = small(loss="kto", steps=20)
    data = gathered(settings, records, records[:10])
    dpo(Job(data, tiny_model(), settings, tmp_path / "run"))
    evals = [line["eval"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "eval" in line]
    assert evals[-1]["loss"] < 0.3 < evals[0]["loss"]
    assert abs(evals[0]["reward_wanted"]) < 1e-3
    assert evals[-1]["reward_wanted"] > 1 > -1 > evals[-1]["reward_unwanted"]
