"""Conversations out of packages: what becomes a turn, which languages, what is counted; and that no recipe takes them for text."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from qwen2.data.extract import instructions
from qwen2.data.packages import PACKAGES
from qwen2.data.recipe import Source
from qwen2.data.texts import Archive, Wanted, write_texts
from qwen2.post.rows.formats import record
from qwen2.post.rows.records import Preference


def test_conversations(tmp_path: Path) -> None:
    corpus = b"categories:\n- food\nconversations:\n- - Eat?\n  - Never.\n  - Why?\n- - 'Yes: no'\n- - A\n  - ''\n"
    broken = b"conversations:\n- - [\n"
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for language, data in (("english", corpus), ("german", broken), ("klingon", corpus)):
            archive.writestr(f"chatterbot_corpus/data/{language}/food.yml", data)
    entry = write_texts(Wanted(PACKAGES["chatterbot-corpus"]), Archive(tmp_path / "a.whl", "1"), tmp_path)
    (line,) = (tmp_path / "chat" / "chatterbot-corpus.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [{"role": "user", "content": "Eat?"}, {"role": "assistant", "content": "Never."}]
    assert json.loads(line) == {"id": "chatterbot-corpus/en/0", "messages": turns, "language": "en"}
    assert entry["skipped"] == {"file not read: ValueError": 1, "language not among the 29": 1}
    rows = [{"instruction": "Add.", "input": "1, 2", "output": "3"}, {"instruction": "Go.", "input": "", "output": " "}]
    (found,) = instructions("x/data/alpaca_zh_demo.json", json.dumps(rows).encode(), {})
    assert (found[0], [turn["content"] for turn in json.loads(found[1])["messages"]]) == ("zh", ["Add.\n1, 2", "3"])
    with pytest.raises(ValueError, match="holds conversations, for qwen2 sft"):
        Source(package="chatterbot-corpus")


def test_preferences(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}]
    sides = {"chosen": {"from": "gpt", "value": "Hello!"}, "rejected": {"from": "gpt", "value": "Go."}}
    rows = [{"conversations": turns, **sides}, {"conversations": turns, **sides, "rejected": {"from": "gpt", "value": " "}}]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("llamafactory-0.9.5/data/dpo_en_demo.json", json.dumps(rows))
    write_texts(Wanted(PACKAGES["llamafactory-pairs"]), Archive(tmp_path / "a.zip", "1"), tmp_path)
    (line,) = (tmp_path / "preferences" / "llamafactory-pairs.jsonl").read_text(encoding="utf-8").splitlines()
    made = record(json.loads(line), "line 1", Counter())
    assert isinstance(made, Preference)
    assert [message["content"] for message in made.messages] == ["Be kind.", "Hi"]
    assert (made.chosen[-1]["content"], made.rejected[-1]["content"]) == ("Hello!", "Go.")
    with pytest.raises(ValueError, match="holds pairs of answers, for qwen2 dpo"):
        Source(package="llamafactory-pairs")
