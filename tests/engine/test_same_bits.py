"""Same request, same bits: the kernels' whole path, for every shape of the family, in small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen2 import LLM, SamplingParams, kernels
from qwen2.config import ModelConfig, tiny
from qwen2.weights.export import to_gguf, to_hf_folder
from tests.conftest import tiny_model
from tests.kernels.conftest import NEEDS

pytestmark = pytest.mark.skipif(kernels.isa() is None, reason="this installation has no kernels for this processor")
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, repetition_penalty=1.2)


@pytest.fixture(params=["float32", "Q8_0"])
def path(shape: ModelConfig, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    model = tiny_model(shape)
    if request.param == "float32" or len({shape.is_moe(layer) for layer in range(shape.layers)}) > 1:  # GGUF knows no mixed layers
        to_hf_folder(model, tmp_path / "model")
        return tmp_path / "model"
    to_gguf(model, tmp_path / "model.gguf", "Q8_0")
    return tmp_path / "model.gguf"


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 500, (length,), generator=generator).tolist()
        for length in (1, 2, 63, 64, 65, 100, 31, 8, 90, 5, 17, 40, 3, 70, 99, 12)
    ]


@pytest.mark.parametrize("cache_bits", [16, 8])
def test_alone_in_a_batch_in_pieces_and_after_others(path: Path, cache_bits: int):
    llm = LLM(path, cache_bits=cache_bits, threads=1)
    alone = [llm.logits(ids) for ids in prompts()]
    scores = [llm.score([ids])[0] for ids in prompts()]
    assert llm.score(prompts()) == scores  # to the last bit
    answers = [llm.generate([ids], GREEDY)[0].token_ids for ids in prompts()]
    assert [output.token_ids for output in llm.generate(prompts(), GREEDY)] == answers  # sixteen at once, and prefixes kept from before
    for threads, chunk in ((2, 512), (3, 7), (1, 1)):
        kernels.set_threads(threads)
        llm.engine.scheduler.chunk = chunk
        for ids, logits in zip(prompts(), alone, strict=True):
            assert torch.equal(llm.logits(ids), logits)


def test_layers_one_by_one_give_the_bits_of_all_in_one_call(path: Path):
    """The decoder's own loop, and its steps, are the oracle of the single native call."""
    llm = LLM(path, threads=2)
    network = llm.model.network
    ids = prompts()[5]
    together = llm.logits(ids)
    network.model.bound = False
    assert torch.equal(llm.logits(ids), together)


def test_a_prompt_whose_last_row_alone_is_finished_is_answered_alike(path: Path):
    """Of a prompt the last layer finishes one row, and none of a chunk that does not end it; answers and their logits stay the same."""
    llm = LLM(path, threads=2)
    llm.engine.scheduler.chunk = 30
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)
    together = llm.generate(prompts(), params)
    alone = [llm.generate([ids], params)[0] for ids in prompts()]
    llm.model.network.model.bound = False
    step_by_step = [llm.generate([ids], params)[0] for ids in prompts()]
    for outputs in (alone, step_by_step):
        assert [(o.token_ids, o.logprobs) for o in outputs] == [(o.token_ids, o.logprobs) for o in together]


@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon"])
@pytest.mark.parametrize("cache_bits", [16, 8])
def test_a_history_of_several_spans(tmp_path: Path, isa: str, cache_bits: int):
    """More than 1,024 keys, so that spans are merged: in one piece, in pieces, and token by token at the end; on every set here."""
    if not NEEDS[isa] <= kernels.features():
        pytest.skip(f"this processor has no {isa}")
    to_gguf(tiny_model(tiny(context=2048)), tmp_path / "model.gguf", "Q8_0")
    ids = torch.randint(0, 500, (1100,), generator=torch.Generator().manual_seed(1)).tolist()
    try:
        llm = LLM(tmp_path / "model.gguf", threads=2, isa=isa, cache_bits=cache_bits)
        whole = llm.logits(ids)
        for chunk in (512, 77):
            llm.engine.scheduler.chunk = chunk
            assert torch.equal(llm.logits(ids), whole)
        llm.engine.scheduler.chunk = 512
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, repetition_penalty=1.0)
        written = llm.generate([ids[:1000]], params)[0].token_ids  # goes over the end of the first span one by one
        again = llm.logits([*ids[:1000], *written])[999:-1].argmax(-1)
        assert tuple(again.tolist()) == tuple(written)
    finally:
        kernels.select_isa(None)


def test_forks_share_full_blocks_and_go_their_own_ways(path: Path):
    llm, few = LLM(path, threads=1), LLM(path, threads=1, max_batch=2)
    ids = prompts()[5]  # a full block, which the samples share, and a part of one, which they copy
    params = SamplingParams(temperature=1.0, seed=1, n=4, max_tokens=28, ignore_eos=True, logprobs=3)
    samples, one_by_one = (each.generate([ids], params)[0] for each in (llm, few))  # there most wait for a place, and read its end again
    for ours, theirs in zip(one_by_one.choices, samples.choices, strict=True):
        assert (ours.token_ids, ours.logprobs) == (theirs.token_ids, theirs.logprobs)
    few.engine.check()
    assert len({samples.token_ids, *(other.token_ids for other in samples.others)}) == 4
    for index, output in enumerate((samples, *samples.others)):
        params = SamplingParams(temperature=1.0, seed=1 + index, max_tokens=28, ignore_eos=True)
        assert LLM(path, threads=1).generate([ids], params)[0].token_ids == output.token_ids
    llm.engine.check()
