"""Manuals show English where nobody translated them: those lines are no text of the other language, and take none of its share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2.data import fetch as module
from qwen2.data.fetch import fetch
from qwen2.data.packages import PACKAGES
from qwen2.data.shards import sha256_of
from qwen2.data.texts import Archive, Wanted, write_texts
from tests.data.test_fetch import deb, help_page

ENGLISH = [f"Choose the command number {n} to open the dialog." for n in range(20)]
HINDI = [f"\u0938\u0902\u0935\u093e\u0926 \u0916\u094b\u0932\u0947\u0902 {n}" for n in range(9)]


def page(lines: list[str]) -> str:
    return "".join(f"<p>{line}</p>" for line in lines)


def texts(folder: Path, name: str) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (folder / "train" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["language"], row["text"]) for row in rows]


def test_lines_as_in_the_english_package_are_left_out_before_bytes_are_counted(tmp_path: Path) -> None:
    place = help_page(tmp_path, "hi", "").parent
    root = "usr/share/libreoffice/help/hi/text"
    pages = {f"{root}/{n}.html": page([*ENGLISH[: 9 + n], HINDI[n], *ENGLISH[9 + n :]]).encode() for n in range(9)}
    archive = deb(place / "libreoffice-help-hi_1_all.deb", {f"{root}/0-english.html": page(ENGLISH).encode(), **pages})
    english = help_page(tmp_path, "en-us", page([*ENGLISH, "OK"]))
    known = fetch({"libreoffice-help-hi": 80}, tmp_path / "corpus", say=lambda line: None)
    assert texts(tmp_path / "corpus", "libreoffice-help-hi") == [("hi", line) for line in HINDI[:3]], "80 bytes of Hindi"
    entry = known["packages"]["libreoffice-help-hi"]
    assert entry["english"] == {"package": "libreoffice-help-en-us", "version": "1", "sha256": sha256_of(english)}
    assert entry["skipped"] == {"enough of the language": 1, "line as in English": 100, "nothing but lines as in English": 1}
    assert list(known["packages"]) == ["libreoffice-help-hi"], "the English text itself was not asked for"
    beside = fetch({"libreoffice-help-en-us": 0, "libreoffice-help-hi": 0}, tmp_path / "corpus", say=lambda line: None)["packages"]
    assert beside["libreoffice-help-hi"]["sha256"] == sha256_of(archive)
    assert texts(tmp_path / "corpus", "libreoffice-help-hi") == [("hi", line) for line in HINDI]
    assert texts(tmp_path / "corpus", "libreoffice-help-en-us") == [("en", "\n".join([*ENGLISH, "OK"]))]
    assert beside["libreoffice-help-en-us"]["english"] is None


def test_an_archive_that_holds_the_english_text_itself(tmp_path: Path) -> None:
    def help_of(folder: str, lines: list[str]) -> tuple[str, bytes]:
        return f"usr/share/help/{folder}/gnome-help/a.page", f"<page>{page(lines)}</page>".encode()

    files = dict([help_of("tr", ENGLISH), help_of("hi", [*ENGLISH[:5], *HINDI]), help_of("C", ENGLISH)])  # the English one comes last
    archive = Archive(deb(tmp_path / "gnome-user-docs_1_all.deb", files), "1")
    entry = write_texts(Wanted(PACKAGES["gnome-user-docs"]), archive, tmp_path)
    assert entry["english"]["sha256"] == entry["sha256"]
    assert texts(tmp_path, "gnome-user-docs") == [("hi", "\n".join(HINDI)), ("en", "\n".join(ENGLISH))]


def test_text_that_was_taken_out_otherwise_is_made_again(tmp_path: Path) -> None:
    """As by an earlier version, whose entries do not say how."""
    help_page(tmp_path, "hi", page([*ENGLISH, *HINDI]))
    help_page(tmp_path, "en-us", page(ENGLISH))
    corpus = tmp_path / "corpus"
    first = fetch({"libreoffice-help-hi": 0}, corpus, say=lambda line: None)
    for change in ({}, {"extraction": 1}):
        older = json.loads((corpus / "corpus.json").read_text())
        entry = older["packages"]["libreoffice-help-hi"]
        del entry["extraction"]
        older["packages"]["libreoffice-help-hi"] = {**entry, **change}
        (corpus / "corpus.json").write_text(json.dumps(older))
        said: list[str] = []
        assert fetch({"libreoffice-help-hi": 0}, corpus, say=said.append) == first
        assert said[-1].startswith("libreoffice-help-hi 1: 1 documents")


def test_without_the_english_text_there_is_none_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that depended on what happened to be there would be another one tomorrow."""
    help_page(tmp_path, "hi", page(HINDI))
    monkeypatch.setenv("PATH", str(tmp_path))
    said: list[str] = []
    with pytest.raises(
        ValueError, match="libreoffice-help-en-us, whose lines are left out of it, cannot be had: apt-get is not installed here"
    ):
        fetch({"libreoffice-help-hi": 0}, tmp_path / "corpus", say=said.append)
    assert said[0] == "training text of 0 of 29 languages can be had here"
    assert said[1].startswith("apt-get is not installed here, which 1 of 1 packages need")


def test_every_package_names_an_english_text_that_there_is() -> None:
    for package in PACKAGES.values():
        assert not package.english or "en" in module.PACKAGES[package.english].codes, package.name
