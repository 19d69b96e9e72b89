"""Cut copies: a piece of a longer document goes wherever it was cut, in any script; what shares a menu or a licence stays."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen2.data import cuts
from qwen2.data.execute import Place
from qwen2.data.prepare import prepare_text
from qwen2.data.recipe import Recipe, Source
from qwen2.data.report import gather
from qwen2.data.units import Text
from tests.data.test_prepare import prose, quiet


def english(seed: int) -> str:
    """One paragraph of 126 words."""
    return prose(seed).replace("\n", " ")


def english_lines(seed: int) -> str:
    """Sentences of which some are too short to be paragraphs of the exact step."""
    draw = random.Random(seed)
    words = english(seed).split()
    return "\n".join(" ".join(words[at : at + 7 + 8 * draw.randrange(2)]) for at in range(0, len(words), 15))


def chinese(seed: int) -> str:
    draw = random.Random(seed)
    return "".join("\u3002" if n % 17 == 16 else chr(0x4E00 + draw.randrange(900)) for n in range(300))


def thai(seed: int) -> str:
    draw = random.Random(seed)
    return "".join(" " if n % 23 == 22 else chr(0xE01 + draw.randrange(40)) + draw.choice(["", "\u0e32", "\u0e34"]) for n in range(400))


TEXTS: dict[str, Callable[[int], str]] = {"en": english, "lines": english_lines, "zh": chinese, "th": thai}
PIECES = {"half": (0.0, 0.5), "last-half": (0.5, 1.0), "70": (0.0, 0.7), "85": (0.0, 0.85), "middle": (0.27, 0.73), "small": (0.4, 0.65)}


def piece(text: str, name: str) -> str:
    first, last = PIECES[name]
    return text[int(first * len(text)) : int(last * len(text))]


def prepared(folder: Path, texts: dict[str, str], *steps: str, tasks: int = 3, workers: int = 1) -> tuple[dict[str, str], dict[str, int]]:
    """What stays, and how many documents went for which reason."""
    folder.mkdir(exist_ok=True)
    names = list(texts)
    for number in range(2):  # every second document in another file
        rows = [json.dumps({"id": name, "text": texts[name], "language": "en"}) + "\n" for name in names[number::2]]
        (folder / f"{number}.jsonl").write_text("".join(rows))
    thresholds = {"*": {"least_bytes": 1}}
    recipe = Recipe("test", (Source(path="0.jsonl"), Source(path="1.jsonl")), steps=steps, thresholds=thresholds, tasks=tasks)
    prepare_text(recipe, folder, None, folder / "out", Place(workers=workers), quiet)
    rows = [json.loads(line) for path in sorted(folder.glob("out/text/*.jsonl")) for line in path.read_text().splitlines()]
    found = gather(folder / "out")["steps"]
    why = {reason: count["documents"] for step in found for reason, count in step["outcomes"].items() if reason != "kept"}
    return {row["id"].partition(":")[2]: row["text"] for row in rows}, why


@pytest.mark.parametrize("language", TEXTS)
def test_pieces_go_and_whole_documents_stay(language: str, tmp_path: Path) -> None:
    """Half of them before their documents, half after them."""
    sources = {f"{name}-{n}": TEXTS[language](10 * at + n) for at, name in enumerate(PIECES) for n in range(6)}
    pieces = {f"piece-{name}": piece(text, name.rpartition("-")[0]) for name, text in sources.items()}
    early = {name: pieces[name] for name in list(pieces)[::2]}
    left, why = prepared(tmp_path, {**early, **sources, **pieces}, "exact", "near")
    assert left == sources
    assert why["part of a longer document"] > 24, "the others are near copies"
    assert sum(why.values()) == len(pieces)


def test_pieces_of_pieces_leave_the_longest(tmp_path: Path) -> None:
    text = english(7)
    left, _ = prepared(tmp_path, {"quarter": text[:200], "most": text[:-100], "again": english(8), "half": text[:400], "all": text}, "near")
    assert left == {"again": english(8), "all": text}


def test_what_goes_itself_takes_nothing_with_it(tmp_path: Path) -> None:
    """Two near copies and a piece of the first; the second is the longer one and stays, and one of all three does."""
    words = english(3).split()
    second = " ".join("other" if n == 124 else word for n, word in enumerate(words)) + " at the end"
    left, why = prepared(tmp_path, {"first": " ".join(words), "second": second, "piece": " ".join(words[10:90])}, "exact", "near")
    assert left.keys() == {"second"}
    assert why == {"near copy": 1, "part of a longer document": 1}


def test_paragraphs_stay_where_the_longer_document_does(tmp_path: Path) -> None:
    """A piece of whole paragraphs comes first: its document keeps them, and is not left with the others alone."""
    whole = prose(5)
    assert prepared(tmp_path, {"piece": "\n".join(whole.split("\n")[:5]), "whole": whole}, "exact", "near")[0] == {"whole": whole}


def test_false_hits_stay(tmp_path: Path) -> None:
    licence = english(100)
    menu = "\n".join(f"The {word} of it" for word in english(101).split()[:12])
    texts = {
        **{f"licence-{n}": f"{licence}\n{english(n)[:700]}" for n in range(4)},
        **{f"menu-{n}": f"{menu}\n{english(200 + n)[: 500 + n]}" for n in range(40)},
        "quote": f"{english(300)[:400]} {english(301)}",
        "quoted": english(300),
        "changed": " ".join(word if n % 7 else "other" for n, word in enumerate(english(301).split())),
        "short": "It is so.",
        "empty": ". . .",
    }
    left, why = prepared(tmp_path, texts, "near")
    assert left.keys() == texts.keys(), why
    assert why == {}


def test_a_document_that_loses_more_than_half_goes(tmp_path: Path) -> None:
    lines = [line.split("\n") for line in map(prose, range(4))]
    mixed = "\n".join([*lines[0][:3], *lines[1][2:6], "Its own.", *lines[2][:2], prose(9).split("\n")[0]])
    less = "\n".join([lines[3][0], *prose(10).split("\n")])
    left, why = prepared(tmp_path, {**{f"{n}": "\n".join(part) for n, part in enumerate(lines)}, "mixed": mixed, "less": less}, "exact")
    assert left.keys() == {"0", "1", "2", "3", "less"}
    assert left["less"] == prose(10)
    assert why == {"more than half copied": 1}


def collection() -> dict[str, str]:
    draw = random.Random(0)
    texts = {f"whole-{n}": TEXTS[draw.choice(list(TEXTS))](n) for n in range(40)}
    for n in range(40):
        text, other = texts[f"whole-{draw.randrange(40)}"], texts[f"whole-{draw.randrange(40)}"]
        first, share = draw.random() * 0.6, draw.random()
        cut = text[int(first * len(text)) : int((first + 0.4) * len(text))]
        texts[f"piece-{n}"] = cut + other[: int(share * len(cut))]
    return {name: texts[name] for name in draw.sample(list(texts), len(texts))}


def plain(texts: dict[str, str]) -> set[str]:
    """What goes by the rule, every pair compared."""
    runs = {name: set(Text(text).shingles(5).tolist()) for name, text in texts.items()}
    kept: list[str] = []
    for name in sorted(runs, key=lambda name: -len(runs[name])):
        if not any(len(runs[name] & runs[longer]) >= 0.8 * len(runs[name]) for longer in kept):
            kept.append(name)
    return texts.keys() - set(kept)


@pytest.mark.parametrize(("at_once", "workers"), [(2**22, 1), (300, 2)])
def test_the_rule_is_the_plain_one_however_it_is_worked_out(
    at_once: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "AT_ONCE", at_once)
    texts = collection()
    one_file = {}
    for name in [*list(texts)[::2], *list(texts)[1::2]]:  # as the two files are read
        one_file[name] = texts[name]
    left, why = prepared(tmp_path, texts, "near", tasks=5, workers=workers)
    assert 5 < why["part of a longer document"] < 35
    assert texts.keys() - left.keys() == plain(one_file)


def test_of_large_inputs_some_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {f"whole-{n}": "\n".join(english(10 * n + k) for k in range(4)) for n in range(12)}
    pieces = {f"piece-{n}": piece(whole[f"whole-{n}"], "half") for n in range(12)}
    short = {"short-1": english(1)[:80], "short": english(1)[:60]}
    monkeypatch.setattr(cuts, "WHOLE_BYTES", 20_000)
    left, _ = prepared(tmp_path, {**whole, **pieces, **short}, "near")
    assert cuts.one_of(map(str, tmp_path.glob("*.jsonl"))) == 4
    assert left == {**whole, **short}, "too short to be judged by a quarter of their runs"


def test_a_run_of_many_holders_makes_few_pairs() -> None:
    runs, places = np.repeat(np.arange(3, dtype=np.uint64), 1000), np.tile(np.arange(1000), 3)
    pairs, shared = cuts.sharing(runs, places)
    assert len(pairs) == sum(min(n, cuts.HOLDERS) for n in range(1000))
    assert set(shared.tolist()) == {3}
    assert all(pair & 0xFFFFFFFF < min(cuts.HOLDERS, pair >> 32) for pair in pairs.tolist())
    assert len(cuts.sharing(runs[:0], places[:0])[0]) == 0
