"""The model that post-training begins with and leaves behind: one whose turns end.

A base model stops at <|endoftext|>; a chat model's answers end with the template's own token, <|im_end|>. So that whoever loads the
result stops there, it is put first wherever a checkpoint says what ends a text: config, generation defaults and tokenizer, which also
gets the chat template that was trained with. Sampling defaults stay the model's own.

    model = as_chat(load("base"))                           # model.generation.eos == (151645, 151643)
"""

from __future__ import annotations

import os
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qwen2.config import ModelConfig
from qwen2.model.lora import adapted_layers
from qwen2.post.rows.encode import end_of_turn
from qwen2.tokenizer import ChatTemplate
from qwen2.weights.adapter_texts import save_texts
from qwen2.weights.export import to_hf_folder

if TYPE_CHECKING:
    from qwen2.config import GenerationDefaults
    from qwen2.model import Qwen2
    from qwen2.tokenizer import Tokenizer
    from qwen2.train.world import World
    from qwen2.weights.model import Model


def as_chat(model: Model) -> Model:
    """The same model, with turns that end; its network is the very same."""
    config, tokenizer, template, generation = chat_parts(model.config, model.template, model.generation)
    return replace(model, config=config, tokenizer=tokenizer, template=template, generation=generation, files=None)


def chat_parts(
    config: ModelConfig, template: ChatTemplate, generation: GenerationDefaults
) -> tuple[ModelConfig, Tokenizer, ChatTemplate, GenerationDefaults]:
    """What a chat model has beside its weights."""
    tokenizer = copy(template.tokenizer)
    if template.jinja is not None:
        tokenizer.chat_template = template.jinja
    end = end_of_turn(template)
    if end is not None:
        text_end = tokenizer.control.get("<|endoftext|>")
        ends = dict.fromkeys((end, *generation.eos, *tokenizer.eos, *(() if text_end is None else (text_end,))))
        tokenizer.eos = tuple(ends)
        generation = replace(generation, eos=tuple(ends))
        config = replace(config, eos=(end,))
    kept = ChatTemplate(tokenizer, template.style, template.default_system, template.source)
    return config, tokenizer, kept, generation


def keep_texts(model: Model, folder: Path) -> None:
    """A run's own copy of tokenizer, template and generation defaults, so that a checkpoint is a model (train/saved.py)."""
    if folder.exists():
        return
    draft = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    save_texts(draft, model.tokenizer, model.generation)
    os.rename(draft, folder)


def export(model: Model, network: Qwen2 | None, folder: Path, dtype: str, world: World) -> None:
    """Write the model with this network as a Hugging Face folder, in the place of an earlier one; the main rank has the network."""
    if network is not None:
        draft = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(draft, ignore_errors=True)
        to_hf_folder(replace(model, network=network), draft, dtype=getattr(torch, dtype))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(draft, folder)
    world.barrier()


def gather_adapters(network: Qwen2, world: World) -> None:
    """Put the adapters together where ranks have parts of them, in place: at a run's end, before they are written. Every rank calls it."""
    if not world.divided:
        return
    for _, layer in adapted_layers(network):
        for name, parameter in list(layer.adapter.named_parameters()):
            setattr(layer.adapter, name, nn.Parameter(world.whole(parameter.detach()), requires_grad=False))
