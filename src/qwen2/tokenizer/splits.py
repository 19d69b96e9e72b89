"""How text is normalised and cut before BPE: the published patterns, and the names that GGUF files give them.

A row is here only where the result is exactly the reference's. What is left out: every other `tokenizer.ggml.pre`; a wrong
pattern gives plausible but wrong ids, so an unknown name is an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

Spec = dict[str, object]

QWEN2_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Split:
    """The normalizer and pre-tokenizer in the notation of tokenizer.json."""

    normalizer: Spec | None
    pre_tokenizer: Spec
    ignore_merges: bool = False  # a piece that is a whole vocabulary entry is taken without merging

    def same_as(self, other: Split) -> bool:
        """Equal in effect: the fields that only matter for offsets do not count."""
        return _essence(self) == _essence(other)


def _byte_level(use_regex: bool) -> Spec:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}


def _sequence(*steps: Spec) -> Spec:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def by_pattern(pattern: str) -> Spec:
    """Cut where the pattern matches, then spell bytes."""
    split: Spec = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _sequence(split, _byte_level(use_regex=False))


def _essence(split: Split) -> str:
    def keep(value: object) -> object:
        if isinstance(value, dict):
            return {k: keep(v) for k, v in value.items() if k != "trim_offsets"}
        return [keep(v) for v in value] if isinstance(value, list) else value

    return json.dumps([keep(split.normalizer), keep(split.pre_tokenizer), split.ignore_merges], sort_keys=True)


QWEN2 = Split({"type": "NFC"}, by_pattern(QWEN2_PATTERN))
GPT2 = Split(None, _byte_level(use_regex=True))
SMOLLM = Split(None, _sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)))
LLAMA3 = Split(None, by_pattern(LLAMA3_PATTERN), ignore_merges=True)

GGUF_SPLITS = {  # tokenizer.ggml.pre -> split; the first name of equal rows is the one written
    "qwen2": QWEN2,
    "gpt-2": GPT2,
    "smollm": SMOLLM,
    "starcoder": SMOLLM,
    "refact": SMOLLM,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
}


def gguf_name(split: Split) -> str:
    """The name that llama.cpp knows this split by, or ValueError."""
    for name, known in GGUF_SPLITS.items():
        if known.same_as(split):
            return name
    raise ValueError(f"this tokenizer's split has no GGUF name; those that can be written are {', '.join(GGUF_SPLITS)}")
