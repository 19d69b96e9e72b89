"""GGUF metadata <-> ModelConfig: round trips, the keys that real files hold, and each refusal with its exact message."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from typing import Any

import pytest

from qwen2.config import FAMILY, ModelConfig, MoEConfig, RopeScaling
from qwen2.config.gguf import config_from_gguf, config_to_gguf, gguf_shapes

DENSE = ModelConfig(vocab=64, layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, context=512)
MOE = replace(DENSE, moe=MoEConfig(experts=4, active=2, expert_ffn=8, shared_ffn=24))
IDS = {"tokenizer.ggml.bos_token_id": 151643, "tokenizer.ggml.eos_token_id": 151645}


def header(config: ModelConfig) -> dict[str, Any]:
    return config_to_gguf(config, "a model") | IDS


@pytest.mark.parametrize(
    "config",
    [
        DENSE,
        replace(DENSE, tied=True, norm_eps=1e-5, rope_theta=12345.678),
        replace(DENSE, rope_scaling=RopeScaling(4.0, 128)),
        replace(DENSE, rope_scaling=RopeScaling(2.5, 100, beta_fast=16.0, beta_slow=2.0)),
        MOE,
        replace(MOE, moe=replace(MOE.moe, norm_topk=True), rope_scaling=RopeScaling(4.0, 128)),
    ],
)
def test_what_is_written_is_read_back(config: ModelConfig) -> None:
    metadata = header(config)
    as_stored = {  # floats lose what FLOAT32 does not hold
        key: struct.unpack("<f", struct.pack("<f", value))[0] if isinstance(value, float) else value for key, value in metadata.items()
    }
    assert config_from_gguf(as_stored, gguf_shapes(config)) == config


def test_an_attention_factor_is_stored_relative_to_the_paper_s() -> None:
    config = replace(DENSE, rope_scaling=RopeScaling(4.0, 128, attention_factor=1.5))
    metadata = header(config)
    assert metadata["qwen2.rope.scaling.attn_factor"] == pytest.approx(1.5 / (0.1 * math.log(4) + 1))
    scaling = config_from_gguf(metadata, gguf_shapes(config)).rope_scaling
    assert scaling is not None
    assert scaling.attention_scale == pytest.approx(1.5)


@pytest.mark.parametrize("name", ["qwen2:0.5b", "qwen2:7b-base", "qwen2:57b-a14b", "qwen2:72b"])
def test_released_models_have_as_many_weights_in_their_tensors_as_counted(name: str) -> None:
    config = FAMILY[name].config
    assert sum(math.prod(shape) for shape in gguf_shapes(config).values()) == config.parameters()


def test_keys_of_llama_cpp_s_converter_are_read() -> None:
    """The keys of a real file: SmolLM2's, of the llama architecture, without biases, tied."""
    metadata = {
        "general.architecture": "llama", "general.name": "Smollm2 135M", "llama.block_count": 2, "llama.context_length": 8192,
        "llama.embedding_length": 32, "llama.feed_forward_length": 48, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.freq_base": 100000.0,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06, "llama.vocab_size": 64, "llama.rope.dimension_count": 8,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5, "quantize.imatrix.file": "x",
    }  # fmt: skip
    expected = replace(DENSE, context=8192, rope_theta=100000.0, norm_eps=1e-5, tied=True, bos=1, eos=(2, 5))
    assert config_from_gguf(metadata, gguf_shapes(expected, biases=False)) == expected
    assert config_from_gguf(metadata, gguf_shapes(expected, biases=True)) == expected


def test_the_first_qwen2moe_files_lack_expert_sizes() -> None:
    metadata = header(MOE)
    del metadata["qwen2moe.expert_feed_forward_length"], metadata["qwen2moe.expert_shared_feed_forward_length"]
    assert config_from_gguf(metadata, gguf_shapes(MOE)) == MOE


