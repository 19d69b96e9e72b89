"""A tokenizer as the files that the `transformers` library reads: tokenizer.json, tokenizer_config.json, vocab.json, merges.txt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2.tokenizer.splits import QWEN2
from qwen2.tokenizer.styles import CHAT_CONTROL, QWEN2_JINJA, QWEN2_SYSTEM

if TYPE_CHECKING:
    from qwen2.tokenizer.tokenizer import Tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the four files; the folder is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tokenizer.model_spec()
    _write(folder / "tokenizer.json", json.dumps(_tokenizer_json(tokenizer, model), ensure_ascii=False))
    _write(folder / "tokenizer_config.json", json.dumps(_config(tokenizer), ensure_ascii=False, indent=2) + "\n")
    _write(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False, separators=(",", ":")))
    _write(folder / "merges.txt", "".join(" ".join(pair) + "\n" for pair in model["merges"]))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _added(tokenizer: Tokenizer, token: str) -> dict[str, object]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags, "special": token in tokenizer.special}


def _tokenizer_json(tokenizer: Tokenizer, model: dict[str, Any]) -> dict[str, object]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    in_order = sorted(tokenizer.control, key=tokenizer.control.__getitem__)
    # The reference library numbers an added token by its entry in the model's vocabulary where it has one, and otherwise
    # counts on from the vocabulary's size: so ids that do not simply follow must be entries too, as SmolLM2's file has them.
    vocab = dict(model["vocab"])
    if any(tokenizer.control[token] != len(vocab) + i for i, token in enumerate(in_order)):
        vocab |= tokenizer.control
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokenizer.control[token], **_added(tokenizer, token)} for token in in_order],
        "normalizer": tokenizer.split.normalizer,
        "pre_tokenizer": tokenizer.split.pre_tokenizer,
        "post_processor": _post_processor(tokenizer, byte_level),
        "decoder": byte_level,
        "model": {**model, "vocab": vocab},
    }


def _post_processor(tokenizer: Tokenizer, byte_level: dict[str, object]) -> dict[str, object]:
    if not tokenizer.add_bos or tokenizer.bos is None:
        return byte_level
    token = tokenizer.decode([tokenizer.bos])
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    tokens = {token: {"id": token, "ids": [tokenizer.bos], "tokens": [token]}}
    template = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text, other], "special_tokens": tokens}
    return {"type": "Sequence", "processors": [byte_level, template]}


def _config(tokenizer: Tokenizer) -> dict[str, object]:
    def text(id: int | None) -> str | None:
        return None if id is None else tokenizer.decode([id])

    # Qwen2Tokenizer of the reference brings its own split and normalizer, so it is named only where they are ours too
    kind = "Qwen2Tokenizer" if tokenizer.split.same_as(QWEN2) else "PreTrainedTokenizerFast"
    config = {
        "add_bos_token": tokenizer.add_bos,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(id): _added(tokenizer, token) for token, id in sorted(tokenizer.control.items(), key=lambda x: x[1])},
        "additional_special_tokens": [token for token in tokenizer.control if token in tokenizer.special],
        "bos_token": text(tokenizer.bos),
        "clean_up_tokenization_spaces": False,
        "eos_token": text(tokenizer.eos[0]) if tokenizer.eos else None,
        "errors": "replace",
        "pad_token": text(tokenizer.pad),
        "split_special_tokens": False,
        "tokenizer_class": kind,
        "unk_token": None,
    }
    template = _chat_template(tokenizer)
    return config if template is None else config | {"chat_template": template}


def _chat_template(tokenizer: Tokenizer) -> str | None:
    """The checkpoint's own; without one the Jinja of Qwen2's format, in which we chat with such a model if it has its tokens."""
    if tokenizer.chat_template is None and all(token in tokenizer.control for token in CHAT_CONTROL):
        return QWEN2_JINJA.replace("SYSTEM", QWEN2_SYSTEM)
    return tokenizer.chat_template
