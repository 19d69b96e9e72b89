"""Vocabularies from files: tokenizer.json, vocab.json + merges.txt, a tiktoken file, or a folder that has one of them.

All of them end as `Parts`. A file that is not byte-level BPE, or asks for something we do not do, is a ValueError naming it.
What is left out: sentencepiece models, `single_word`, `lstrip` and `rstrip` of added tokens (no Qwen tokenizer uses them).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from qwen2.tokenizer.alphabet import to_chars
from qwen2.tokenizer.parts import END_OF_TEXT, QWEN2_CONTROL, Parts, end_ids, without_control
from qwen2.tokenizer.splits import Split

MAX_BYTES = 2**26  # ten times a tokenizer.json of Qwen2

# --- tokenizer.json


def json_parts(path: Path) -> Parts:
    """A tokenizer.json; it does not say which token ends a text, so that is `<|endoftext|>` where there is one."""
    spec = _read_object(path)
    model = _need(spec, "model", dict, path)
    _refuse_other_models(spec, model, path)
    merges = [_merge(entry, path) for entry in _need(model, "merges", list, path)]
    added = _need({"added_tokens": [], **spec}, "added_tokens", list, path)
    control = {_added_token(entry, path): entry["id"] for entry in added}
    parts = without_control(_need(model, "vocab", dict, path), merges, control)
    split = Split(spec.get("normalizer"), spec["pre_tokenizer"], bool(model.get("ignore_merges")))
    bos = _leading_token(spec.get("post_processor"), control)
    special = frozenset(entry["content"] for entry in added if entry.get("special"))
    return replace(
        parts, split=split, special=special, eos=end_ids(None, control), pad=control.get(END_OF_TEXT), bos=bos, add_bos=bos is not None
    )


def _refuse_other_models(spec: dict[str, Any], model: dict[str, Any], path: Path) -> None:
    wanted = {
        "type": ("BPE", None),
        "dropout": (None, 0),
        "byte_fallback": (False, None),
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": (None, ""),
    }
    for key, values in wanted.items():
        if model.get(key) not in values:
            raise ValueError(f"{path}: model.{key} is {shown(model[key])}; only plain byte-level BPE is supported")
    if '"ByteLevel"' not in json.dumps(spec.get("pre_tokenizer")):
        raise ValueError(f"{path}: the pre-tokenizer is not byte-level; sentencepiece-like vocabularies are not supported")


def _merge(entry: object, path: Path) -> tuple[str, str]:
    pair = entry.split(" ") if isinstance(entry, str) else entry
    if isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair):
        return pair[0], pair[1]
    raise ValueError(f"{path}: {shown(entry)} is not a merge; a merge is two tokens")


def _added_token(entry: object, path: Path) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not isinstance(entry.get("id"), int):
        raise ValueError(f"{path}: {shown(entry)} is not an added token; it needs content and id")
    for flag in ("single_word", "lstrip", "rstrip"):
        if entry.get(flag):
            raise ValueError(f"{path}: added token {shown(entry['content'])} has {flag}, which is not supported")
    return str(entry["content"])


def _leading_token(post_processor: object, control: Mapping[str, int]) -> int | None:
    """The token that a template post-processor puts before every text, as Llama's does; None for Qwen's."""
    match post_processor:
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(token)}}, *_]}:
            return control.get(token)
        case {"type": "Sequence", "processors": [*steps]}:
            return next((found for step in steps if (found := _leading_token(step, control)) is not None), None)
    return None


# --- vocab.json + merges.txt, tiktoken


def vocab_merges_parts(vocab: Path, merges: Path, control: Mapping[str, int] | None = None) -> Parts:
    """GPT-2's pair of files. Only the first line of merges.txt may be a `#version` comment: `# #` is a merge."""
    lines = _read_text(merges).split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    pairs = [_merge(line, merges) for line in lines if line]
    return _with_defaults(without_control(_read_object(vocab), pairs, QWEN2_CONTROL if control is None else control))


def tiktoken_parts(path: Path, control: Mapping[str, int] | None = None) -> Parts:
    """Lines of `base64 rank`. A token's merge is the pair that its bytes come down to under the merges of lower rank."""
    ranks = _read_ranks(path)
    vocab = {to_chars(token): rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            left, right = _last_merge(token, ranks, path)
            merges.append((to_chars(left), to_chars(right)))
    return _with_defaults(without_control(vocab, merges, QWEN2_CONTROL if control is None else control))


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read_bytes(path).splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}, line {number}: {line[:60]!r} is not `base64 rank`") from None
    return ranks


