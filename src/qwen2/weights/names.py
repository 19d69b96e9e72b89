"""Names of models: `family:tag`, by a grammar so strict that a name is safe as a path on every file system.

Lower-case letters and digits, joined by single `.`, `-` or `_`; no separators of paths, no `..`, no device names of Windows.
What is left out: which names stand for something (`registry.py`).

    parse("qwen2.5-coder:0.5b")     # Name(family='qwen2.5-coder', tag='0.5b')
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

WORD = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*", re.ASCII)
LONGEST = 64
HUB_NAME = re.compile(r"(https?://|hf\.co/|huggingface\.co/|modelscope\.cn/)\S+|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.:-]*", re.ASCII)
ONLY_LISTED = "of the hubs' names only those of qwen2 list --all are known: download others yourself and run qwen2 cp ./FILE NAME:TAG"
DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(10))}


@dataclass(frozen=True)
class Name:
    """A model's name; `tag` None where only the family was given."""

    family: str
    tag: str | None = None

    def __str__(self) -> str:
        return self.family if self.tag is None else f"{self.family}:{self.tag}"


def parse(text: str) -> Name:
    """Read `family` or `family:tag`, in any case; ValueError for everything that the grammar does not know."""
    if not text.strip():
        raise ValueError("the model's name is empty")
    if is_hub_like(text):
        raise ValueError(f"{text:.80}: {ONLY_LISTED}")
    family, colon, tag = text.lower().partition(":")
    if not text.isascii() or not _is_word(family) or (colon and not _is_word(tag)):  # some letters become ASCII by lower()
        quoted = text if len(text) <= 80 else f"{text[:80]}..."
        raise ValueError(
            f"{quoted!r} is not a model's name: write family:tag in letters, digits and single . - _ (such as qwen2.5-coder:0.5b), "
            "or ./PATH for a file or folder"
        )
    return Name(family, tag if colon else None)


def is_hub_like(text: str) -> bool:
    """Whether it looks like a repository on a hub: Owner/Name, or an address."""
    return HUB_NAME.fullmatch(text) is not None and not text.endswith((".gguf", ".safetensors"))


def nearest(text: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names that look most like this one, best first."""
    return get_close_matches(text.lower(), list(known), n=count, cutoff=0.5)


def _is_word(text: str) -> bool:
    return len(text) <= LONGEST and WORD.fullmatch(text) is not None and text.split(".")[0] not in DEVICES
