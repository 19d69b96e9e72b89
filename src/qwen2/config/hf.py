"""Hugging Face config.json <-> ModelConfig, strictly: a key is used, must hold its one harmless value, or is named as unknown.

A setting that is read with a default, or not at all, is how implementations come to be silently wrong (YaRN ignored, top-k
weights renormalised); so every key is taken out of the dictionary, and what is left at the end is an error.

What is left out: quantized checkpoints (GPTQ, AWQ) and Llama rope scaling, which are refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
FIXED = {  # key: the values under which it changes nothing
    "hidden_act": ("silu",),
    "attention_dropout": (0.0, None),
    "use_sliding_window": (False, None),
    "qkv_bias": (True,),
    "is_encoder_decoder": (False,),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
}
FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "llama": "LlamaForCausalLM"}


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Read the dictionary of a config.json of Qwen1.5, Qwen2, Qwen2.5 (dense and MoE) or a Llama without rope scaling.

    Raises ValueError naming the key that is missing, unknown, or set to what this decoder does not do.
    """
    rest = {key: value for key, value in values.items() if key not in IGNORED and value is not None}  # null is "not set"
    family = rest.pop("model_type", None)
    if family not in FAMILIES:
        raise ValueError(f"config.json: model_type {family!r} is not one this package runs: {', '.join(FAMILIES)}")
    architectures = rest.pop("architectures", None)
    if architectures not in (None, [FAMILIES[family]]):
        raise ValueError(f"config.json: architectures {architectures}: only {FAMILIES[family]} is supported for {family}")
    _check_fixed(rest)
    fields = _take_shape(rest)
    fields |= _take_rope(rest, fields["context"], family)
    fields["eos"] = _as_ids(rest.pop("eos_token_id", None))
    fields["bos"] = rest.pop("bos_token_id", None)
    dtype = rest.pop("torch_dtype", None)
    fields["dtype"] = rest.pop("dtype", None) or dtype or "float32"
    if family == "qwen2_moe":
        fields["moe"] = _take_moe(rest)
    head_dim = rest.pop("head_dim", None)
    if head_dim not in (None, fields["hidden"] // fields["heads"]):
        raise ValueError(f"config.json: head_dim {head_dim}: only hidden_size / num_attention_heads is supported")
    if rest.pop("layer_types", None) not in (None, ["full_attention"] * fields["layers"]):
        raise ValueError("config.json: layer_types: only full_attention layers are supported")
    if "quantization_config" in rest:
        method = rest["quantization_config"].get("quant_method", "unknown")
        raise ValueError(f"config.json: quantization_config: {method} weights are not supported; take the unquantized or the GGUF release")
    if rest:
        unknown = ", ".join(sorted(rest))
        raise ValueError(f"config.json: unknown key {unknown}: what it would change is not known, so the model is not loaded")
    return ModelConfig(**fields)


def _check_fixed(rest: dict[str, Any]) -> None:
    for key, allowed in FIXED.items():
        value = rest.pop(key, allowed[0])
        if value not in allowed:
            raise ValueError(f"config.json: {key} {value!r} is not supported, only {allowed[0]!r}")


def _take_shape(rest: dict[str, Any]) -> dict[str, Any]:
    names = {
        "vocab": "vocab_size",
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "ffn": "intermediate_size",
        "context": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
    }
    missing = [key for key in names.values() if key not in rest]
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)} missing")
    fields = {field: rest.pop(key) for field, key in names.items()}
    kv_heads = rest.pop("num_key_value_heads", None)
    fields["kv_heads"] = fields["heads"] if kv_heads is None else kv_heads
    fields["tied"] = bool(rest.pop("tie_word_embeddings", False))
    fields["init_range"] = float(rest.pop("initializer_range", 0.02))
    return fields


def _take_rope(rest: dict[str, Any], context: int, family: str) -> dict[str, Any]:
    """rope_theta and rope_scaling at top level (transformers 4) or together in rope_parameters (5)."""
    parameters = dict(rest.pop("rope_parameters", None) or {})
    scaling = dict(rest.pop("rope_scaling", None) or {}) | parameters
    theta = scaling.pop("rope_theta", None)
    top = rest.pop("rope_theta", None)
    theta = top if theta is None else theta
    fields: dict[str, Any] = {"rope_theta": 10000.0 if theta is None else float(theta)}
    dual = rest.pop("dual_chunk_attention_config", None)
    if dual is not None:
        fields["dual_chunk"] = _read_dual_chunk(dict(dual))
    kinds = {scaling.pop(key) for key in ("type", "rope_type") if key in scaling}
    if len(kinds) > 1:
        raise ValueError(f"config.json: rope scaling is given two types: {', '.join(sorted(kinds))}")
    kind = kinds.pop() if kinds else "default"
    if kind == "default":
        if scaling:
            raise ValueError(f"config.json: rope scaling of type 'default' does not use {', '.join(sorted(scaling))}")
        return fields
    if kind != "yarn" or family == "llama":
        raise ValueError(f"config.json: rope scaling type {kind!r} is not supported for {family}; Qwen2 uses 'yarn' or none")
    fields["rope_scaling"] = _read_yarn(scaling, context)
    return fields


def _read_yarn(scaling: dict[str, Any], context: int) -> RopeScaling:
    if "factor" not in scaling:
        raise ValueError("config.json: rope scaling has no factor")
    original = scaling.pop("original_max_position_embeddings", None)
    values = {
        "factor": float(scaling.pop("factor")),
        "original_context": context if original is None else original,  # as transformers does where it is not written
        "beta_fast": float(scaling.pop("beta_fast", 32.0)),
        "beta_slow": float(scaling.pop("beta_slow", 1.0)),
        "attention_factor": scaling.pop("attention_factor", None),
        "truncate": bool(scaling.pop("truncate", True)),
    }
    if scaling:
        raise ValueError(f"config.json: rope scaling key {', '.join(sorted(scaling))} is unknown")
    return RopeScaling(**values)


def _read_dual_chunk(values: dict[str, Any]) -> DualChunkConfig:
    for key in ("sparse_attention_config", "sparse_attention_threshold", "sparse_attention_enabled", "sparse_attention_last_q"):
        values.pop(key, None)  # which keys a sparse prefill may skip; attention here is always exact
    try:
        config = DualChunkConfig(values.pop("chunk_size"), values.pop("local_size"), values.pop("original_max_position_embeddings", None))
    except KeyError as error:
        raise ValueError(f"config.json: dual_chunk_attention_config has no {error.args[0]}") from None
    if values:
        raise ValueError(f"config.json: dual_chunk_attention_config key {', '.join(sorted(values))} is unknown")
    return config


def _take_moe(rest: dict[str, Any]) -> MoEConfig:
    names = {
        "experts": "num_experts",
        "active": "num_experts_per_tok",
        "expert_ffn": "moe_intermediate_size",
        "shared_ffn": "shared_expert_intermediate_size",
    }
    missing = [key for key in names.values() if key not in rest]
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)} missing")
    return MoEConfig(
        **{field: rest.pop(key) for field, key in names.items()},
        norm_topk=bool(rest.pop("norm_topk_prob", False)),
        aux_coef=float(rest.pop("router_aux_loss_coef", 0.001)),
        sparse_step=rest.pop("decoder_sparse_step", 1),
        dense_layers=tuple(rest.pop("mlp_only_layers", None) or ()),
    )


def _as_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


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