# case: changed metadata (None: removed), message
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"general.architecture": "gemma2"},
        "GGUF architecture 'gemma2' is not one this package runs: qwen2, qwen2moe, llama",
    ),
    "missing key": ({"qwen2.block_count": None}, "GGUF key qwen2.block_count is missing"),
    "type": ({"qwen2.block_count": "two"}, "GGUF key qwen2.block_count is 'two': must be a whole number"),
    "boolean": ({"qwen2.attention.head_count": True}, "GGUF key qwen2.attention.head_count is True: must be a whole number"),
    "not finite": ({"qwen2.rope.freq_base": float("inf")}, "GGUF key qwen2.rope.freq_base is inf: must be a finite number"),
    "unknown key": (
        {"qwen2.attention.sliding_window": 4096},
        "GGUF: unknown key qwen2.attention.sliding_window: what it would change is not known, so the model is not loaded",
    ),
    "fixed key": ({"qwen2.attention.causal": False}, "GGUF key qwen2.attention.causal is False: only True is supported"),
    "head size": ({"qwen2.attention.key_length": 16}, "GGUF key qwen2.attention.key_length is 16, and the rest of the file says 8"),
    "vocabulary": ({"qwen2.vocab_size": 65}, "GGUF key qwen2.vocab_size is 65, and the rest of the file says 64"),
    "scaling": (
        {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 2.0},
        "GGUF key qwen2.rope.scaling.type 'linear' is not supported; Qwen2 uses 'yarn' or none",
    ),
    "factor without type": (
        {"qwen2.rope.scaling.factor": 2.0},
        "GGUF key qwen2.rope.scaling.type is missing, and rope.scaling.factor is set",
    ),
    "a billion layers": (
        {"qwen2.block_count": 10**9},
        "GGUF key qwen2.block_count is 1000000000, and the file holds tensors of 2 layers",
    ),
    "fewer layers": (
        {"qwen2.block_count": 1},
        "GGUF: tensor blk.1.attn_norm.weight is not part of a qwen2 model of 1 layers; what it changes is not known",
    ),
    "ffn": ({"qwen2.feed_forward_length": 64}, "GGUF: tensor blk.0.ffn_gate.weight has shape (48, 32), and the metadata say (64, 32)"),
    "kv heads": (
        {"qwen2.attention.head_count_kv": 4},
        "GGUF: tensor blk.0.attn_k.weight has shape (16, 32), and the metadata say (32, 32)",
    ),
    "hidden": ({"qwen2.embedding_length": 64}, "GGUF: tensor token_embd.weight has shape (64, 32), and the metadata say (64, 64)"),
    "token id": ({"tokenizer.ggml.eos_token_id": "x"}, "GGUF key tokenizer.ggml.eos_token_id is 'x': must be a whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_metadata(case: str) -> None:
    changes, message = REFUSED[case]
    metadata = {key: value for key, value in (header(DENSE) | changes).items() if value is not None}
    with pytest.raises(ValueError) as error:
        config_from_gguf(metadata, gguf_shapes(DENSE))
    assert str(error.value) == message


# case: changed shapes (None: removed), message
TENSORS: dict[str, tuple[dict[str, tuple[int, ...] | None], str]] = {
    "no embedding": (
        {"token_embd.weight": None},
        "GGUF: there is no matrix token_embd.weight, the embedding; the file is incomplete or holds no language model",
    ),
    "missing": (
        {"blk.1.attn_v.bias": None},
        "GGUF: tensor blk.1.attn_v.bias (16,) is missing; the file is incomplete, download it again",
    ),
    "shape": ({"output_norm.weight": (33,)}, "GGUF: tensor output_norm.weight has shape (33,), and the metadata say (32,)"),
    "head": ({"output.weight": (63, 32)}, "GGUF: tensor output.weight has shape (63, 32), and the metadata say (64, 32)"),
    "unknown": (
        {"blk.0.attn_sinks.weight": (4,)},
        "GGUF: tensor blk.0.attn_sinks.weight is not part of a qwen2 model of 2 layers; what it changes is not known",
    ),
    "rope factors": (
        {"rope_freqs.weight": (4,)},
        "GGUF: tensor rope_freqs.weight scales the rotary embedding (Llama 3.1 and later), which is not supported",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_refused_tensors(case: str) -> None:
    changes, message = TENSORS[case]
    shapes = {name: shape for name, shape in (gguf_shapes(DENSE) | changes).items() if shape is not None}
    with pytest.raises(ValueError) as error:
        config_from_gguf(header(DENSE), shapes)
    assert str(error.value) == message


def test_yarn_in_a_llama_file_is_refused() -> None:
    metadata = {key.replace("qwen2.", "llama."): value for key, value in header(replace(DENSE, rope_scaling=RopeScaling(4.0, 128))).items()}
    with pytest.raises(ValueError, match=r"GGUF key llama.rope.scaling.type 'yarn' is not supported"):
        config_from_gguf(metadata | {"general.architecture": "llama"}, gguf_shapes(DENSE))


def test_what_gguf_cannot_say_is_not_written() -> None:
    with pytest.raises(ValueError, match="dense layers"):
        config_to_gguf(replace(MOE, moe=replace(MOE.moe, sparse_step=2)), "")
    with pytest.raises(ValueError, match="truncate=False"):
        config_to_gguf(replace(DENSE, rope_scaling=RopeScaling(4.0, 128, truncate=False)), "")
