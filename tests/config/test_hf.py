"""config.json read strictly: published files, both spellings of rope scaling, round trips, and every refusal by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from qwen2.config import FAMILY, DualChunkConfig, ModelConfig, RopeScaling

PUBLISHED_05B: dict[str, Any] = {  # Qwen2-0.5B-Instruct, whole
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MOE_57B = PUBLISHED_05B | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "moe_intermediate_size": 2560,
    "norm_topk_prob": False,
    "num_attention_heads": 28,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 20480,
    "sliding_window": 65536,
    "tie_word_embeddings": False,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


def test_the_published_file_is_the_familys_row():
    assert ModelConfig.from_hf(PUBLISHED_05B) == FAMILY["qwen2:0.5b"].config
    assert ModelConfig.from_hf(MOE_57B) == FAMILY["qwen2:57b-a14b"].config


def test_to_hf_writes_the_published_file():
    written = FAMILY["qwen2:0.5b"].config.to_hf()
    assert written == {key: value for key, value in PUBLISHED_05B.items() if key != "transformers_version"}
    assert list(written) == sorted(written)


def test_to_hf_and_back_is_the_same(shape: ModelConfig):
    assert ModelConfig.from_hf(shape.to_hf()) == shape


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_survives_transformers(name: str):
    config = FAMILY[name].config
    theirs = AutoConfig.for_model(**config.to_hf()).to_dict()
    assert ModelConfig.from_hf(theirs) == config


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_both_spellings_of_the_scaling_type(key: str):
    config = ModelConfig.from_hf(PUBLISHED_05B | {"rope_scaling": YARN | {key: "yarn"}})
    assert config.rope_scaling == RopeScaling(4.0, 32768)
    assert config.window == 131072


def test_rope_parameters_of_transformers_5():
    values = {key: value for key, value in PUBLISHED_05B.items() if key != "rope_theta"}
    config = ModelConfig.from_hf(values | {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 5e5}})
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(4.0, 32768)


def test_yarn_without_an_original_length_takes_the_models():
    config = ModelConfig.from_hf(PUBLISHED_05B | {"rope_scaling": {"type": "yarn", "factor": 2.0}})
    assert config.rope_scaling == RopeScaling(2.0, 32768)


def test_dual_chunk_config_of_qwen2_5_1m():
    dual = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    config = ModelConfig.from_hf(PUBLISHED_05B | {"max_position_embeddings": 1010000, "dual_chunk_attention_config": dual})
    assert config.dual_chunk == DualChunkConfig(262144, 8192, 262144)
    assert config.window == 262144 - 8192


def test_qwen1_5_and_missing_kv_heads():
    values = {key: value for key, value in PUBLISHED_05B.items() if key != "num_key_value_heads"}
    assert ModelConfig.from_hf(values).kv_heads == 14


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scalling": {}}, "config.json: rope_scalling: unknown key; what it would change is not known, so the model is not loaded"),
        ({"model_type": "mamba"}, "config.json: model_type 'mamba' is not one this package runs: qwen2, qwen2_moe, llama"),
        (
            {"architectures": ["Qwen2ForSequenceClassification"]},
            "config.json: architectures ['Qwen2ForSequenceClassification']: only Qwen2ForCausalLM is supported for qwen2",
        ),
        ({"use_sliding_window": True}, "config.json: use_sliding_window True is not supported, only False"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act 'gelu' is not supported, only 'silu'"),
        ({"attention_dropout": 0.1}, "config.json: attention_dropout 0.1 is not supported, only 0.0"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "config.json: rope scaling type 'linear' is not supported for qwen2; Qwen2 uses 'yarn' or none",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "config.json: rope scaling: factor missing"),
        ({"rope_scaling": YARN | {"type": "yarn", "mscale": 1}}, "config.json: rope scaling: mscale: unknown key"),
        ({"rope_scaling": YARN | {"type": "yarn", "rope_type": "linear"}}, "config.json: rope scaling is given two types: linear, yarn"),
        (
            {"rope_scaling": {"type": "default", "factor": 2}},
            "config.json: rope scaling: factor: not used by rope scaling of type 'default'",
        ),
        ({"head_dim": 128}, "config.json: head_dim 128: only hidden_size / num_attention_heads is supported"),
        ({"layer_types": ["sliding_attention"] * 24}, "config.json: layer_types: only full_attention layers are supported"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "config.json: quantization_config: 'gptq' weights are not supported; take the unquantized or the GGUF release",
        ),
        ({"num_experts": 8}, "config.json: num_experts: unknown key; what it would change is not known, so the model is not loaded"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "config.json: dual_chunk_attention_config: local_size missing"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf(PUBLISHED_05B | changes)
    assert str(error.value) == message


@pytest.mark.parametrize("key", ["vocab_size", "rms_norm_eps", "max_position_embeddings"])
def test_a_missing_key_is_named(key: str):
    values = {name: value for name, value in PUBLISHED_05B.items() if name != key}
    with pytest.raises(ValueError, match=f"config.json: {key} missing"):
        ModelConfig.from_hf(values)


def test_llama_without_scaling_reads_and_with_it_does_not():
    llama = {key: value for key, value in PUBLISHED_05B.items() if key not in ("use_sliding_window", "sliding_window", "max_window_layers")}
    llama |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    assert ModelConfig.from_hf(llama | {"head_dim": 64}).head_dim == 64
    with pytest.raises(ValueError, match="rope scaling type 'llama3' is not supported for llama"):
        ModelConfig.from_hf(llama | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}})
    with pytest.raises(ValueError, match="attention_bias True is not supported, only False"):
        ModelConfig.from_hf(llama | {"attention_bias": True})


WRONG: list[Any] = ["x", [], {}, [[]], {"a": 1}, 1.5, -1, 0, True, 10**400, float("nan"), float("inf")]


@pytest.mark.parametrize("published", [PUBLISHED_05B, MOE_57B], ids=["dense", "moe"])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: repr(value)[:12])
def test_values_of_another_type_or_range_are_refused_or_harmless(published: dict[str, Any], wrong: Any):
    """Every key in turn: a ValueError of one line, or a configuration that counts and says its window."""
    extra = {"rope_scaling": YARN | {"type": "yarn"}, "head_dim": 64, "layer_types": None, "quantization_config": None}
    for key in [*published, *extra]:
        check_one_line(published | {key: wrong})
    for key in [*YARN, "beta_fast", "beta_slow", "attention_factor", "truncate", "type", "rope_theta"]:
        check_one_line(published | {"rope_scaling": YARN | {"type": "yarn", key: wrong}})
    for key in ("chunk_size", "local_size", "original_max_position_embeddings"):
        check_one_line(published | {"dual_chunk_attention_config": {"chunk_size": 64, "local_size": 8, key: wrong}})


def check_one_line(values: dict[str, Any]) -> None:
    refusal = ""
    try:
        config = ModelConfig.from_hf(values)
    except ValueError as error:
        refusal = str(error)
    else:
        assert config.window > 0
        assert config.parameters() > 0
    assert "\n" not in refusal
    assert len(refusal) < 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "heads 0: must be a whole number above 0"),
        ({"hidden_size": "x"}, "config.json: hidden_size is 'x', must be a whole number"),
        ({"eos_token_id": 1.5}, "config.json: eos_token_id is 1.5, must be a whole number or a list of them"),
        ({"rope_theta": []}, "config.json: rope_theta is [], must be a finite number"),
        ({"model_type": []}, "config.json: model_type is [], must be a string"),
        ({"rope_scaling": 3}, "config.json: rope_scaling is 3, must be an object"),
        ({"tie_word_embeddings": "yes"}, "config.json: tie_word_embeddings is 'yes', must be true or false"),
    ],
)
def test_a_wrong_type_is_named(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf(PUBLISHED_05B | changes)
    assert str(error.value) == message
