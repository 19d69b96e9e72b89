"""Upcycling: the steps of the report one by one, an equal function where nothing is drawn anew, transformers' logits, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen2.cli.app import main
from qwen2.config import tiny
from qwen2.model.attention import packed_attend
from qwen2.train.upcycle import Upcycling, neuron_scales, slots, upcycle
from qwen2.weights.export import to_hf_folder
from qwen2.weights.model import Model, load
from tests.conftest import tiny_model

TOKENS = torch.randint(0, 500, (40,), generator=torch.Generator().manual_seed(1))
EQUAL = Upcycling(experts=8, active=8, reinit=0.0, router_std=0.0)


@pytest.fixture(scope="module")
def dense() -> Model:
    return tiny_model()


@torch.no_grad()
def logits(model: Model) -> torch.Tensor:
    count = len(TOKENS)
    return model.network.logits(model.network(TOKENS, packed_attend(model.config, torch.arange(count), (count,))))


@pytest.mark.parametrize(
    ("expert_ffn", "shared_ffn"),
    [
        (32, 128),  # two whole copies
        (16, 128),  # one
        (48, 128),  # experts straddle copies of 128
        (27, 128),  # the last copy is cut: neurons differ in how often they occur
        (48, 40),  # a shared expert narrower than the dense part
        (48, 300),  # and a wider one
        (8, 128),  # half of the neurons are in the shared expert alone
    ],
)
@pytest.mark.parametrize("norm_topk", [False, True])
def test_all_experts_active_and_nothing_drawn_anew_is_the_dense_model(dense: Model, expert_ffn: int, shared_ffn: int, norm_topk: bool):
    mixture = upcycle(dense, replace(EQUAL, expert_ffn=expert_ffn, shared_ffn=shared_ffn, norm_topk=norm_topk))
    assert mixture.config.moe is not None
    torch.testing.assert_close(logits(mixture), logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_any_share_of_the_shared_expert(dense: Model, share: float):
    mixture = upcycle(dense, replace(EQUAL, expert_ffn=27, shared_share=share))
    torch.testing.assert_close(logits(mixture), logits(dense), rtol=1e-4, atol=1e-4)


def test_with_some_experts_active_the_scales_hold_on_average(dense: Model):
    """Over all choices of A of E experts: the mean of the routed output is the dense part's, whatever the widths."""
    moe = replace(EQUAL, active=3, expert_ffn=27).config(dense.config).moe
    assert moe is not None
    generator = torch.Generator().manual_seed(0)
    routed, shared = slots(128, 8 * 27, generator), slots(128, 128, generator)
    scale_routed, scale_shared = neuron_scales(routed, shared, 128, moe, 0.4)
    chosen_share, weight = 3 / 8, 1 / 8
    routed_sum = torch.zeros(128).index_add(0, routed, scale_routed) * chosen_share * weight
    shared_sum = torch.zeros(128).index_add(0, shared, scale_shared) * 0.5
    torch.testing.assert_close(routed_sum + shared_sum, torch.ones(128))
    torch.testing.assert_close(shared_sum, torch.full((128,), 0.4))


def test_the_copies_are_shuffled_whole_and_laid_end_to_end():
    places = slots(10, 27, torch.Generator().manual_seed(0))
    assert sorted(places[:10].tolist()) == sorted(places[10:20].tolist()) == list(range(10))
    assert places[:10].tolist() != places[10:20].tolist()
    assert len(set(places[20:].tolist())) == 7


def test_one_permutation_for_gate_up_and_down(dense: Model):
    mixture = upcycle(dense, replace(EQUAL, expert_ffn=27, scale=False))
    old, new = dense.network.model.layers[1].mlp, mixture.network.model.layers[1].mlp
    rows = {tuple(row.tolist()): i for i, row in enumerate(old.gate_proj.weight)}
    seen = []
    for expert in range(8):
        gate, up = new.experts.gate_up_proj[expert].chunk(2)
        neurons = [rows[tuple(row.tolist())] for row in gate]
        assert torch.equal(up, old.up_proj.weight[neurons])
        assert torch.equal(new.experts.down_proj[expert], old.down_proj.weight[:, neurons])
        seen += neurons
    assert sorted(seen[:128]) == list(range(128))  # 8 x 27 places: one copy whole, of the other 40 discarded
    assert len(set(seen[128:])) == 88


