"""The losses against trl's own code on fixed tensors, and against the papers' formulas where trl has another form; gradients too."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen2.post.preference import losses as preference

LENGTHS = ([5, 3, 9, 1], [2, 7, 9, 4])  # tokens of the chosen and the rejected answers
ALONE = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)  # accelerate's, of one process


def sums(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Log-probabilities of each answer's tokens: (chosen, rejected) of the model and of the reference, 4 answers of 9 tokens at most."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(9)[None] < torch.tensor(LENGTHS[0] + LENGTHS[1])[:, None]  # (8, 9)
    drawn = [(-3 * torch.rand(8, 9, generator=generator, dtype=torch.float64) * mask).to(dtype) for _ in range(2)]
    return (*drawn, mask)


def ratios(mean: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    ours, theirs, mask = sums()
    found = (ours - theirs).sum(1)
    return tuple((found / mask.sum(1) if mean else found).chunk(2))  # type: ignore[return-value]


def theirs_of(name: str, module: str = "trl") -> Any:
    return getattr(pytest.importorskip(module, reason="this trl needs Python 3.11"), name)


class Says(torch.nn.Module):
    """A model that says what it is told, in the form that trl's trainers ask for."""

    def __init__(self, logprobs: torch.Tensor) -> None:
        super().__init__()
        zeros = torch.zeros_like(logprobs)
        self.said = SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def forward(self, **_: Any) -> SimpleNamespace:
        return self.said


def dpo_trainer(loss: str, beta: float) -> SimpleNamespace:
    """Of trl's DPOTrainer what its loss asks for: settings, and one process."""
    settings = {"loss_types": [loss], "loss_weights": [1.0], "f_divergence_type": "reverse_kl", "beta": beta, "label_smoothing": 0.0}
    settings |= {"ld_alpha": None, "use_weighting": False, "precompute_ref_logps": True, "aux_loss_enabled": False}
    return SimpleNamespace(model=SimpleNamespace(training=True), accelerator=ALONE, **settings, **counters())


