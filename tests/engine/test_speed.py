"""The counts behind the speeds: operations, bytes, tokens. That a clock was read is not tested."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest

from qwen2 import LLM, kernels
from qwen2.config import MoEConfig, tiny
from qwen2.engine.speed import Ceilings, measure_decode, measure_prefill, operations, prompt, weight_bytes
from qwen2.weights.export import to_hf_folder
from tests.conftest import tiny_model

MOE = MoEConfig(experts=8, active=2, expert_ffn=32, shared_ffn=64)


def test_a_prompt_s_operations_are_the_sum_of_its_tokens() -> None:
    llm = LLM(tiny_model(), guesses=0)
    config = llm.model.config
    each = [config.flops_per_token(position, head=position == 36) for position in range(37)]
    assert operations(llm, 37) == sum(each)


def test_a_prefill_reads_what_was_asked_for_and_keeps_nothing() -> None:
    llm = LLM(tiny_model(), guesses=0)
    done = measure_prefill(llm, 20, Random(0))
    assert (done.tokens, done.operations) == (20, operations(llm, 20))
    assert done.seconds > 0
    assert not llm.engine.cache.idle


@pytest.mark.parametrize("streams", [1, 3])
def test_a_decode_counts_its_steps_and_bytes(streams: int) -> None:
    llm = LLM(tiny_model(), guesses=0)
    done = measure_decode(llm, 10, streams, 6, Random(0))
    assert (done.streams, done.steps) == (streams, 6)
    per_step = weight_bytes(llm, streams) + streams * llm.engine.runner.token_bytes * (10 + 3)
    assert done.nbytes == 6 * per_step
    assert 0 <= done.outside <= 1
    assert done.rate == streams * 6 / done.seconds
    llm.engine.check()


def test_prompts_differ() -> None:
    llm, random = LLM(tiny_model()), Random(0)
    assert prompt(llm, 30, random) != prompt(llm, 30, random)


@pytest.mark.skipif(kernels.isa() is None, reason="no kernels for this processor")
def test_of_experts_only_the_chosen_ones_count(tmp_path: Path) -> None:
    to_hf_folder(tiny_model(tiny(moe=MOE)), tmp_path / "moe")
    llm = LLM(tmp_path / "moe")
    whole = llm.model.network.weight_bytes()
    one, many = weight_bytes(llm, 1), weight_bytes(llm, 200)
    experts = sum(m.nbytes for layer in llm.model.network.model.layers for m in layer.mlp.experts.packed_matrices())
    assert one == pytest.approx(whole - experts * 6 / 8)
    assert one < many == pytest.approx(whole)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon"])
def test_ceilings_count_what_they_do(isa: str) -> None:
    native = kernels.library()
    if native is None or native.qwen2_select_isa(isa.encode()) != 0:
        pytest.skip(f"no {isa} here")
    try:
        kernels.set_threads(2)
        sums = {"avx512": 16, "avx2": 8, "neon": 16}[isa]
        assert native.qwen2_multiply_bytes(10) == 10 * 2 * sums * 4 * native.qwen2_lanes() * 2
        assert native.qwen2_multiply_floats(10) == 10 * 2 * sums * native.qwen2_lanes() * 2
        memory = np.ones(3 * (1 << 18) + 77, dtype=np.uint8)  # stretches, the last one short and no whole vectors
        assert native.qwen2_read(memory.ctypes.data, memory.nbytes) == 0
        assert native.qwen2_read(memory.ctypes.data, 0) == 0
    finally:
        kernels.select_isa(None)
        kernels.set_threads(1)


@pytest.mark.skipif(kernels.isa() is None, reason="no kernels for this processor")
def test_the_ceiling_is_the_median_of_its_reads() -> None:
    ceilings = Ceilings([3.0, 1.0, 2.0])
    assert ceilings.read == 2.0
