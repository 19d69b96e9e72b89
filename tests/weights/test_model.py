"""Loading: what is wrong with a folder or a file is said in one line; Llama files load as Qwen2 and equal transformers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen2.config import ModelConfig
from qwen2.model import Qwen2, packed_attend
from qwen2.weights.describe import describe
from qwen2.weights.export import to_gguf
from qwen2.weights.model import load
from tests.conftest import tiny_model

TOKENS = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(4))
Tensors = dict[str, torch.Tensor]


def logits(network: Qwen2, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return network.logits(network(tokens, packed_attend(network.config, torch.arange(len(tokens)), [len(tokens)])))


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(source: Path, kind: type[Exception] = ValueError, **options: Any) -> str:
    with pytest.raises(kind) as error:
        load(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_of_the_wanted_type_stay_mapped(folder: Path):
    model = load(folder)
    before = model.network.lm_head.weight[0, 0].item()
    if sys.platform == "linux":
        assert str(folder / "model.safetensors") in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        model.network.lm_head.weight[0, 0] = before + 1
    assert load(folder).network.lm_head.weight[0, 0].item() == before  # the mapping is private: the file is as it was


def test_a_missing_tensor_is_named(folder: Path):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    expected = "tensor model.layers.1.mlp.up_proj.weight is missing; the checkpoint is incomplete or its config.json is another model's"
    assert refused(folder) == f"{folder}: {expected}"


def test_a_missing_bias_is_not_taken_for_zero(folder: Path):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.bias"))
    assert "tensor model.layers.0.self_attn.k_proj.bias is missing" in refused(folder)


def test_not_even_all_biases_may_be_missing(folder: Path):
    def without(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("bias")]:
            del tensors[name]

    edit_tensors(folder, without)
    assert "tensor model.layers.0.self_attn.q_proj.bias is missing" in refused(folder)


def test_a_config_of_more_layers_than_there_are_costs_nothing(folder: Path):
    edit_config(folder, num_hidden_layers=2**40)
    assert refused(folder) == f"{folder}: config.json: num_hidden_layers is {2**40}, the checkpoint holds 2"


def test_a_config_of_more_experts_than_there_are_costs_nothing(tmp_path: Path):
    from qwen2.config import MoEConfig, tiny
    from qwen2.weights.export import to_hf_folder

    to_hf_folder(tiny_model(tiny(moe=MoEConfig(4, 2, 32, 64))), tmp_path / "moe")
    edit_config(tmp_path / "moe", num_experts=10**9)
    assert refused(tmp_path / "moe") == f"{tmp_path / 'moe'}: config.json: num_experts is 1000000000, the checkpoint holds 4"


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_a_type_that_weights_do_not_have_is_refused(dtype: torch.dtype, name: str, folder: Path):
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].to(dtype)}))
    expected = f"model.norm.weight is of type {name}, not one of F32, F16, BF16: quantized weights come as GGUF"
    assert refused(folder) == f"{folder / 'model.safetensors'}: {expected}"


def test_an_end_token_beyond_the_vocabulary_is_refused(folder: Path):
    edit_config(folder, eos_token_id=99999)
    assert refused(folder) == f"{folder}: the end token 99999 is beyond the embedding's 512 rows"


def test_a_wrong_shape_is_named(folder: Path):
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    assert refused(folder) == f"{folder / 'model.safetensors'}: model.norm.weight has shape [63], the config asks for [64]"


def test_an_unknown_tensor_is_named(folder: Path):
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    expected = "1 tensors that this architecture does not have: model.layers.0.self_attn.q_norm.weight"
    assert refused(folder) == f"{folder}: {expected}"


def test_a_trained_head_is_not_lost_to_tying(folder: Path):
    edit_config(folder, tie_word_embeddings=True)
    assert "config.json ties the output head to the embedding, but lm_head.weight differs from it" in refused(folder)
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert load(folder).network.lm_head is None


def test_config_and_folder_errors_name_the_file(folder: Path):
    edit_config(folder, sliding_windows=7)
    assert refused(folder).startswith(f"{folder}: config.json: sliding_windows: unknown key")
    (folder / "config.json").write_text('{"model_type": ')
    assert refused(folder).startswith(f"{folder / 'config.json'}: not valid JSON: ")
    (folder / "config.json").write_text("[" * 100_000)
    assert refused(folder).startswith(f"{folder / 'config.json'}: not valid JSON: ")
    (folder / "config.json").write_text("[]")
    assert refused(folder) == f"{folder / 'config.json'}: holds no JSON object"
    (folder / "config.json").unlink()
    assert "config.json: missing; a Hugging Face folder has it beside the weights" in refused(folder, FileNotFoundError)


def test_a_tokenizer_of_another_model_is_refused(folder: Path):
    edit_config(folder, vocab_size=500)
    assert refused(folder) == f"{folder}: the tokenizer has ids up to 511, the embedding only 500 rows"
    with pytest.raises(ValueError, match=r"the tokenizer has ids up to 511, the embedding only 500 rows$"):
        describe(folder)


def test_a_gguf_with_more_tokens_than_rows_is_refused_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "short.gguf"
    to_gguf(tiny_model(), path)
    from_gguf = ModelConfig.from_gguf
    monkeypatch.setattr(ModelConfig, "from_gguf", lambda *given: replace(from_gguf(*given), vocab=500))
    with pytest.raises(ValueError, match=r"short\.gguf: the tokenizer has ids up to 511, the embedding only 500 rows$") as shown:
        describe(path)
    assert refused(path) == str(shown.value)


def test_a_shard_that_the_index_names_is_missing_or_elsewhere(folder: Path):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = list(load_file(folder / "model-00001-of-00001.safetensors"))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    assert load(folder).name == "model"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00002-of-00002.safetensors")}))
    assert "named by model.safetensors.index.json, but not there; download it again" in refused(folder, FileNotFoundError)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../../outside.safetensors")}))
    assert "'../../outside.safetensors' is not the name of a file beside it" in refused(folder)
    for broken in ("{}", "[1]", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}', "nonsense"):
        index.write_text(broken)
        assert refused(folder).startswith(f"{index}: ")


def test_pickled_weights_are_not_read(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refused(folder, FileNotFoundError) == f"{folder}: neither model.safetensors nor model.safetensors.index.json is there"


def test_types_and_devices(tiny_folder: Path):
    assert refused(tiny_folder, dtype="int4") == "dtype 'int4': must be auto, float32, bfloat16, float16"
    assert "dtype 'float16' on a CPU: Qwen2's large key biases overflow it" in refused(tiny_folder, dtype="float16")
    assert refused(tiny_folder, device="tpu9x") == "device 'tpu9x' is not known to torch; use cpu, cuda or cuda:N"
    assert load(tiny_folder, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_without_a_device_fails_and_does_not_fall_back(tiny_folder: Path):
    assert "finds no CUDA device here; leave --device out to run on the CPU" in refused(tiny_folder, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_logits(tiny_folder: Path):
    here, there = load(tiny_folder), load(tiny_folder, device="cuda")
    network, tokens = there.network, TOKENS.cuda()
    with torch.no_grad():
        theirs = network.logits(network(tokens, packed_attend(network.config, torch.arange(len(tokens)).cuda(), [len(tokens)])))
    torch.testing.assert_close(theirs.cpu(), logits(here.network), rtol=1e-3, atol=1e-3)


def test_a_llama_folder_loads_with_zero_biases(tmp_path: Path, tiny_folder: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = LlamaForCausalLM(
        LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=512, eos_token_id=511, bos_token_id=509)
    ).eval()
    theirs.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / file, tmp_path / file)
    ours = load(tmp_path)
    assert all(bool((layer.self_attn.k_proj.bias == 0).all()) for layer in ours.network.model.layers)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours.network), theirs(TOKENS[None]).logits[0], rtol=1e-4, atol=1e-4)


def test_the_real_llama_gguf_equals_transformers_own_loader(smollm: Path):
    """SmolLM2, Q4_1: q and k rows put back in order, the embedding tied."""
    ours = load(smollm)
    theirs = AutoModelForCausalLM.from_pretrained(smollm.parent, gguf_file=smollm.name, dtype=torch.float32).eval()
    tokens = torch.tensor(ours.template.render([{"role": "user", "content": "Name three colours."}]).ids)
    with torch.no_grad():
        difference = logits(ours.network, tokens) - theirs(tokens[None]).logits[0]
    assert difference.abs().max() < 2e-3


def test_a_gguf_that_lacks_a_tensor_or_has_one_too_many_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from qwen2.weights import export

    whole = export.gguf_tensors

    def lacking(*args: Any) -> Any:
        tensors, notes = whole(*args)
        return [tensor for tensor in tensors if tensor.name != "blk.1.ffn_up.weight"], notes

    monkeypatch.setattr(export, "gguf_tensors", lacking)
    to_gguf(tiny_model(), tmp_path / "short.gguf", "F32")
    assert "blk.1.ffn_up.weight" in refused(tmp_path / "short.gguf")
