"""`runs/tiny.sh --quick`: from the quick base model to one that answers, every step real, and what it leaves.

How recipes go on where they were interrupted is tested in test_base.py and test_stages.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen2.engine.llm import LLM
from qwen2.engine.request import SamplingParams
from tests.runs.conftest import recipe

STAGES = [
    "chats", "problems", "before", "sft", "after-sft", "sft-twice", "after-twice", "reject-1", "sft-1", "after-sft-1", "reject-2",
    "dpo", "after-dpo", "chat-model", "answers",
]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.xdist_group("recipes")]


@pytest.fixture(scope="module")
def run(quick_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    done = recipe("tiny.sh", "--quick", quick_base, out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def found(run: Path) -> dict[str, dict[str, Any]]:
    return {stage["name"]: stage for stage in json.loads((run / "report.json").read_text())["stages"]}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_stage_has_its_figures_behind_those_of_the_base(found: dict[str, dict[str, Any]]) -> None:
    assert list(found)[-len(STAGES) :] == STAGES
    assert list(found)[:3] == ["corpus", "texts", "tokenizer"]
    held_out = found["problems"]["rows"]["held-out.jsonl"]
    for name in ("before", "after-sft", "after-twice", "after-sft-1", "after-dpo"):
        match = found[name]["exact_match"]
        assert match["count"] == held_out
        assert match["low"] <= match["value"] <= match["high"]
        assert len(found[name]["bits_per_byte"]) == 29
    assert found["before"]["exact_match"]["value"] == 0
    assert found["sft"]["held_out"]["after"]["held-out loss"] < 0.8 * found["sft"]["held_out"]["before"]["held-out loss"]
    for name in ("reject-1", "reject-2"):
        assert found[name]["sft_rows"] > 0
        assert found[name]["answers"] == 16 * found[name]["prompts"]
    assert found["reject-2"]["pairs"] > 0
    assert all(answer["text"] for answer in found["answers"]["samples"])


def test_what_is_learned_again_is_right_and_what_is_measured_was_never_seen(run: Path) -> None:
    answers = {row["prompt"]: row["answer"] for row in lines(run / "problems" / "train.jsonl")}
    held_out = {row["prompt"] for row in lines(run / "problems" / "held-out.jsonl")}
    learned = [row["messages"] for name in ("reject-1", "reject-2") for row in lines(run / name / "sft.jsonl")]
    for asked, answer in learned:
        assert str(answers[asked["content"]]) in answer["content"]
    shown = {row["messages"][0]["content"] for row in lines(run / "problems" / "sft.jsonl")}
    assert not held_out & {asked["content"] for asked, _ in learned}
    assert not held_out & shown


def test_llama_cpp_loads_the_quantized_file(run: Path, llama_cpp: Callable[[Path, str, int], dict[str, Any]]) -> None:
    """The same ids of a rendered question, and an answer; whose words, 8 bits and rounded inputs may decide in so small a model."""
    model = LLM(run / "model" / "tiny-q8_0.gguf").model
    rendered = model.template.render([{"role": "user", "content": "What is 3 + 4?"}])
    found = llama_cpp(run / "model" / "tiny-q8_0.gguf", rendered.text, 12)
    assert found["prompt"] == list(rendered.ids)
    assert model.tokenizer.decode(found["ids"]).strip()


def test_the_quantized_file_answers_as_the_folder_does(run: Path) -> None:
    asked = [{"role": "user", "content": "What is 3 + 4?"}]
    params = SamplingParams(temperature=0, max_tokens=12)
    folder, gguf = (LLM(run / "model" / name) for name in ("tiny", "tiny-q8_0.gguf"))
    assert folder.model.generation.eos == gguf.model.generation.eos
    assert folder.ask(asked, params).request.prompt == gguf.ask(asked, params).request.prompt
    assert folder.chat(asked, params).text[:4] == gguf.chat(asked, params).text[:4]


def test_the_page_goes_on_with_that_of_the_base(run: Path) -> None:
    text = (run / "report.html").read_text()
    for stage in ("short", "long", *STAGES):
        assert f"<h2>{stage} " in text
    assert "exact match, before to after-dpo" in text


def test_what_it_cannot_begin_with_is_refused(tmp_path: Path) -> None:
    done = recipe("tiny.sh", tmp_path / "none", tmp_path / "x")
    assert (done.returncode, done.stderr) == (2, f"tiny.sh: {tmp_path / 'none'}: no base model there; runs/base.sh makes one\n")
    done = recipe("tiny.sh", "--seed", "0")
    assert (done.returncode, done.stderr) == (2, "tiny.sh: --seed 0: must be a whole number from 1 up\n")
    assert not (tmp_path / "x").exists()
