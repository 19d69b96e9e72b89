"""The loop with adapters: only they are trained, clipped, averaged and kept, and a resumed run is the same bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qwen2.config import ModelConfig, MoEConfig, tiny
from qwen2.model.lora import LoraSettings, add_lora, lora_parameters
from qwen2.train import checkpoint
from qwen2.train.folder import RunFolder
from qwen2.train.loop import Loop
from qwen2.train.world import World
from tests.conftest import random_network
from tests.train.conftest import Toy, logged, small
from tests.train.test_checkpoint import HaltError, Stopping

MOE = tiny(moe=MoEConfig(experts=4, active=2, expert_ffn=32, shared_ffn=96))


def run(
    folder: Path, settings: LoraSettings, resume: bool = False, config: ModelConfig | None = None, toy: Toy | None = None, **changes: object
) -> Loop:
    """Train adapters on the toy; torch's generator stands where a new process would have it."""
    torch.manual_seed(0)
    network = random_network(tiny(tied=True) if config is None else config)
    add_lora(network, settings, torch.Generator().manual_seed(5))
    with RunFolder(folder) as held:
        loop = Loop(network, (Toy(micro=3) if toy is None else toy).task(), small(**changes), held, World())
        loop.run(resume)
    return loop


@pytest.mark.parametrize(
    ("settings", "config", "changes"),
    [
        (LoraSettings(rank=4, dropout=0.1), tiny(tied=True), {"average": "ema"}),
        (LoraSettings(rank=2, dropout=0.3, rslora=True, targets="attention"), tiny(), {"recompute": "layers"}),
        (LoraSettings(rank=2, dropout=0.2, dora=True), tiny(tied=True), {"average": "tail", "tail": 0.5}),
        (LoraSettings(rank=2, dropout=0.2), MOE, {"precision": "bfloat16"}),
    ],
    ids=["ema", "recomputed", "dora", "moe-bfloat16"],
)
def test_a_resumed_run_is_the_same_bit_for_bit(settings: LoraSettings, config: ModelConfig, changes: dict[str, object], tmp_path: Path):
    whole = run(tmp_path / "whole", settings, config=config, steps=7, **changes)
    with pytest.raises(HaltError):  # in step 6, with checkpoints of steps 2 and 4
        run(tmp_path / "cut", settings, config=config, toy=Stopping(micro=3), steps=7, **changes)
    resumed = run(tmp_path / "cut", settings, resume=True, config=config, steps=7, **changes)
    ours, theirs = (checkpoint.tensors_of(loop.network, loop.optimizer, loop.average) for loop in (resumed, whole))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert logged(tmp_path / "cut", "loss", "grad_norm") == logged(tmp_path / "whole", "loss", "grad_norm")


def test_only_adapters_are_trained_and_kept(tmp_path: Path):
    loop = run(tmp_path / "run", LoraSettings(rank=4), steps=3, average="ema", clip=0.01)
    before = dict(random_network(tiny(tied=True)).named_parameters())
    names = set(lora_parameters(loop.network))
    for name, parameter in loop.network.named_parameters():
        assert name in names or torch.equal(parameter, before[name])
    assert loop.average is not None
    assert set(loop.average.weights) == names
    (newest,) = checkpoint.numbered(tmp_path / "run" / "checkpoints")[-1:]
    kinds = ("model", "exp_avg", "exp_avg_sq", "step", "average")
    with safe_open(newest / "tensors-0000.safetensors", framework="pt") as file:
        assert set(file.keys()) == {f"{kind}/{name}" for kind in kinds for name in names}
    losses = [line[0] for line in logged(tmp_path / "run", "loss")]
    assert len(set(losses)) == 3
    assert len(loop.optimizer.state) == len(names)


def test_gradients_with_adapters_do_not_depend_on_how_a_step_is_split(tmp_path: Path):
    found = []
    for micro in (1, 3, 4):
        network = random_network(tiny(tied=True))
        add_lora(network, LoraSettings(rank=4), torch.Generator().manual_seed(5))
        with torch.no_grad():
            for parameter in lora_parameters(network).values():
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(6))
        with RunFolder(tmp_path / f"run-{micro}") as folder:
            loop = Loop(network, (toy := Toy(micro=micro)).task(), small(), folder, World())
            loop.gradients(toy.next_step())
        found.append({name: parameter.grad for name, parameter in lora_parameters(network).items()})
    for other in found[:2]:
        for name, gradient in other.items():
            torch.testing.assert_close(gradient, found[2][name], rtol=1e-4, atol=1e-6)
