"""Hugging Face config.json <-> ModelConfig, strictly: a key is used, must hold its one harmless value, or is named as unknown.

A setting that is read with a default, or not at all, is how implementations come to be silently wrong (YaRN ignored, top-k
weights renormalised); so every key is taken out of the dictionary, and what is left at the end is an error.

What is left out: quantized checkpoints (GPTQ, AWQ) and Llama rope scaling, which are refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwen2.config.keys import Keys, short
from qwen2.config.model import DualChunkConfig, ModelConfig, MoEConfig, RopeScaling

if TYPE_CHECKING:
    from collections.abc import Mapping

IGNORED = {
    "transformers_version": "a record of the writer",
    "_name_or_path": "a record of the writer",
    "_attn_implementation": "a choice of the runtime",
    "_attn_implementation_autoset": "a choice of the runtime",
    "use_cache": "decoding always keeps its cache",
    "output_attentions": "a return option of transformers",
    "output_hidden_states": "a return option of transformers",
    "return_dict": "a return option of transformers",
    "output_router_logits": "a return option of transformers",
    "chunk_size_feed_forward": "a memory option of transformers, same result",
    "pretraining_tp": "how Llama was trained, same result",
    "is_llama_config": "a note of SmolLM2's writer",
    "id2label": "for classifiers",
    "label2id": "for classifiers",
    "problem_type": "for classifiers",
    "pad_token_id": "ragged batches have no padding",
    "max_window_layers": "which layers a sliding window covers; refused when a window is in use",
    "sliding_window": "its length; refused when a window is in use",
    "transformers.js_config": "for another runtime",
}
FIXED = {  # key: the value under which it changes nothing
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "qkv_bias": True,
    "is_encoder_decoder": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "use_mrope": False,
}
SPARSE = {  # which keys a sparse prefill may skip; attention here is always exact
    "sparse_attention_config": "",
    "sparse_attention_threshold": "",
    "sparse_attention_enabled": "",
    "sparse_attention_last_q": "",
}
FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "llama": "LlamaForCausalLM"}


def config_from_hf(values: Mapping[str, Any], file: str = "config.json") -> ModelConfig:
    """Read the dictionary of a config.json of Qwen1.5, Qwen2, Qwen2.5 (dense and MoE) or a Llama without rope scaling.

    Raises ValueError naming the key that is missing, unknown, of the wrong type, or set to what this decoder does not do.
    """
    keys = Keys(values, file, IGNORED)
    family = keys.text("model_type", None)
    if family not in FAMILIES:
        raise ValueError(f"{file}: model_type {family!r} is not one this package runs: {', '.join(FAMILIES)}")
    architectures = keys.take("architectures", None)
    if architectures not in (None, [FAMILIES[family]]):
        raise ValueError(f"{file}: architectures {short(architectures)}: only {FAMILIES[family]} is supported for {family}")
    keys = Keys(keys.rest, file, fixed=FIXED)
    fields = _take_shape(keys)
    fields |= _take_rope(keys, family, fields["context"])
    if family == "qwen2_moe":
        fields["moe"] = _take_moe(keys)
    head_dim = keys.whole("head_dim", None)
    layer_types = keys.take("layer_types", None)
    quantized = keys.part("quantization_config")
    if quantized:
        method = short(quantized.get("quant_method", "packed"))
        raise ValueError(f"{file}: quantization_config: {method} weights are not supported; take the unquantized or the GGUF release")
    keys.end("unknown key; what it would change is not known, so the model is not loaded")
    config = ModelConfig(**fields)
    if head_dim not in (None, config.head_dim):
        raise ValueError(f"{file}: head_dim {head_dim}: only hidden_size / num_attention_heads is supported")
    full = isinstance(layer_types, list) and len(layer_types) == config.layers and all(kind == "full_attention" for kind in layer_types)
    if not full and layer_types is not None:
        raise ValueError(f"{file}: layer_types: only full_attention layers are supported")
    return config


def _take_shape(keys: Keys) -> dict[str, Any]:
    heads = keys.whole("num_attention_heads")
    older_dtype = keys.text("torch_dtype", None)
    dtype = keys.text("dtype", older_dtype)
    return {
        "vocab": keys.whole("vocab_size"),
        "layers": keys.whole("num_hidden_layers"),
        "hidden": keys.whole("hidden_size"),
        "heads": heads,
        "kv_heads": keys.whole("num_key_value_heads", heads),
        "ffn": keys.whole("intermediate_size"),
        "context": keys.whole("max_position_embeddings"),
        "norm_eps": keys.real("rms_norm_eps"),
        "tied": keys.flag("tie_word_embeddings", False),
        "init_range": keys.real("initializer_range", 0.02),
        "bos": keys.whole("bos_token_id", None),
        "eos": keys.ids("eos_token_id"),
        "dtype": "float32" if dtype is None else dtype,
    }


def _take_rope(keys: Keys, family: str, context: int) -> dict[str, Any]:
    """rope_theta and rope_scaling at top level (transformers 4) or together in rope_parameters (5)."""
    scaling = Keys(keys.part("rope_scaling") | keys.part("rope_parameters"), f"{keys.file}: rope scaling")
    inner = scaling.real("rope_theta", None)
    theta = keys.real("rope_theta", inner)
    fields: dict[str, Any] = {"rope_theta": 10000.0 if theta is None else theta}
    dual = keys.part("dual_chunk_attention_config")
    if dual:
        fields["dual_chunk"] = _read_dual_chunk(dual, keys.file)
    kinds = {scaling.text(key) for key in ("type", "rope_type") if key in scaling.rest}
    if len(kinds) > 1:
        raise ValueError(f"{keys.file}: rope scaling is given two types: {', '.join(sorted(kinds))}")
    kind = kinds.pop() if kinds else "default"
    if kind == "default":
        scaling.end("not used by rope scaling of type 'default'")
        return fields
    if kind != "yarn" or family == "llama":
        raise ValueError(f"{keys.file}: rope scaling type {kind!r} is not supported for {family}; Qwen2 uses 'yarn' or none")
    fields["rope_scaling"] = _read_yarn(scaling, context)
    return fields


def _read_yarn(keys: Keys, context: int) -> RopeScaling:
    scaling = RopeScaling(
        factor=keys.real("factor"),
        original_context=keys.whole("original_max_position_embeddings", context),  # as transformers does where it is not written
        beta_fast=keys.real("beta_fast", 32.0),
        beta_slow=keys.real("beta_slow", 1.0),
        attention_factor=keys.real("attention_factor", None),
        truncate=keys.flag("truncate", True),
    )
    keys.end("unknown key")
    return scaling


def _read_dual_chunk(values: dict[str, Any], file: str) -> DualChunkConfig:
    keys = Keys(values, f"{file}: dual_chunk_attention_config", SPARSE)
    config = DualChunkConfig(keys.whole("chunk_size"), keys.whole("local_size"), keys.whole("original_max_position_embeddings", None))
    keys.end("unknown key")
    return config


def _take_moe(keys: Keys) -> MoEConfig:
    return MoEConfig(
        experts=keys.whole("num_experts"),
        active=keys.whole("num_experts_per_tok"),
        expert_ffn=keys.whole("moe_intermediate_size"),
        shared_ffn=keys.whole("shared_expert_intermediate_size"),
        norm_topk=keys.flag("norm_topk_prob", False),
        aux_coef=keys.real("router_aux_loss_coef", 0.001),
        sparse_step=keys.whole("decoder_sparse_step", 1),
        dense_layers=keys.ids("mlp_only_layers"),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json of this model, keys in alphabetical order as published files have them."""
    family = "qwen2" if config.moe is None else "qwen2_moe"
    values: dict[str, Any] = {
        "architectures": [FAMILIES[family]],
        "attention_dropout": 0.0,
        "bos_token_id": config.bos,
        "eos_token_id": config.eos[0] if len(config.eos) == 1 else list(config.eos) or None,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initializer_range": config.init_range,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.context,
        "max_window_layers": config.layers,
        "model_type": family,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": config.context,
        "tie_word_embeddings": config.tied,
        "torch_dtype": config.dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab,
    }
    if config.rope_scaling is not None:
        values["rope_scaling"] = _write_yarn(config.rope_scaling)
    if config.dual_chunk is not None:
        dual = {"chunk_size": config.dual_chunk.chunk, "local_size": config.dual_chunk.local}
        original = config.dual_chunk.original_context
        values["dual_chunk_attention_config"] = dual if original is None else dual | {"original_max_position_embeddings": original}
    if config.moe is not None:
        values |= _write_moe(config.moe)
    return dict(sorted(values.items()))


def _write_yarn(scaling: RopeScaling) -> dict[str, Any]:
    values: dict[str, Any] = {
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context,
        "rope_type": "yarn",
    }
    defaults = RopeScaling(scaling.factor, scaling.original_context)
    for key in ("beta_fast", "beta_slow", "attention_factor", "truncate"):
        if getattr(scaling, key) != getattr(defaults, key):
            values[key] = getattr(scaling, key)
    return values


def _write_moe(moe: MoEConfig) -> dict[str, Any]:
    return {
        "decoder_sparse_step": moe.sparse_step,
        "mlp_only_layers": list(moe.dense_layers),
        "moe_intermediate_size": moe.expert_ffn,
        "norm_topk_prob": moe.norm_topk,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.active,
        "output_router_logits": False,
        "router_aux_loss_coef": moe.aux_coef,
        "shared_expert_intermediate_size": moe.shared_ffn,
    }