def _last_merge(token: bytes, ranks: Mapping[bytes, int], path: Path) -> tuple[bytes, bytes]:
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        pairs = [ranks.get(a + b, ranks[token]) for a, b in pairwise(pieces)]
        best = min(pairs)
        if best >= ranks[token]:
            break
        at = pairs.index(best)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    if len(pieces) != 2:
        raise ValueError(f"{path}: token {shown(token)} of rank {ranks[token]} cannot be built from two tokens of lower rank")
    return pieces[0], pieces[1]


def _with_defaults(parts: Parts) -> Parts:
    return replace(parts, eos=end_ids(None, parts.control), pad=parts.control.get(END_OF_TEXT))


# --- a folder


def folder_parts(folder: Path) -> Parts:
    """A Hugging Face folder. tokenizer_config.json says what ends, begins and pads a text, and holds the chat template."""
    config_path = folder / "tokenizer_config.json"
    config = _read_object(config_path) if config_path.exists() else {}
    if (folder / "tokenizer.json").exists():
        parts = json_parts(folder / "tokenizer.json")
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        control, special = _config_control(config, folder)
        parts = vocab_merges_parts(folder / "vocab.json", folder / "merges.txt", control)
        parts = replace(parts, special=special)
    else:
        parts = tiktoken_parts(_only_tiktoken(folder))
    return _with_config(parts, config, folder)


def _only_tiktoken(folder: Path) -> Path:
    found = sorted(folder.glob("*.tiktoken"))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder}: no tokenizer.json, no vocab.json with merges.txt, and {len(found)} *.tiktoken files")
    return found[0]


def _config_control(config: Mapping[str, object], folder: Path) -> tuple[dict[str, int] | None, frozenset[str] | None]:
    """Added tokens where tokenizer.json is missing: from the configuration, else added_tokens.json, else None (Qwen2's three)."""
    path = folder / "tokenizer_config.json"
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        entries = [{**entry, "id": int(id)} for id, entry in decoder.items()]
        return {_added_token(e, path): e["id"] for e in entries}, frozenset(e["content"] for e in entries if e.get("special"))
    if (folder / "added_tokens.json").exists():
        return _read_object(folder / "added_tokens.json"), None
    return None, None


@dataclass(frozen=True)
class _Named:
    """The tokens that a configuration names by their text."""

    config: Mapping[str, object]
    parts: Parts
    path: Path

    def id(self, key: str) -> int | None:
        value = self.config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            return None
        found = self.parts.control.get(text, self.parts.vocab.get(text)) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"{self.path}: {key} is {shown(text)}, which is not in the vocabulary")
        return found


def _with_config(parts: Parts, config: Mapping[str, object], folder: Path) -> Parts:
    named = _Named(config, parts, folder / "tokenizer_config.json")
    bos = named.id("bos_token")
    pad = named.id("pad_token")
    add_bos = config.get("add_bos_token")
    return replace(
        parts,
        eos=end_ids(named.id("eos_token"), parts.control),
        bos=parts.bos if bos is None else bos,
        pad=parts.pad if pad is None else pad,
        add_bos=parts.add_bos if add_bos is None else bool(add_bos),
        chat_template=chat_template_of(config, folder),
    )


def chat_template_of(config: Mapping[str, object], folder: Path) -> str | None:
    """The Jinja text: a file of its own in newer checkpoints; where several are named in the config, the one called default."""
    if (folder / "chat_template.jinja").exists():
        return _read_text(folder / "chat_template.jinja")
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template is {type(value).__name__}, not text")
    return value


# --- files with their names in every complaint


def _read_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path}: {size} bytes is no tokenizer file; at most {MAX_BYTES} are read")
    return path.read_bytes()


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    data = _read_bytes(path)
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, not an object")
    return value


def _need(spec: Mapping[str, object], key: str, kind: type, path: Path) -> Any:
    value = spec.get(key)
    if not isinstance(value, kind):
        raise ValueError(f"{path}: {key} is missing or not a {kind.__name__}")
    return value
