"""The loop: steps against transformers and torch, splits of a step, precision, recomputation, numbers that are not finite, spikes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qwen2.config import MoEConfig, tiny
from qwen2.data.batches import Batch, pack
from qwen2.train.faults import Spikes, TrainingError
from qwen2.train.folder import RunFolder
from qwen2.train.loop import Loop
from qwen2.train.metrics import read_lines
from qwen2.train.settings import Settings
from qwen2.train.world import World
from tests.conftest import random_network
from tests.model.test_parity import our_import, theirs_like
from tests.train.conftest import Toy, logged, run, small

MOE = tiny(moe=MoEConfig(8, 2, 32, 96))


def gradients(toy: Toy, tmp_path: Path, batches: list[Batch] | None = None, **changes: object) -> tuple[float, dict[str, torch.Tensor]]:
    network = random_network(tiny())
    with RunFolder(tmp_path / "run") as folder:
        loop = Loop(network, toy.task(), small(**changes), folder, World())
        step = loop.gradients(toy.next_step() if batches is None else batches)
    return step.loss, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_steps_equal_transformers_with_torch_adamw(tmp_path: Path):
    """Three steps of ours beside three of theirs: a transformers model, separate documents, torch's optimizer, the same losses.

    An eps above the gradients' rounding errors, which AdamW would otherwise turn into whole steps.
    """
    theirs = theirs_like(tiny())
    theirs.save_pretrained(tmp_path / "model")
    ours = our_import(tmp_path / "model")
    toy = Toy(micro=3)
    with RunFolder(tmp_path / "run") as folder:
        loop = Loop(
            ours, toy.task(), small(steps=3, schedule="constant", warmup=0.0, weight_decay=0.0, clip=0.5, eps=1e-3), folder, World()
        )
        loop.run()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    losses, again = [], Toy(micro=4)
    for _ in range(3):
        (batch,) = again.next_step()
        total = torch.zeros(())
        for tokens, labels in zip(batch.tokens.split(batch.lengths), batch.labels.split(batch.lengths), strict=True):
            total = total + F.cross_entropy(theirs(tokens[None]).logits[0], labels, ignore_index=-100, reduction="sum")
        loss = total / batch.targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [line[0] for line in logged(tmp_path / "run", "loss")] == pytest.approx(losses, rel=1e-5)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("micro", [1, 3, 5, 8])
def test_gradients_do_not_depend_on_how_a_step_is_split(micro: int, tmp_path: Path):
    """8 x 1, uneven (3 + 3 + 2, 5 + 3) and 1 x 8, with unlike numbers of targets in each row."""
    loss, found = gradients(Toy(rows=8, micro=micro), tmp_path)
    whole, expected = gradients(Toy(rows=8, micro=8), tmp_path)
    assert loss == pytest.approx(whole, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_a_micro_batch_without_a_target_counts_for_nothing(tmp_path: Path):
    rows = [Toy().row(number) for number in range(3)]
    empty = pack([replace(rows[2], labels=rows[2].labels * 0 - 100)])
    loss, found = gradients(Toy(), tmp_path, [pack(rows[:1]), empty, pack(rows[1:2])])
    whole, expected = gradients(Toy(), tmp_path, [pack(rows[:2])])
    assert loss == pytest.approx(whole, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    loss, found = gradients(Toy(), tmp_path, [empty])
    assert loss == 0.0
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("config", [tiny(tied=True), MOE], ids=["tied", "moe"])
def test_recomputed_layers_give_the_same_bits(config: object, tmp_path: Path):
    kept = run(tmp_path / "kept", config=config, steps=2)  # type: ignore[arg-type]
    again = run(tmp_path / "again", config=config, steps=2, recompute="layers")  # type: ignore[arg-type]
    assert logged(tmp_path / "kept", "loss", "grad_norm") == logged(tmp_path / "again", "loss", "grad_norm")
    for ours, theirs in zip(kept.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_bfloat16_stays_near_float32_and_keeps_float32_weights(tmp_path: Path):
    exact = run(tmp_path / "exact", Toy(rows=2, micro=2), steps=4)
    rounded = run(tmp_path / "rounded", Toy(rows=2, micro=2), steps=4, precision="bfloat16")
    ours, theirs = logged(tmp_path / "rounded", "loss"), logged(tmp_path / "exact", "loss")
    assert ours != theirs
    assert [one[0] for one in ours] == pytest.approx([one[0] for one in theirs], rel=2e-2)
    assert {p.dtype for p in rounded.network.parameters()} == {p.dtype for p in exact.network.parameters()} == {torch.float32}


def test_a_run_learns_its_rows(tmp_path: Path):
    class Same(Toy):
        def row(self, number: int):
            return super().row(number % self.rows)

    run(tmp_path / "run", Same(), steps=30)
    losses = [line[0] for line in logged(tmp_path / "run", "loss")]
    assert losses[-1] < 0.5 * losses[0]


def test_a_loss_that_is_not_finite_stops_and_names_step_and_micro_batch(tmp_path: Path):
    with pytest.raises(
        TrainingError, match=r"step 3: the loss of micro-batch 1 of 2 is not finite: .*it is the loss itself; .*--on-nonfinite skip"
    ):
        run(tmp_path / "run", Toy(micro=2, spoil=(3,)))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["event"] for line in lines if "event" in line] == ["stopped"]


def test_a_bad_batch_can_be_left_out_and_is_counted(tmp_path: Path):
    loop = run(tmp_path / "run", Toy(spoil=(3, 5)), on_nonfinite="skip")
    assert (loop.state.step, loop.state.skipped) == (6, 2)
    assert all(bool(p.isfinite().all()) for p in loop.network.parameters())
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if line.get("event") == "left out"] == [2, 4]
    assert lines[-1]["skipped"] == 2
    assert [(line["loss"], line["grad_norm"]) for line in lines if line["step"] == 3 and "loss" in line] == [
        (None, None)
    ]  # JSON has no NaN


def test_too_many_bad_batches_in_a_row_stop_the_run(tmp_path: Path):
    with pytest.raises(TrainingError, match="2 batches were left out before it"):
        run(tmp_path / "run", Toy(spoil=(2, 3, 4)), on_nonfinite="skip", most_skips=2)


@pytest.mark.parametrize(
    ("spoiled", "named"),
    [
        ("weight", "weights that are not finite: model.layers.1.mlp.up_proj.weight"),
        ("output", "the output of model.layers.1.self_attn.v_proj is the first"),
    ],
)
def test_the_first_bad_layer_is_named(spoiled: str, named: str, tmp_path: Path):
    network = random_network(tiny())
    with torch.no_grad():
        if spoiled == "weight":
            network.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
        else:
            network.model.layers[1].self_attn.v_proj.weight.fill_(3e38)
    with RunFolder(tmp_path / "run") as folder, pytest.raises(TrainingError, match=named):
        Loop(network, Toy().task(), small(), folder, World()).run()


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path):
    network = random_network(tiny())
    network.model.layers[0].mlp.down_proj.weight.register_hook(lambda gradient: gradient * float("inf"))
    with (
        RunFolder(tmp_path / "run") as folder,
        pytest.raises(TrainingError, match=r"the gradients' norm is not finite: .*gradients are not: model.layers.0.mlp.down_proj.weight;"),
    ):
        Loop(network, Toy().task(), small(), folder, World()).run()


class Jump(Toy):
    """Losses of ordinary size, but for one step of rows."""

    def loss(self, network, batch):
        total, sums = super().loss(network, batch)
        return total * (100.0 if self.turn == 21 else 1.0), sums


def events(folder: Path) -> list[dict[str, Any]]:
    """What happened to a run, as its metrics have it."""
    return [line for line in read_lines(folder / "metrics.jsonl") if "event" in line]


def test_a_spike_is_written_down(tmp_path: Path):
    loop = run(tmp_path / "run", Jump(), steps=24, lr=1e-4)
    assert loop.state.spikes == 1
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["event"]) == (20, "spike")
    assert "deviations above the recent median" in event["text"]


def test_a_run_goes_back_from_a_spike_and_on_with_other_rows(tmp_path: Path):
    toy = Jump()
    loop = run(tmp_path / "run", toy, steps=24, lr=1e-4, on_spike="rollback", save_every=6)
    assert (loop.state.step, loop.state.rollbacks, loop.state.spikes) == (24, 1, 1)
    assert toy.turn == 21 + 6  # the 21 steps of rows that were seen, and those from step 18 on
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    logged = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [step for step, _ in logged] == [*range(1, 25)]  # each once, and none of them the spike
    assert max(loss for _, loss in logged) < 10
    (event,) = [line for line in lines if "event" in line]
    assert (event["step"], event["event"]) == (20, "went back")
    assert lines.index(event) == 18
    assert "step 21: the loss" in event["text"]
    assert "back to step 18" in event["text"]


def test_a_run_that_went_back_and_was_killed_is_the_same_in_the_end(tmp_path: Path):
    """Killed at step 22, after it went back from 20 to 18: resumed from 18 it meets the spike again, and goes back again."""

    class Killed(Jump):
        def next_step(self):
            if self.turn == 25:
                raise KeyboardInterrupt
            return super().next_step()

    given = {"steps": 24, "lr": 1e-4, "on_spike": "rollback", "save_every": 6}
    whole = run(tmp_path / "whole", Jump(), **given)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Killed(), **given)
    resumed = run(tmp_path / "cut", Jump(), resume=True, **given)
    assert resumed.state == whole.state
    kept = [
        [(line["step"], line.get("loss"), line.get("event")) for line in read_lines(tmp_path / n / "metrics.jsonl")]
        for n in ("cut", "whole")
    ]
    assert kept[0] == kept[1]


def test_a_run_that_keeps_going_back_stops(tmp_path: Path):
    class Always(Toy):
        def loss(self, network, batch):
            total, sums = super().loss(network, batch)
            return total * (100.0 if self.turn >= 21 else 1.0), sums

    with pytest.raises(TrainingError, match="went back 2 times already"):
        run(tmp_path / "run", Always(), steps=24, lr=1e-4, on_spike="rollback", save_every=6, most_rollbacks=2)


def test_a_spike_is_judged_by_the_runs_own_noise():
    spikes = Spikes(10.0)
    assert not [1 for number in range(40) if spikes.look(3.0 + 0.2 * (number % 5))]
    assert spikes.look(4.5) is None
    assert spikes.look(9.0) is not None
    assert 9.0 not in spikes.recent
    assert Spikes(0.0).look(1e9) is None


def test_a_rise_that_lasts_is_a_new_level_and_no_spikes_for_ever():
    """Ten in a row are called spikes, the tenth with what follows; then the run is measured by where it is now."""
    spikes = Spikes(10.0)
    for number in range(64):
        assert spikes.look(1.0 + 0.01 * (number % 5)) is None
    risen = [spikes.look(5.0 + 0.01 * (number % 5)) for number in range(100)]
    assert [found is not None for found in risen] == [True] * 10 + [False] * 90
    assert [found.lasting for found in risen[:10] if found is not None] == [False] * 9 + [True]
    assert "so were the 9 losses before it: this is the run's new level" in risen[9].text  # type: ignore[union-attr]
    assert spikes.look(9.0) is not None, "spikes above the new level are still found"


def test_what_is_high_now_and_then_is_never_a_level():
    spikes = Spikes(10.0)
    for number in range(64):
        spikes.look(1.0 + 0.01 * (number % 5))
    found = [spikes.look(1.0 if number % 10 == 9 else 5.0) for number in range(60)]
    assert sum(one is not None for one in found) == 54
    assert not any(one.lasting for one in found if one is not None)


def test_a_run_that_was_killed_in_a_rise_counts_on(tmp_path: Path):
    class Risen(Toy):
        def loss(self, network, batch):
            if self.turn == stop:
                raise KeyboardInterrupt
            total, sums = super().loss(network, batch)
            return total * (100.0 if self.turn >= 20 else 1.0), sums

    given = {"steps": 34, "lr": 1e-4, "save_every": 2}
    stop = 0
    whole = run(tmp_path / "whole", Risen(), **given)
    assert whole.state.spikes == 10
    stop = 25
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Risen(), **given)
    stop = 0
    assert run(tmp_path / "cut", Risen(), resume=True, **given).state == whole.state
    assert events(tmp_path / "cut") == events(tmp_path / "whole")


def test_steps_of_another_level_are_measured_by_their_own(tmp_path: Path):
    """Every third step is ten times as high, which is no spike where the task tells these steps apart; one of them that jumps is."""

    class Mixed(Toy):
        def loss(self, network, batch):
            if self.turn == stop:
                raise KeyboardInterrupt
            total, sums = super().loss(network, batch)
            return total * (1000.0 if self.turn == 75 else 10.0 if self.turn % 3 == 0 else 1.0), sums

        def task(self):
            return replace(super().task(), apart=lambda batch: told and self.turn % 3 == 0)

    given = {"steps": 80, "lr": 1e-4, "save_every": 2}
    toy, stop, told = partial(Mixed, rows=1, micro=1), 0, False
    assert run(tmp_path / "alike", toy(), **given).state.spikes > 10
    told = True
    assert run(tmp_path / "whole", toy(), **given).state.spikes == 1
    stop = 65
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", toy(), **given)
    stop = 0
    assert run(tmp_path / "cut", toy(), resume=True, **given).state.spikes == 1
    assert events(tmp_path / "cut") == events(tmp_path / "whole")
    assert events(tmp_path / "cut")[0]["step"] == 74


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 0.0}, "lr 0.0"), ({"lr": float("nan")}, "lr nan"), ({"lr": -1.0}, "lr -1.0"), ({"steps": 0}, "steps 0"),
        ({"precision": "float16"}, "precision float16: Qwen2's large key biases overflow"), ({"schedule": "linear"}, "schedule 'linear'"),
        ({"warmup": 1.5}, "warmup 1.5"), ({"beta2": 1.0}, "beta2 1.0"), ({"clip": float("inf")}, "clip inf"), ({"seed": True}, "seed True"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(changes: dict[str, object], named: str):
    with pytest.raises(ValueError, match=named):
        Settings(**changes)  # type: ignore[arg-type]