def test_half_of_each_expert_is_drawn_anew(dense: Model):
    kept = upcycle(dense, Upcycling(experts=8, active=4, reinit=0.0)).network.model.layers[0].mlp
    half = upcycle(dense, Upcycling(experts=8, active=4, reinit=0.5)).network.model.layers[0].mlp
    for before, after in ((kept.experts.gate_up_proj, half.experts.gate_up_proj), (kept.experts.down_proj, half.experts.down_proj)):
        assert before.shape == after.shape
    # the generator goes on differently, so equality is counted against the dense rows
    dense_rows = dense.network.model.layers[0].mlp.gate_proj.weight
    for expert in half.experts.gate_up_proj:
        gate = expert.chunk(2)[0]
        equal = (gate[:, None, :] == dense_rows[None]).sum(-1).max(1).values.sum()
        assert int(equal) == gate.numel() // 2
    assert 0.5 < half.experts.gate_up_proj.detach().std() / kept.experts.gate_up_proj.detach().std() < 1.5
    assert torch.equal(half.shared_expert.gate_proj.weight.sort(0).values, kept.shared_expert.gate_proj.weight.sort(0).values)


def test_whole_neurons_can_be_drawn_anew(dense: Model):
    mixture = upcycle(dense, Upcycling(experts=8, active=4, unit="neuron", reinit=0.25, reinit_std=0.0, scale=False))
    for expert in range(8):
        gate, up = mixture.network.model.layers[0].mlp.experts.gate_up_proj[expert].chunk(2)
        down = mixture.network.model.layers[0].mlp.experts.down_proj[expert]
        gone = (gate == 0).all(1)
        assert int(gone.sum()) == 8
        assert torch.equal(gone, (up == 0).all(1))
        assert torch.equal(gone, (down == 0).all(0))


def test_the_seed_decides(dense: Model):
    def weights(seed: int) -> torch.Tensor:
        return upcycle(dense, Upcycling(seed=seed)).network.model.layers[0].mlp.experts.down_proj

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_the_dense_model_stays_as_it_was(dense: Model):
    before = {name: tensor.clone() for name, tensor in dense.network.named_parameters()}
    mixture = upcycle(dense, Upcycling())
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.network.named_parameters())
    assert mixture.network.model.embed_tokens.weight.data_ptr() == dense.network.model.embed_tokens.weight.data_ptr()
    assert dense.config.moe is None


def test_transformers_computes_the_same(dense: Model, tmp_path: Path):
    from transformers import Qwen2MoeForCausalLM

    mixture = upcycle(dense, Upcycling(experts=6, active=2))
    to_hf_folder(mixture, tmp_path / "mixture")
    theirs = Qwen2MoeForCausalLM.from_pretrained(tmp_path / "mixture", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
    torch.testing.assert_close(logits(load(tmp_path / "mixture")), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(mixture), expected, rtol=1e-4, atol=1e-4)


def test_widths_left_open_follow_from_the_dense_model():
    config = Upcycling(experts=16, active=4).config(tiny(ffn=130))
    assert config.moe is not None
    assert (config.moe.expert_ffn, config.moe.shared_ffn) == (32, 130)
    assert config.hidden == tiny().hidden


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reinit": 1.5}, "reinit 1.5: must be between 0 and 1"),
        ({"reinit": float("nan")}, "reinit nan"),
        ({"shared_share": -0.1}, "shared_share -0.1"),
        ({"unit": "row"}, "unit 'row'"),
        ({"router_std": -1.0}, "router_std -1.0"),
        ({"active": 0}, "active 0: must be at least 1"),
        ({"aux_coef": float("nan")}, "aux_coef nan: must be 0 or above, and finite"),
        ({"active": 20}, "20 active experts of 16"),
        ({"expert_ffn": 2, "shared_ffn": 64}, "neither holds the dense part's 128 neurons"),
        ({"experts": 0}, "experts 0: must be a whole number above 0"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, object], message: str, dense: Model):
    with pytest.raises(ValueError, match=message):
        upcycle(dense, Upcycling(**change))


def test_a_mixture_is_not_upcycled_again(dense: Model):
    with pytest.raises(ValueError, match="a mixture of 16 experts already"):
        upcycle(upcycle(dense, Upcycling()), Upcycling())


def test_the_verb(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "mixture"
    words = ["upcycle", str(tiny_folder), str(out), "--experts", "8", "--active", "2", "--expert-ffn", "24", "--shared-ffn", "96"]
    assert main([*words, "--reinit", "0", "--seed", "5"]) == 0
    said = capsys.readouterr()
    assert "active for a token" in said.out
    assert said.err == ""
    moe = load(out).config.moe
    assert moe is not None
    assert (moe.experts, moe.active, moe.expert_ffn, moe.shared_ffn) == (8, 2, 24, 96)
    assert main(words) == 1
    assert capsys.readouterr().err == f"qwen2: {out}: exists already; name a new folder\n"
    assert main(["upcycle", str(out), str(tmp_path / "again")]) == 1
    assert "a mixture of 8 experts already" in capsys.readouterr().err
