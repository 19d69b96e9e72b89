"""GGUF tensor names <-> the decoder's parameter names (Hugging Face's), as one table; and the order of Llama's q and k rows.

A stack of experts' gate and up matrices are two tensors in GGUF and the two halves of one parameter here. What is left out:
shapes, which `config/gguf.py` lists, and names of architectures other than qwen2, qwen2moe and llama.

    hf_name("blk.3.ffn_up_exps.weight", config)                      # 'model.layers.3.mlp.experts.gate_up_proj'
    gguf_names("model.layers.3.mlp.experts.gate_up_proj", config)    # ('blk.3.ffn_gate_exps.weight', 'blk.3.ffn_up_exps.weight')
"""
# E experts, F expert feed-forward size, D hidden, H heads, d head size

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.config import ModelConfig

MODEL = (  # GGUF, ours
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
)
LAYER = (  # after blk.N. and model.layers.N.
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_q.bias", "self_attn.q_proj.bias"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_k.bias", "self_attn.k_proj.bias"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_v.bias", "self_attn.v_proj.bias"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
)
DENSE = (
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
)
MOE = (
    ("ffn_gate_inp.weight", "mlp.gate.weight"),
    ("ffn_gate_exps.weight", "mlp.experts.gate_up_proj"),  # rows 0 .. F-1 of each expert
    ("ffn_up_exps.weight", "mlp.experts.gate_up_proj"),  # rows F .. 2F-1
    ("ffn_down_exps.weight", "mlp.experts.down_proj"),
    ("ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight"),  # (D,) there, (1, D) here
    ("ffn_gate_shexp.weight", "mlp.shared_expert.gate_proj.weight"),
    ("ffn_up_shexp.weight", "mlp.shared_expert.up_proj.weight"),
    ("ffn_down_shexp.weight", "mlp.shared_expert.down_proj.weight"),
)


def hf_name(name: str, config: ModelConfig) -> str:
    """The parameter that this GGUF tensor is, or is half of. ValueError names a tensor that the model does not have."""
    table = dict(MODEL)
    if name in table:
        return table[name]
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,8})\.(.+)", name)
    if match is not None and int(match[1]) < config.layers:
        layer = dict(LAYER + (MOE if config.is_moe(int(match[1])) else DENSE))
        if match[2] in layer:
            return f"model.layers.{match[1]}.{layer[match[2]]}"
    raise ValueError(f"GGUF tensor {name!r} is not part of this model of {config.layers} layers")


def gguf_names(name: str, config: ModelConfig) -> tuple[str, ...]:
    """The GGUF tensors that make up this parameter: one, or gate and up. ValueError names a parameter that the model does not have."""
    found = tuple(theirs for theirs, ours in MODEL if ours == name)
    match = re.fullmatch(r"model\.layers\.(0|[1-9]\d{0,8})\.(.+)", name)
    if match is not None and int(match[1]) < config.layers:
        table = LAYER + (MOE if config.is_moe(int(match[1])) else DENSE)
        found = tuple(f"blk.{match[1]}.{theirs}" for theirs, ours in table if ours == match[2])
    if not found:
        raise ValueError(f"parameter {name!r} is not part of this model of {config.layers} layers")
    return found


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows of a Llama GGUF's q or k projection in Hugging Face's order: (H*d, ...) -> (H*d, ...).

    Llama's GGUF files rotate neighbouring dimensions 2i and 2i+1; the decoder, like Hugging Face's, rotates i and i + d/2.
    """
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])  # (H, d/2, 2, ...)
    return pairs.transpose(1, 2).reshape(weight.shape)
