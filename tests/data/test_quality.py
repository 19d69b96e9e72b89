"""The quality classifier: it tells spoilt text from good text that it never saw, and is the same when learned again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen2.data import quality
from qwen2.data.quality import DAMAGE, Classifier, auc, learn


@pytest.fixture(scope="module")
def documents(articles: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(code, paragraph) for code, paragraphs in articles.items() for paragraph in paragraphs]


def test_it_tells_damage_from_text(documents: list[tuple[str, str]], tmp_path: Path) -> None:
    classifier, measured = learn(documents, seed=0)
    assert measured["held_out"] > 40
    assert measured["auc"] > 0.8
    classifier.save(tmp_path / "quality.npz")
    again, same = learn(documents, seed=0)
    assert same == measured
    loaded = Classifier.load(tmp_path / "quality.npz")
    assert [loaded.score(text) for _, text in documents[:20]] == [again.score(text) for _, text in documents[:20]]
    assert loaded.score("") == 0.0


def test_every_kind_of_damage_changes_every_language(documents: list[tuple[str, str]]) -> None:
    for kind, spoil in DAMAGE.items():
        for code, text in documents[::5]:
            assert spoil(text, random.Random(1)) != text, (kind, code)


def test_too_little_to_learn_from_is_an_error(documents: list[tuple[str, str]]) -> None:
    with pytest.raises(ValueError, match="12 documents to learn quality from: 50 are needed"):
        learn(documents[:12], seed=0)


def test_the_smallest_hashes_of_each_language_are_chosen_as_documents_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as by sorting all of them, in whatever order they come, and no more than that many are held at a time."""
    monkeypatch.setattr(quality, "MOST", 60)
    documents = [(code, f"{code} {n}") for code, count in (("en", 500), ("de", 90), ("lo", 7)) for n in range(count)] * 2
    random.Random(3).shuffle(documents)
    ranked = sorted(set(documents), key=lambda one: (one[0], quality.number_of(one[1], 6)))
    by_sorting = [one for code in ("de", "en", "lo") for one in [one for one in ranked if one[0] == code][:20]]
    held: list[int] = []
    piles: list[quality.Smallest] = []
    monkeypatch.setattr(quality, "Smallest", lambda real=quality.Smallest: piles.append(real()) or piles[-1])

    def coming() -> Iterator[tuple[str, str]]:
        for one in documents:
            yield one
            held.append(sum(len(pile.texts()) for pile in piles))

    assert quality.balanced(coming(), seed=5) == by_sorting
    assert max(held) <= 60


def test_the_area_under_the_curve() -> None:
    assert auc([3.0, 4.0], [1.0, 2.0]) == 1.0
    assert auc([1.0, 4.0], [2.0, 3.0]) == 0.5
    assert auc([1.0], [1.0]) == 0.5
    assert auc([1.0, 2.0, 5.0], [1.0, 0.5]) == pytest.approx(5.5 / 6, abs=1e-4)
