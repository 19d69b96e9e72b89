"""The optimizer's step against the formula and torch's plain one, its groups, schedules by hand, averages, clipping."""

from __future__ import annotations

from itertools import pairwise
from math import cos, pi, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2.config import MoEConfig, tiny
from qwen2.train.optim import Average, clip, cosine, make_adamw, rate_share, set_rate, wsd
from qwen2.train.settings import Settings
from tests.conftest import random_network


def test_a_step_is_the_paper_formula():
    network = random_network(tiny(tied=True)).double()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = make_adamw(network, 0.9, 0.95, 1e-8, 0.1)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in before.items()}
    generator = torch.Generator().manual_seed(0)
    for step, rate in enumerate((1e-2, 3e-3), start=1):
        for name, p in network.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * p.grad)
            second.mul_(0.95).add_(0.05 * p.grad**2)
            decay = 0.1 if p.dim() == 2 and "embed" not in name else 0.0
            before[name] *= 1 - rate * decay
            before[name] -= rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        set_rate(optimizer, rate)
        optimizer.step()
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_decay_takes_matrices_experts_and_an_own_head_alone():
    network = random_network(tiny(moe=MoEConfig(4, 2, 32, 64)))
    optimizer = make_adamw(network, 0.9, 0.95, 1e-8, 0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in network.named_parameters() if id(p) in decayed}
    assert {"lm_head.weight", "model.layers.0.mlp.experts.down_proj", "model.layers.1.self_attn.k_proj.weight"} <= names
    assert not [name for name in names if "norm" in name or "bias" in name or "embed" in name]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))


def test_cosine_by_hand():
    shares = [cosine(step, 10, 2, 0.1) for step in range(10)]
    assert shares[:2] == [0.5, 1.0]
    assert shares[9] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + cos(pi * 8 / 9)))  # the floor would come next
    assert shares[6] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + cos(pi * 5 / 9)))
    assert all(later < earlier for earlier, later in pairwise(shares[1:]))


def test_wsd_by_hand():
    shares = [wsd(step, 10, 2, 4, 0.0) for step in range(10)]
    assert shares[:6] == [0.5, 1, 1, 1, 1, 1]
    assert shares[6:] == pytest.approx([1 - sqrt(1 / 5), 1 - sqrt(2 / 5), 1 - sqrt(3 / 5), 1 - sqrt(4 / 5)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_every_step_learns_the_last_too(schedule: str, steps: int):
    s = Settings(steps=steps, schedule=schedule)  # type: ignore[arg-type]
    assert min(rate_share(schedule, step, steps, s.warmup_steps, s.decay_steps, 0.0) for step in range(steps)) > 0


@given(st.sampled_from(["cosine", "wsd", "constant"]), st.integers(1, 300), st.integers(0, 50), st.integers(1, 60), st.floats(0, 1))
def test_a_schedule_stays_between_zero_and_the_peak(schedule: str, steps: int, warmup: int, decay: int, floor: float):
    shares = [rate_share(schedule, step, steps, warmup, decay, floor) for step in range(steps)]
    assert all(0 <= share <= 1 + 1e-12 for share in shares)
    if warmup == 0:
        assert shares[0] == pytest.approx(max(shares))


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="schedule 'linear'"):
        rate_share("linear", 0, 10, 0, 1, 0.0)


def test_averages_by_hand():
    network = random_network(tiny())
    weights = [{name: torch.full_like(p, float(value)) for name, p in network.named_parameters()} for value in (1, 2, 6)]
    ema, mean = Average(network, 0.5), Average(network, None)
    for step in weights:
        with torch.no_grad():
            for name, p in network.named_parameters():
                p.copy_(step[name])
        ema.update(network)
        mean.update(network)
    assert ema.weights["model.norm.weight"][0] == 0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 6
    assert mean.weights["model.norm.weight"][0] == pytest.approx(3.0)
    mean.swap(network)
    torch.testing.assert_close(network.model.norm.weight.detach(), torch.full((64,), 3.0))
    assert mean.weights["model.norm.weight"][0] == 6
    mean.swap(network)
    assert network.model.norm.weight[0] == 6


def test_clipping_scales_to_the_limit_and_leaves_what_is_below():
    p = torch.zeros(2, requires_grad=True)
    for limit, expected in ((1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])):
        p.grad = torch.tensor([3.0, 4.0])
        clip([p], torch.tensor(5.0), limit)
        torch.testing.assert_close(p.grad, torch.tensor(expected), rtol=1e-4, atol=0)
