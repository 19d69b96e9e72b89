"""Adapters that are served unmerged: the same bits alone and in a batch of several and of none, and the merged model's logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2 import LLM, SamplingParams, kernels
from qwen2.config import ModelConfig, MoEConfig, tiny
from qwen2.engine.draft import MOST_DRAFTED
from qwen2.kernels.matrix import Arena, Matrix
from qwen2.model import packed_attend
from qwen2.model.adapted import _packed
from qwen2.model.lora import merge
from qwen2.weights.adapter import load_adapter
from qwen2.weights.export import to_gguf, to_hf_folder
from qwen2.weights.model import load
from tests.conftest import random_adapter, tiny_model
from tests.kernels.conftest import NEEDS

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, repetition_penalty=1.2)
MOE = tiny(moe=MoEConfig(experts=4, active=2, expert_ffn=32, shared_ffn=96))
KINDS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "tied": (tiny(tied=True), {}),
    "rslora-attention": (tiny(), {"rslora": True, "targets": "attention", "rank": 20}),
    "dora": (tiny(tied=True), {"dora": True, "alpha": 4}),
    "head": (tiny(), {"targets": ("lm_head", "down_proj", "v_proj")}),
    "moe": (MOE, {"dora": True}),
}
natively = pytest.mark.skipif(kernels.isa() is None, reason="this installation has no kernels for this processor")


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 500, (length,), generator=generator).tolist() for length in (1, 65, 100, 8, 40, 3)]


def saved(config: ModelConfig, folder: Path, form: str) -> Path:
    model = tiny_model(config)
    if form == "float32":
        to_hf_folder(model, folder / "model")
        return folder / "model"
    to_gguf(model, folder / "model.gguf", form)
    return folder / "model.gguf"


def merged_logits(path: Path, adapter: Path, ids: list[int]) -> torch.Tensor:
    """By torch, of weights that the adapter was merged into: nothing of what serves adapters takes part."""
    network = load(path, dtype="float32").network
    load_adapter(network, adapter)
    merge(network)
    with torch.no_grad():
        return network.logits(network(torch.tensor(ids), packed_attend(network.config, torch.arange(len(ids)), [len(ids)])))


@natively
@pytest.mark.parametrize(
    ("kind", "form"), [("tied", "Q8_0"), ("rslora-attention", "float32"), ("dora", "Q8_0"), ("head", "Q8_0"), ("moe", "float32")]
)
def test_same_bits_alone_and_beside_others(kind: str, form: str, tmp_path: Path):
    """Sixteen requests of three faces at once, prompts in pieces, threads, layers one by one: what each gets is what it gets alone."""
    config, changes = KINDS[kind]
    path = saved(config, tmp_path, form)
    adapters = [random_adapter(config, tmp_path / f"adapter{i}", seed=i, **changes) for i in (1, 2)]
    base = LLM(path, threads=1)
    untouched = [base.logits(ids) for ids in prompts()]
    faces = [base, *(base.beside(adapter=folder) for folder in adapters)]
    alone = [[face.logits(ids) for ids in prompts()] for face in faces]
    answers = [[face.generate([ids], GREEDY)[0] for ids in prompts()] for face in faces]
    assert all(torch.equal(a, b) for a, b in zip(alone[0], untouched, strict=True))
    assert not any(torch.equal(a[1], b[1]) for a, b in ((alone[0], alone[1]), (alone[1], alone[2])))
    for threads, chunk in ((2, 512), (3, 7)):
        kernels.set_threads(threads)
        base.engine.scheduler.chunk = chunk
        base.engine.clear_cache()
        order = [(f, i) for i in range(len(prompts())) for f in (1, 0, 2)]
        requests = [faces[f]._request(prompts()[i], replace(GREEDY, logprobs=2)) for f, i in order]
        found = {request.id: chunk.output for request, chunk in base.engine.run(requests) if chunk.output is not None}
        for request, (f, i) in zip(requests, order, strict=True):
            assert found[request.id].token_ids == answers[f][i].token_ids
        for face, logits in zip(faces, alone, strict=True):
            for ids, expected in zip(prompts(), logits, strict=True):
                assert torch.equal(face.logits(ids), expected)
        base.model.network.model.bound = False if chunk == 512 else None
    base.engine.check()


@natively
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_merged_weights(kind: str, tmp_path: Path):
    """By kernels and in torch, of float weights: torch's merged model, trained or exported, says the same."""
    config, changes = KINDS[kind]
    path, adapter = saved(config, tmp_path, "float32"), random_adapter(config, tmp_path / "adapter", **changes)
    ids = prompts()[2]
    expected = merged_logits(path, adapter, ids)
    scale = float(expected.abs().max())
    trained = load(path, dtype="float32").network
    load_adapter(trained, adapter)
    trained.requires_grad_(True)  # recording gradients, as in training
    in_training = trained.logits(trained(torch.tensor(ids), packed_attend(config, torch.arange(len(ids)), [len(ids)]))).detach()
    assert (LLM(path, adapter=adapter).logits(ids) - expected).abs().max() < 2e-3 * scale  # the cache's 16 bits
    assert (LLM(path).logits(ids) - expected).abs().max() > 0.05 * scale
    torch_alone = LLM(load(path, dtype="float32"), adapter=adapter)
    assert not torch_alone.engine.runner.native
    assert torch.allclose(torch_alone.logits(ids), expected, rtol=1e-5, atol=1e-5 * scale)
    assert torch.allclose(torch_alone.logits(ids), in_training, rtol=1e-5, atol=1e-5 * scale)


