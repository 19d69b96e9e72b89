"""GGUF metadata <-> ModelConfig, strictly: a key of the architecture is used, must hold its one harmless value, or is an error.

The sizes are held against the shapes of the tensors, so that a header cannot ask for more layers or a larger vocabulary than
the file holds. `gguf_shapes` lists every tensor of a model with its shape, for reading and for writing.

What is left out: `general.*`, `tokenizer.*`, `quantize.*` and `split.*` keys, which are not the configuration's (only the ids of
the first and last token are taken from the tokenizer's), the fields that GGUF has no key for (dtype, initial range, the
weight of the balancing loss), and Llama files with scaled rotary embedding.
"""
# E experts, F feed-forward size, D hidden, V vocabulary; shapes are rows first, as torch has them

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwen2.config.keys import short
from qwen2.config.model import ModelConfig, MoEConfig, RopeScaling

if TYPE_CHECKING:
    from collections.abc import Mapping

Shapes = dict[str, tuple[int, ...]]

ARCHITECTURES = ("qwen2", "qwen2moe", "llama")
IGNORED = {
    "rope.scaling.finetuned": "says how the model was trained, not how it runs",
    "expert_shared_count": "the shared experts are one feed-forward part; its size is that of its tensors",
}
FIXED: dict[str, tuple[object, ...]] = {  # key: the values under which it changes nothing
    "attention.causal": (True,),
    "expert_gating_func": (1,),  # soft-max
    "expert_weights_scale": (0.0, 1.0),
    "rope.scale_linear": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),  # -1: llama.cpp's own choice, 1 for YaRN
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}


class Keys:
    """The architecture's keys of a file, each taken once; what is left at the end is unknown."""

    def __init__(self, metadata: Mapping[str, Any], arch: str) -> None:
        self.arch = arch
        prefix = arch + "."
        self.rest = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        for key in IGNORED:
            self.rest.pop(key, None)
        for key, allowed in FIXED.items():
            if key in self.rest and (value := self.rest.pop(key)) not in allowed:
                raise ValueError(f"GGUF key {prefix}{key} is {value!r}: only {allowed[0]!r} is supported")

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"GGUF key {self.arch}.{key} is {short(value)}: must be a whole number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A float32 as the shortest decimal that means it: 1e-06, not 9.999999974752427e-07."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"GGUF key {self.arch}.{key} is {short(value)}: must be a finite number")
        return next((brief for digits in range(1, 10) if _float32(brief := float(f"{value:.{digits}g}")) == value), float(value))

    def flag(self, key: str, default: bool) -> bool:
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"GGUF key {self.arch}.{key} is {short(value)}: must be true or false")
        return value

    def same(self, key: str, value: int) -> None:
        """A key that repeats what other keys or the shapes say."""
        if (stated := self.whole(key, value)) != value:
            raise ValueError(f"GGUF key {self.arch}.{key} is {stated}, and the rest of the file says {value}")

    def end(self) -> None:
        if self.rest:
            names = ", ".join(self.arch + "." + key for key in sorted(self.rest)[:3])
            raise ValueError(f"GGUF: unknown key {names}: what it would change is not known, so the model is not loaded")

    def _take(self, key: str, default: object) -> object:
        if key not in self.rest and default is None:
            raise ValueError(f"GGUF key {self.arch}.{key} is missing")
        return self.rest.pop(key, default)


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0]) if abs(value) < 3e38 else value