def counters() -> dict[str, Any]:
    return {"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1}


def by_trl(loss: str, beta: float) -> float:
    """The loss of trl's DPOTrainer: its own method, with nothing of a trainer around it but the settings."""
    ours, theirs, mask = sums(dtype=torch.float32)
    reference = theirs.sum(1).chunk(2)
    completion = torch.cat([torch.zeros(8, 1, dtype=torch.long), mask.long()], 1)  # behind a prompt of one token
    inputs = {"input_ids": torch.ones(8, 10, dtype=torch.long), "attention_mask": torch.ones(8, 10), "completion_mask": completion}
    inputs |= {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    return float(theirs_of("DPOTrainer")._compute_loss(dpo_trainer(loss, beta), Says(ours), inputs, return_outputs=False))


@pytest.mark.parametrize(("name", "mean"), [("sigmoid", False), ("sigmoid_norm", True)])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_and_its_normalised_form_are_trls(name: str, mean: bool, beta: float):
    assert float(preference.dpo(*ratios(mean), beta).mean()) == pytest.approx(by_trl(name, beta), rel=1e-5)


@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_ipo_is_trls(tau: float):
    assert float(preference.ipo(*ratios(mean=True), tau).mean()) == pytest.approx(by_trl("ipo", tau), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_and_smoothing_are_trls(smoothing: float):
    ours, _, mask = sums()
    chosen, rejected = (ours.sum(1) / mask.sum(1)).chunk(2)
    trainer = SimpleNamespace(alpha=0.0, beta=2.0, simpo_gamma=0.8, label_smoothing=smoothing, loss_type="simpo", accelerator=ALONE)
    theirs, _, _ = theirs_of("CPOTrainer", "trl.experimental.cpo").cpo_loss(trainer, chosen, rejected)
    torch.testing.assert_close(preference.simpo(chosen, rejected, 2.0, 0.8, smoothing), theirs, rtol=1e-9, atol=0)
    trainer.loss_type = "sigmoid"  # of ratios this is conservative DPO
    theirs, _, _ = theirs_of("CPOTrainer", "trl.experimental.cpo").cpo_loss(trainer, *ratios())
    torch.testing.assert_close(preference.dpo(*ratios(), 2.0, smoothing), theirs, rtol=1e-9, atol=0)


def test_orpo_is_trls():
    ours, _, mask = sums()
    chosen, rejected = (ours.sum(1) / mask.sum(1)).chunk(2)
    trainer = SimpleNamespace(beta=0.3, accelerator=ALONE)
    theirs = theirs_of("ORPOTrainer", "trl.experimental.orpo").odds_ratio_loss(trainer, chosen, rejected)[
        0
    ]  # to be taken away from the cross-entropy
    torch.testing.assert_close(0.3 * preference.odds(chosen, rejected), -theirs.double(), rtol=1e-5, atol=1e-6)
    p, q = chosen.exp(), rejected.exp()
    by_hand = -torch.log(torch.sigmoid(torch.log(p / (1 - p)) - torch.log(q / (1 - q))))
    torch.testing.assert_close(preference.odds(chosen, rejected), by_hand, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0])
def test_kto_is_trls(shift: float):
    ours, theirs, mask = sums(1, dtype=torch.float32)
    mismatched, reference, _ = sums(2, dtype=torch.float32)
    mismatched = mismatched + shift * mask / mask.sum(1, keepdim=True)
    wanted = torch.tensor([True, False, True, True, False, True, False, False])

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ALONE,
        _compute_kl_logps=lambda model, batch: mismatched.sum(1),
        calculate_KL=True,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        loss_type="kto",
        beta=0.2,
        desirable_weight=1.0,
        undesirable_weight=1.3,
        **counters(),
    )
    completion = torch.cat([torch.zeros(8, 1, dtype=torch.long), mask.long()], 1)
    inputs = {
        "input_ids": torch.ones(8, 10, dtype=torch.long),
        "attention_mask": torch.ones(8, 10),
        "completion_mask": completion,
        "label": wanted,
        "ref_logps": theirs.sum(1),
        "ref_KL_logps": reference.sum(1),
    }
    expected = float(theirs_of("KTOTrainer")._compute_loss(trainer, Says(ours), inputs, return_outputs=False))
    divergence = preference.divergence_of((mismatched - reference).sum(1))
    found = preference.kto((ours - theirs).sum(1), wanted, divergence, 0.2, 1.0, 1.3)
    assert float(found.mean()) == pytest.approx(expected, rel=1e-5)
    assert float(divergence) >= 0


def test_formulas_by_hand():
    chosen, rejected = torch.tensor([1.5], dtype=torch.float64), torch.tensor([-0.5], dtype=torch.float64)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert preference.dpo(chosen, rejected, 0.1).item() == pytest.approx(-math.log(sigmoid(0.2)))
    smoothed = -0.9 * math.log(sigmoid(0.2)) - 0.1 * math.log(sigmoid(-0.2))
    assert preference.dpo(chosen, rejected, 0.1, 0.1).item() == pytest.approx(smoothed)
    assert preference.ipo(chosen, rejected, 0.5).item() == pytest.approx((2 - 1) ** 2)
    assert preference.simpo(-rejected, chosen, 2.0, 0.5).item() == pytest.approx(-math.log(sigmoid(2 * (0.5 - 1.5) - 0.5)))
    assert preference.imitation(rejected).item() == 0.5
    wanted = torch.tensor([True, False])
    both = torch.cat([chosen, rejected])
    found = preference.kto(both, wanted, 0.25, 0.1, 2.0, 3.0).tolist()
    assert found == pytest.approx([2 * (1 - sigmoid(0.1 * 1.25)), 3 * (1 - sigmoid(0.1 * 0.75))])
    assert preference.divergence_of(torch.tensor([-3.0, 1.0])).item() == 0.0


@pytest.mark.parametrize("name", ["dpo", "smoothed", "ipo", "simpo", "odds", "kto"])
def test_gradients_are_those_of_the_values(name: str):
    losses = {
        "dpo": lambda c, r: preference.dpo(c, r, 0.3),
        "smoothed": lambda c, r: preference.dpo(c, r, 0.3, 0.2),
        "ipo": lambda c, r: preference.ipo(c, r, 0.3),
        "simpo": lambda c, r: preference.simpo(c, r, 2.0, 0.5),
        "odds": lambda c, r: preference.odds(c, r),
        "kto": lambda c, r: preference.kto(torch.cat([c, r]), torch.arange(8) < 4, 0.3, 0.2),
    }
    chosen, rejected = (-(x.abs() + 0.1) if name in ("odds", "simpo") else x for x in ratios())
    assert torch.autograd.gradcheck(losses[name], (chosen.clone().requires_grad_(), rejected.clone().requires_grad_()))


def test_no_number_is_lost_at_the_ends():
    """Answers that are certain, and ratios far from 0: finite losses and gradients."""
    chosen = torch.tensor([0.0, -1e-9, -50.0], requires_grad=True)
    rejected = torch.tensor([-50.0, -2.0, 0.0], requires_grad=True)
    found = preference.odds(chosen, rejected)
    found.sum().backward()
    assert found.isfinite().all()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()
    far = preference.dpo(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]), 1.0)
    assert far.tolist() == [2e4, 0.0]