def test_several_in_one_batch_in_torch(tmp_path: Path, make_llm: Callable[..., LLM]):
    """Where there are no kernels: rows of two adapters and of none in one batch."""
    config = tiny(tied=True)
    base = make_llm(tiny_model(config))
    faces = [base, *(base.beside(adapter=random_adapter(config, tmp_path / f"{i}", seed=i, dora=i == 2)) for i in (1, 2))]
    alone = [[face.generate([ids], GREEDY)[0].token_ids for ids in prompts()[:5]] for face in faces]
    base.engine.clear_cache()
    requests = [face._request(ids, GREEDY) for ids in prompts()[:5] for face in faces]
    found = {request.id: chunk.output for request, chunk in base.engine.run(requests) if chunk.output is not None}
    together = [[found[request.id].token_ids for request in requests[f::3]] for f in range(3)]
    assert together == alone
    assert len({answer for face in alone for answer in face}) > 6


@natively
def test_texts_of_two_adapters_share_no_keys_and_those_of_one_do(tmp_path: Path):
    config = tiny(tied=True)
    path = saved(config, tmp_path, "Q8_0")
    one, two = (random_adapter(config, tmp_path / f"{i}", seed=i) for i in (1, 2))
    llm = LLM(path, keep_bytes=1 << 20)
    first, second, again = (llm.beside(adapter=folder) for folder in (one, two, one))
    assert first.adapter is again.adapter
    ids = prompts()[2]
    cached = [face.generate([ids], GREEDY)[0].usage.cached_tokens for face in (llm, first, second, again, llm)]
    assert cached == [0, 0, 0, len(ids) - 1, len(ids) - 1]
    copied = shutil.copytree(one, tmp_path / "elsewhere")
    assert llm.beside(adapter=copied).adapter is first.adapter


@natively
def test_after_giving_way_the_bits_are_the_same(tmp_path: Path):
    """A cache of a few blocks: answers of two adapters make each other read their texts anew."""
    config = tiny(tied=True, context=256)
    path = saved(config, tmp_path, "Q8_0")
    params = replace(GREEDY, max_tokens=100)
    roomy, tight = LLM(path), LLM(path, cache_bytes=LLM(path).engine.runner.memory.block_bytes * 6, guesses=0)
    folders = [random_adapter(config, tmp_path / f"{i}", seed=i) for i in (1, 2)]
    wanted = [roomy.beside(adapter=folder).generate(prompts()[i + 1 : i + 2], params)[0].token_ids for i, folder in enumerate(folders)]
    faces = [tight.beside(adapter=folder) for folder in folders]
    requests = [face._request(prompts()[i + 1], params) for i, face in enumerate(faces)]
    found = {request.id: chunk.output for request, chunk in tight.engine.run(requests) if chunk.output is not None}
    assert tight.engine.scheduler.preemptions > 0
    assert [found[request.id].token_ids for request in requests] == wanted


@natively
def test_guesses_scores_and_embeddings_are_the_adapters(tmp_path: Path):
    """What a text's repetitions or a smaller model guess is checked with the adapter; scores and embeddings are the adapted model's."""
    config = tiny()
    path, adapter = saved(config, tmp_path, "float32"), random_adapter(config, tmp_path / "a", targets=("lm_head", "q_proj", "down_proj"))
    plain, guessing = LLM(path, guesses=0, adapter=adapter), LLM(path, adapter=adapter, draft=tiny_packed(path))
    ids = [5, 6, 7, 8] * 8
    params = replace(GREEDY, max_tokens=60, repetition_penalty=1.0)
    assert guessing.generate([ids], params)[0].token_ids == plain.generate([ids], params)[0].token_ids
    assert guessing.engine.guessed > MOST_DRAFTED
    expected = merged_logits(path, adapter, ids).log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert torch.allclose(torch.tensor(plain.score([ids])[0][1:]), expected, atol=2e-2)
    told = plain.generate([ids], SamplingParams(max_tokens=0, prompt_logprobs=0))[0].prompt_logprobs
    assert told is not None
    assert [one.logprob for one in told[1:] if one is not None] == plain.score([ids])[0][1:]
    bare = LLM(path)
    assert not torch.allclose(torch.tensor(bare.score([ids])[0][1:]), expected, atol=0.2)
    assert (plain.embed([ids]) - bare.embed([ids])).abs().max() > 1e-2
    assert plain.continuations([(ids[:9], ids[9:12])])[0].tokens[0].logprob == plain.score([ids])[0][9]


