"""Counts to the unit, and the refusals of numbers that do not fit together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen2.config import FAMILY, DualChunkConfig, ModelConfig, MoEConfig, RopeScaling, nano, published_generation, tiny
from qwen2.model import Qwen2
from tests.conftest import SHAPES

# Derived from the published shapes; the blog and the report print the same after rounding.
COUNTS = {  # total, non-embedding, embedding matrix, active, cache bytes a token in bf16
    "qwen2:0.5b": (494_032_768, 357_898_112, 136_134_656, 494_032_768, 12_288),
    "qwen2:1.5b": (1_543_714_304, 1_310_340_608, 233_373_696, 1_543_714_304, 28_672),
    "qwen2:7b": (7_615_616_512, 6_525_621_760, 544_997_376, 7_615_616_512, 57_344),
    "qwen2:57b-a14b": (57_408_658_944, 56_319_581_696, 544_538_624, 14_249_270_784, 57_344),
    "qwen2:72b": (72_706_203_648, 70_214_787_072, 1_245_708_288, 72_706_203_648, 327_680),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_equal_the_published_ones(name: str):
    for release in (FAMILY[name], FAMILY[f"{name}-base"]):
        c = release.config
        counts = (c.parameters(), c.non_embedding_parameters(), c.embedding_parameters(), c.active_parameters(), c.cache_bytes_per_token())
        assert counts == COUNTS[name]


def test_counts_equal_what_the_network_allocates(shape: ModelConfig):
    with torch.device("meta"):
        network = Qwen2(shape)
    assert sum(parameter.numel() for parameter in network.parameters()) == shape.parameters()


@pytest.mark.parametrize("name", COUNTS)
def test_every_size_builds_without_memory(name: str):
    network = Qwen2(FAMILY[name].config, device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == COUNTS[name][0]


def test_flops_equal_a_count_over_the_matrices():
    c = tiny()
    matrices = c.layers * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 512 * 64
    assert c.flops_per_token() == 2 * matrices + 4 * c.layers * 64
    assert c.flops_per_token(position=99) - c.flops_per_token() == 4 * c.layers * 64 * 99
    assert c.flops_per_token(head=False) == c.flops_per_token() - 2 * 512 * 64


def test_flops_count_active_experts_only():
    c = SHAPES["moe"]
    assert c.moe is not None
    more = tiny(moe=MoEConfig(experts=16, active=2, expert_ffn=32, shared_ffn=96))
    assert more.flops_per_token() - c.flops_per_token() == 2 * c.layers * 8 * c.hidden  # the router's 8 more rows, nothing else


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers 0: must be a whole number above 0"),
        ({"vocab": 1.5}, "vocab 1.5: must be a whole number above 0"),
        ({"heads": 5}, "hidden size 64 over 5 heads: the head size must be a whole even number"),
        ({"kv_heads": 3}, "4 heads over 3 key-value heads: each must serve the same number of heads"),
        ({"dtype": "int8"}, "dtype 'int8': must be one of float32, bfloat16, float16"),
        ({"norm_eps": 0.0}, "rope_theta 1000000.0 and rms_norm_eps 0.0 must be above 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValueError) as error:
        tiny(**changes)
    assert str(error.value) == message


def test_parts_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="9 active experts of 8: at most all of them can be active"):
        MoEConfig(8, 9, 32, 32)
    with pytest.raises(ValueError, match=r"rope scaling factor 0.5: YaRN stretches, so it must be at least 1"):
        RopeScaling(0.5, 32768)
    with pytest.raises(ValueError, match="local_size 8 must lie between 0 and chunk_size 8"):
        DualChunkConfig(8, 8)


def test_window_is_what_the_model_can_attend_over():
    assert tiny().window == 512
    assert tiny(context=32, rope_scaling=RopeScaling(4.0, 32)).window == 128  # the model card's snippet leaves the context at 32K
    assert tiny(context=1000, dual_chunk=DualChunkConfig(256, 64)).window == 192
    assert nano().window == 2048
    assert nano(dtype="bfloat16", layers=2).dtype == "bfloat16"


def test_published_defaults_are_found_by_the_whole_shape():
    seven = FAMILY["qwen2:7b"].config
    assert published_generation(seven) == FAMILY["qwen2:7b"].generation
    assert published_generation(FAMILY["qwen2:7b-base"].config) == FAMILY["qwen2:7b-base"].generation
    for stranger in (replace(seven, rope_theta=10_000.0), replace(seven, ffn=18_000), tiny()):
        assert published_generation(stranger) is None
    three = replace(seven, layers=36, hidden=2048, heads=16, kv_heads=2, ffn=11008)  # Qwen2.5-3B
    assert published_generation(three) == FAMILY["qwen2:7b"].generation


def test_moe_layers():
    c = tiny(layers=6, moe=MoEConfig(4, 2, 32, 32, sparse_step=2, dense_layers=(3,)))
    assert [c.is_moe(layer) for layer in range(6)] == [False, True, False, False, False, True]