def config_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """Read the configuration of a qwen2, qwen2moe or llama file.

    Raises ValueError naming the key that is missing, unknown or not supported, or the tensor that is missing or has another shape.
    """
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"GGUF architecture {short(arch)} is not one this package runs: {', '.join(ARCHITECTURES)}")
    keys = Keys(metadata, arch)
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    if "token_embd.weight" not in shapes or len(shapes["token_embd.weight"]) != 2:
        raise ValueError("GGUF: there is no matrix token_embd.weight, the embedding; the file is incomplete or holds no language model")
    if isinstance(tokens, Sequence) and len(tokens) > shapes["token_embd.weight"][0]:
        raise ValueError(f"GGUF: {len(tokens)} tokens for the embedding's {shapes['token_embd.weight'][0]} rows; the file is damaged")
    context = keys.whole("context_length")
    config = ModelConfig(
        vocab=shapes["token_embd.weight"][0],
        layers=keys.whole("block_count"),
        hidden=keys.whole("embedding_length"),
        heads=(heads := keys.whole("attention.head_count")),
        kv_heads=keys.whole("attention.head_count_kv", heads),
        ffn=keys.whole("feed_forward_length"),
        context=context,
        rope_theta=keys.real("rope.freq_base", 10000.0),
        norm_eps=keys.real("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in shapes,
        rope_scaling=_take_scaling(keys, context),
        moe=_take_moe(keys, shapes) if arch == "qwen2moe" else None,
        bos=_token_id(metadata, "bos"),
        eos=tuple(dict.fromkeys(token for kind in ("eos", "eot") if (token := _token_id(metadata, kind)) is not None)),
    )
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        keys.same(key, config.head_dim)
    keys.same("vocab_size", config.vocab)
    keys.end()
    check_shapes(config, arch, shapes)
    return config


def _token_id(metadata: Mapping[str, Any], kind: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"GGUF key tokenizer.ggml.{kind}_token_id is {short(value)}: must be a whole number")
    return value


def _take_scaling(keys: Keys, context: int) -> RopeScaling | None:
    kind = keys.rest.pop("rope.scaling.type", "none")
    if kind == "none":
        keys.rest.pop("rope.scaling.original_context_length", None)  # written by some without any scaling
        if keys.real("rope.scaling.factor", 1.0) not in (0.0, 1.0) or keys.real("rope.scaling.attn_factor", 1.0) != 1:
            raise ValueError(f"GGUF key {keys.arch}.rope.scaling.type is missing, and rope.scaling.factor is set")
        return None
    if kind != "yarn" or keys.arch == "llama":
        raise ValueError(f"GGUF key {keys.arch}.rope.scaling.type {short(kind)} is not supported; Qwen2 uses 'yarn' or none")
    factor = keys.real("rope.scaling.factor")
    scaling = RopeScaling(
        factor,
        keys.whole("rope.scaling.original_context_length", context),
        beta_fast=keys.real("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.real("rope.scaling.yarn_beta_slow", 1.0),
    )
    extra = keys.real("rope.scaling.attn_factor", 1.0)  # multiplies the paper's 0.1 ln(factor) + 1, which is ours by default
    if extra == 1:
        return scaling
    return RopeScaling(factor, scaling.original_context, scaling.beta_fast, scaling.beta_slow, extra * scaling.attention_scale)


def _take_moe(keys: Keys, shapes: Mapping[str, tuple[int, ...]]) -> MoEConfig:
    """Sizes from the first layer's tensors where the keys are left out, as the first files of this architecture did."""
    expert, shared = shapes.get("blk.0.ffn_gate_exps.weight", ()), shapes.get("blk.0.ffn_gate_shexp.weight", ())
    if len(expert) != 3 or len(shared) != 2:
        raise ValueError("GGUF: blk.0.ffn_gate_exps.weight (E, F, D) or blk.0.ffn_gate_shexp.weight (F, D) is missing or has another rank")
    return MoEConfig(
        experts=keys.whole("expert_count"),
        active=keys.whole("expert_used_count"),
        expert_ffn=keys.whole("expert_feed_forward_length", expert[1]),
        shared_ffn=keys.whole("expert_shared_feed_forward_length", shared[0]),
        norm_topk=keys.flag("expert_weights_norm", False),
    )


def gguf_shapes(config: ModelConfig, biases: bool = True) -> Shapes:
    """Every tensor of this model in a GGUF file, in the usual order: name -> shape, rows first."""
    shapes: Shapes = {"token_embd.weight": (config.vocab, config.hidden)}
    for layer in range(config.layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in _layer_shapes(config, biases).items()}
    shapes["output_norm.weight"] = (config.hidden,)
    if not config.tied:
        shapes["output.weight"] = (config.vocab, config.hidden)
    return shapes


def _layer_shapes(config: ModelConfig, biases: bool) -> Shapes:
    hidden, kv = config.hidden, config.kv_heads * config.head_dim
    shapes: Shapes = {"attn_norm.weight": (hidden,)}
    for name, width in (("attn_q", hidden), ("attn_k", kv), ("attn_v", kv)):
        shapes[f"{name}.weight"] = (width, hidden)
        if biases:
            shapes[f"{name}.bias"] = (width,)
    shapes |= {"attn_output.weight": (hidden, hidden), "ffn_norm.weight": (hidden,)}
    moe = config.moe
    if moe is None:
        return shapes | {
            "ffn_gate.weight": (config.ffn, hidden),
            "ffn_up.weight": (config.ffn, hidden),
            "ffn_down.weight": (hidden, config.ffn),
        }
    return shapes | {
        "ffn_gate_inp.weight": (moe.experts, hidden),
        "ffn_gate_exps.weight": (moe.experts, moe.expert_ffn, hidden),
        "ffn_up_exps.weight": (moe.experts, moe.expert_ffn, hidden),
        "ffn_down_exps.weight": (moe.experts, hidden, moe.expert_ffn),
        "ffn_gate_inp_shexp.weight": (hidden,),
        "ffn_gate_shexp.weight": (moe.shared_ffn, hidden),
        "ffn_up_shexp.weight": (moe.shared_ffn, hidden),
        "ffn_down_shexp.weight": (hidden, moe.shared_ffn),
    }


def check_shapes(config: ModelConfig, arch: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Hold the file's tensors against the configuration: all there, nothing unknown, every shape as it must be."""
    layers = {int(match[1]) for name in shapes if (match := re.match(r"blk\.(\d{1,9})\.", name))}
    if config.layers > len(layers):  # said before `gguf_shapes` lists as many as the header claims
        raise ValueError(f"GGUF key {arch}.block_count is {config.layers}, and the file holds tensors of {len(layers)} layers")
    biases = arch != "llama" or any(name.endswith("attn_q.bias") for name in shapes)
    expected = gguf_shapes(config, biases)
    for name, shape in expected.items():
        if name not in shapes:
            raise ValueError(f"GGUF: tensor {name} {shape} is missing; the file is incomplete, download it again")
        if tuple(shapes[name]) != shape:
            raise ValueError(f"GGUF: tensor {name} has shape {tuple(shapes[name])}, and the metadata say {shape}")
    if "rope_freqs.weight" in shapes:
        raise ValueError("GGUF: tensor rope_freqs.weight scales the rotary embedding (Llama 3.1 and later), which is not supported")
    unknown = [name for name in shapes if name not in expected]
    if unknown:
        raise ValueError(f"GGUF: tensor {unknown[0]} is not part of a {arch} model of {config.layers} layers; what it changes is not known")


def config_to_gguf(config: ModelConfig, name: str) -> dict[str, Any]:
    """The metadata of a file of this model: whole numbers to be written as UINT32, others as FLOAT32.

    Raises ValueError for what GGUF has no key for. `expert_weights_norm` is read back by us; llama.cpp never normalises qwen2moe.
    """
    if config.dual_chunk is not None:
        raise ValueError("GGUF has no keys for dual chunk attention; export with dual_chunk=None")
    arch = "qwen2" if config.moe is None else "qwen2moe"
    values: dict[str, Any] = {
        "block_count": config.layers,
        "context_length": config.context,
        "embedding_length": config.hidden,
        "feed_forward_length": config.ffn,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.freq_base": float(config.rope_theta),
    }
    values |= _scaling_keys(config.rope_scaling) | _moe_keys(config)
    general = {"general.architecture": arch, "general.type": "model"} | ({"general.name": name} if name else {})
    return general | {f"{arch}.{key}": value for key, value in values.items()}


def _scaling_keys(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    if not scaling.truncate:
        raise ValueError("GGUF has no key for YaRN with truncate=False; export with truncate=True")
    values: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(scaling.factor),
        "rope.scaling.original_context_length": scaling.original_context,
    }
    if scaling.beta_fast != 32 or scaling.beta_slow != 1:
        values["rope.scaling.yarn_beta_fast"] = float(scaling.beta_fast)
        values["rope.scaling.yarn_beta_slow"] = float(scaling.beta_slow)
    if scaling.attention_factor is not None:
        values["rope.scaling.attn_factor"] = scaling.attention_factor / (0.1 * math.log(scaling.factor) + 1)
    return values


def _moe_keys(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {}
    if not all(config.is_moe(layer) for layer in range(config.layers)):
        raise ValueError("GGUF's qwen2moe has experts in every layer; this model has dense layers")
    values: dict[str, Any] = {
        "expert_count": moe.experts,
        "expert_used_count": moe.active,
        "expert_feed_forward_length": moe.expert_ffn,
        "expert_shared_feed_forward_length": moe.shared_ffn,
    }
    return values | ({"expert_weights_norm": True} if moe.norm_topk else {})
