"""How well vocabularies fit a text: bytes a token, by language. More is better: fewer tokens to train on and to answer with.

What is left out: how well a model learns with them; bits per byte after training says that.

    measure({"ours": ours, "released": released}, read_texts(["held-out/"]))["de"].per_token["ours"]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qwen2.tokenizer.texts import Text
from qwen2.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Fit:
    """Of one language: UTF-8 bytes that were encoded, and the tokens that each vocabulary made of them."""

    bytes: int
    tokens: dict[str, int]

    @property
    def per_token(self) -> dict[str, float]:
        """Bytes a token."""
        return {name: self.bytes / tokens for name, tokens in self.tokens.items()}


def measure(tokenizers: Mapping[str, Tokenizer], texts: Iterable[Text], most: int | None = None) -> dict[str, Fit]:
    """Encode the texts with each vocabulary; `most` bytes of a language at most, the first ones. Languages in alphabetical order.

    Raises ValueError where there is no text.
    """
    sizes: dict[str, int] = {}
    tokens: dict[str, dict[str, int]] = {}
    for language, text in texts:
        before = sizes.get(language, 0)
        if not text or (most is not None and before >= most):
            continue
        sizes[language] = before + len(text.encode("utf-8", "surrogatepass"))
        counts = tokens.setdefault(language, dict.fromkeys(tokenizers, 0))
        for name, tokenizer in tokenizers.items():
            counts[name] += len(tokenizer.encode(text))
    if not sizes:
        raise ValueError("there is no text to measure on: the files are empty")
    return {language: Fit(sizes[language], tokens[language]) for language in sorted(sizes)}


def overall(fits: Mapping[str, Fit]) -> dict[str, float]:
    """Bytes a token of each vocabulary, the mean over languages, each counting alike."""
    names = next(iter(fits.values())).tokens
    return {name: sum(fit.per_token[name] for fit in fits.values()) / len(fits) for name in names}