def tiny_packed(path: Path) -> Any:
    return load(path, packed=True)


@natively
def test_memory_is_counted_and_given_back(tmp_path: Path):
    config = tiny(tied=True)
    llm = LLM(saved(config, tmp_path, "Q8_0"))
    before = llm.engine.weight_bytes
    face = llm.beside(adapter=random_adapter(config, tmp_path / "a", targets="q_proj", rank=16))
    assert face.adapter is not None
    rows = 64 + 64  # of A and of B, a multiple of every set's lanes: no row is added
    assert face.adapter.nbytes == config.layers * rows * 16 * 4
    assert llm.engine.weight_bytes == before + face.adapter.nbytes
    del face
    assert llm.engine.weight_bytes == before


@natively
def test_numbers_of_sixteen_bits_are_kept_as_such(tmp_path: Path):
    """An adapter saved in BF16 takes half the memory, and its products are those of the same numbers in F32."""
    config = tiny(tied=True)
    adapter = random_adapter(config, tmp_path / "a", rank=16, targets="q_proj")
    file = adapter / "adapter_model.safetensors"
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(rounded, file)
    llm = LLM(saved(config, tmp_path, "float32"), adapter=adapter)
    assert llm.adapter is not None
    assert llm.adapter.nbytes == config.layers * 128 * 16 * 2
    expected = merged_logits(tmp_path / "model", adapter, prompts()[3])
    assert torch.allclose(llm.logits(prompts()[3]), expected, atol=2e-3 * float(expected.abs().max()))


@natively
@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon"])
def test_matrices_are_laid_out_as_the_kernels_pack_them(isa: str):
    """For every set of kernels here, whichever is chosen meanwhile."""
    if not NEEDS[isa] <= kernels.features():
        pytest.skip("this processor has no such set")
    numbers = torch.randn(37, 20)
    with kernels.using(isa):
        ours, theirs = _packed(numbers, Arena(1 << 16)), Matrix.empty(0, 37, 20, Arena(1 << 16))
        theirs.pack(numbers.numpy().view("uint8").reshape(-1))
    assert ours.struct.lanes == theirs.struct.lanes == kernels.LANES[isa]
    assert (ours.packed == theirs.packed).all()


@natively
def test_weights_of_another_set_than_the_chosen_one_get_adapters_of_theirs(tmp_path: Path):
    config = tiny(tied=True)
    path, adapter = saved(config, tmp_path, "float32"), random_adapter(config, tmp_path / "a")
    expected = merged_logits(path, adapter, prompts()[3])
    for isa in (name for name in kernels.SETS if NEEDS[name] <= kernels.features()):
        llm = LLM(path, isa=isa)
        kernels.select_isa(None)
        assert torch.allclose(llm.beside(adapter=adapter).logits(prompts()[3]), expected, atol=2e-3 * float(expected.abs().max()))


def test_an_adapter_that_cannot_be_had_is_one_line(tmp_path: Path, make_llm: Callable[..., LLM]):
    llm = make_llm(tiny_model(tiny(tied=True)))
    wide = random_adapter(tiny(tied=True, hidden=128), tmp_path / "wide")
    deep = random_adapter(tiny(tied=True, layers=3), tmp_path / "deep")
    with pytest.raises(ValueError, match=r"wide: model\.layers\.0\S+: lora_\w is \[.*\], this model needs \[.*\]: the adapter"):
        llm.beside(adapter=wide)
    with pytest.raises(
        ValueError, match=r"deep: model\.layers\.2\.\S+: this model has no such layer; the adapter \(of tiny\) was made for an"
    ):
        LLM(tiny_model(tiny(tied=True)), adapter=deep)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: missing"):
        llm.beside(adapter=tmp_path / "nowhere")
    good = random_adapter(tiny(tied=True), tmp_path / "good")
    with pytest.raises(ValueError, match="tiny has one already"):
        LLM(replace(tiny_model(tiny(tied=True)), adapter=good), adapter=good)
    model = tiny_model(tiny(tied=True))
    load_adapter(model.network, good)
    with pytest.raises(ValueError, match="good: the model's own layers have adapters already"):
        LLM(model, adapter=good)
    config = json.loads((good / "adapter_config.json").read_text())
    (good / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(ValueError, match="IA3"):
        llm.beside(adapter=good)
