"""What holds for the page's files as they lie there: no markup from texts, nothing from elsewhere, small units, a true map."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).parents[2]
WEB = ROOT / "src" / "qwen2" / "server" / "web"
SCRIPTS = sorted((WEB / "app").glob("*.js"))
STYLES = sorted((WEB / "style").glob("*.css"))
INDEX = WEB / "index.html"


def test_no_text_becomes_markup() -> None:
    """The renderer's sanitiser is the one place where HTML is parsed; styles and scripts stand in files, as the policy wants it."""
    for path in SCRIPTS:
        found = re.search(r"innerHTML|outerHTML\s*=|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser", path.read_text())
        assert found is None, f"{path.name}: {found and found.group()}"
    markup = INDEX.read_text()
    assert re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", markup) is None


def test_nothing_is_asked_of_another_host() -> None:
    for path in [*SCRIPTS, *STYLES, INDEX]:
        found = re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(\s*[\"']?//", path.read_text())
        assert found is None, f"{path.name}: {found and found.group()}"


def test_files_of_the_page_are_short_and_on_the_map() -> None:
    chapter = (ROOT / "docs" / "architecture.md").read_text().partition("### The page, ")[2].partition("\n### ")[0]
    named = set(re.findall(r"`(\w+\.js)`", chapter))
    assert named == {path.name for path in SCRIPTS}
    for path in [*SCRIPTS, INDEX]:
        assert len(path.read_text().splitlines()) <= 400, f"{path.name} is longer than 400 lines: split it by its idea"


def test_every_element_that_is_named_is_there() -> None:
    """Ids that the scripts ask for, icons that they show, files that the page links."""
    markup = INDEX.read_text()
    ids = set(re.findall(r'\sid="([\w-]+)"', markup))
    text = "\n".join(path.read_text() for path in SCRIPTS)
    assert set(re.findall(r'\$\("([\w-]+)"\)', text)) <= ids
    icons = set(re.findall(r'\b(?:icon|iconButton)\("(\w+)"', text)) | set(re.findall(r'icon: "(\w+)"', text))
    assert {f"i-{name}" for name in icons} <= ids
    assert set(re.findall(r'href="#([\w-]+)"', markup)) <= ids
    for link in re.findall(r'(?:href|src)="web/([^"]+)"', markup):
        assert (WEB / link).is_file(), link


def test_no_two_rules_say_the_same() -> None:
    """What several kinds of elements have in common, and each colour of a scheme, has one place."""
    rules = []
    for path in STYLES:
        text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", text):
            rules.append((f"{path.name}: {' '.join(selector.split())}", {" ".join(one.split()) for one in body.split(";") if one.strip()}))
    assert len(rules) > 200
    alike = {f"{one} | {other}": said & also for (one, said), (other, also) in combinations(rules, 2) if len(said & also) > 5}
    assert alike == {}
