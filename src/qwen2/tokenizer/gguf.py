"""The tokenizer.* keys of a GGUF file, read and written.

Only byte-level BPE (`tokenizer.ggml.model` = gpt2) with a split that we do exactly. Types: 1 text, 2 unknown and 3 control and
4 user-defined (all three out of reach of ordinary text here), 5 unused (the [PADn] rows, which decode to nothing), 6 byte.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import numpy as np

from qwen2.tokenizer.parts import Parts, check_control_count, end_ids, without_control
from qwen2.tokenizer.splits import GGUF_SPLITS, Split, gguf_name

if TYPE_CHECKING:
    from qwen2.tokenizer.tokenizer import Tokenizer

KINDS = TEXT, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
KEY = "tokenizer.ggml."


def gguf_parts(metadata: Mapping[str, object]) -> Parts:
    """The vocabulary in a GGUF file's metadata; ValueError names what is missing or not supported."""
    split = _split(metadata)
    tokens, types, merges = (_array(metadata, key) for key in ("tokens", "token_type", "merges"))
    if len(tokens) != len(types):
        raise ValueError(f"{KEY}tokens has {len(tokens)} entries, {KEY}token_type {len(types)}")
    check_control_count(sum(map(types.count, (UNKNOWN, CONTROL, USER_DEFINED))))
    if set(map(type, tokens)) - {str} or set(map(type, types)) - {int} or set(types) - set(KINDS):
        _complain(tokens, types)
    kinds = np.array(types, dtype=np.int8)
    others = {id: types[id] for id in np.flatnonzero((kinds != TEXT) & (kinds != BYTE)).tolist()}
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocab) == len(tokens):  # faster than entry by entry
        for id in others:
            del vocab[tokens[id]]
    else:
        vocab = {token: id for id, token in enumerate(tokens) if id not in others}
    others = {id: kind for id, kind in others.items() if kind != UNUSED}
    control = {tokens[id]: id for id in others}
    if len(vocab) + len(control) + types.count(UNUSED) < len(tokens) or vocab.keys() & control.keys():
        _complain(tokens, types)
    special = frozenset(tokens[id] for id, kind in others.items() if kind in (UNKNOWN, CONTROL))
    parts = without_control(vocab, _merges(merges), control)
    return _with_ids(replace(parts, special=special, split=split), metadata, len(tokens))


def _complain(tokens: Sequence[object], types: Sequence[object]) -> NoReturn:
    """Name the entry that is wrong."""
    seen: dict[object, int] = {}
    for id, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if not isinstance(token, str) or type(kind) is not int or kind not in KINDS:
            raise ValueError(f"{KEY}tokens: entry {id} is {shown(token)} of type {shown(kind)}; types go from 1 to 6")
        if kind == UNUSED:
            continue
        if token in seen:
            raise ValueError(f"{KEY}tokens: {shown(token)} is there twice, at {seen[token]} and {id}")
        seen[token] = id
    raise AssertionError("called for entries of which one is wrong")


def _split(metadata: Mapping[str, object]) -> Split:
    model = metadata.get(KEY + "model")
    if model != "gpt2":
        known = "a sentencepiece vocabulary" if model == "llama" else "not known"
        raise ValueError(f"{KEY}model is {shown(model)}, {known}; only byte-level BPE ('gpt2') is supported")
    pre = metadata.get(KEY + "pre")
    if not isinstance(pre, str) or pre not in GGUF_SPLITS:
        raise ValueError(f"{KEY}pre is {shown(pre)}; the splits known exactly are {', '.join(GGUF_SPLITS)}")
    return GGUF_SPLITS[pre]


def _array(metadata: Mapping[str, object], key: str) -> list[Any]:
    value = metadata.get(KEY + key)
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ValueError(f"{KEY}{key} is missing or not an array")
    return list(value)


def _merges(entries: Sequence[object]) -> list[tuple[str, str]]:
    if not set(map(type, entries)) - {str}:
        text = "\0".join(entries)  # type: ignore[arg-type]
        data = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
        cuts = data[(data == ord(" ")) | (data == 0)]
        if len(cuts) == max(0, 2 * len(entries) - 1) and (cuts[0::2] == ord(" ")).all() and (cuts[1::2] == 0).all():  # in each entry one
            tokens = text.replace("\0", " ").split(" ") if entries else []
            if all(tokens):
                return list(zip(tokens[0::2], tokens[1::2], strict=True))
    wrong = next(
        entry
        for entry in entries
        if not isinstance(entry, str) or "\0" in entry or entry.count(" ") != 1 or entry[0] == " " or entry[-1] == " "
    )
    raise ValueError(f"{KEY}merges: {shown(wrong)} is not two tokens with a space between")


def _with_ids(parts: Parts, metadata: Mapping[str, object], count: int) -> Parts:
    def id_of(key: str) -> int | None:
        value = metadata.get(KEY + key)
        if value is None:
            return None
        if not isinstance(value, SupportsIndex) or not 0 <= operator.index(value) < count:
            raise ValueError(f"{KEY}{key} is {shown(value)}; ids go from 0 to {count - 1}")
        return operator.index(value)

    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"tokenizer.chat_template is {type(template).__name__}, not text")
    return replace(
        parts,
        eos=end_ids(id_of("eos_token_id"), parts.control),
        bos=id_of("bos_token_id"),
        pad=id_of("padding_token_id"),
        # llama.cpp puts the first token before Llama 3 texts unless the file says no, and before none of the others
        add_bos=bool(metadata.get(KEY + "add_bos_token", parts.split.ignore_merges)),
        chat_template=template,
    )


def to_gguf(tokenizer: Tokenizer, vocab_size: int | None = None) -> dict[str, object]:
    """The tokenizer.* metadata; ids up to `vocab_size` that have no entry become unused `[PADn]`."""
    size = tokenizer.vocab_size if vocab_size is None else vocab_size
    if size < tokenizer.vocab_size:
        raise ValueError(f"{size} rows are too few for a vocabulary of {tokenizer.vocab_size}")
    model = tokenizer.model_spec()
    tokens, types = [f"[PAD{id}]" for id in range(size)], [UNUSED] * size
    for token, id in model["vocab"].items():
        tokens[id], types[id] = token, TEXT
    for token, id in tokenizer.control.items():
        # as llama.cpp's own converter: what looks like `<|...|>` is of the control type, special or not
        is_control = token in tokenizer.special or (token.startswith("<|") and token.endswith("|>"))
        tokens[id], types[id] = token, CONTROL if is_control else USER_DEFINED
    fields: dict[str, object] = {
        "model": "gpt2",
        "pre": gguf_name(tokenizer.split),
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in model["merges"]],
        "eos_token_id": tokenizer.eos[0] if tokenizer.eos else None,
        "bos_token_id": tokenizer.bos,
        "padding_token_id": tokenizer.pad,
        "add_bos_token": tokenizer.add_bos,
    }
    keys = {KEY + key: value for key, value in fields.items() if value is not None}
    return keys if tokenizer.chat_template is None else keys | {"tokenizer.chat_template": tokenizer.chat_template}
