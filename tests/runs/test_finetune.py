"""`runs/finetune.sh --quick`: adapters and preferences of a real model on real data, every step real; what it leaves, and that it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2.engine.llm import LLM
from qwen2.engine.request import SamplingParams
from tests.runs.conftest import recipe

STAGES = ["data", "problems", *(f"{stage}-small" for stage in ("before", "sft", "after-sft", "dpo", "after-dpo", "model", "answers"))]

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.xdist_group("recipes")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finetune"
    done = recipe("finetune.sh", "--quick", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def found(run: Path) -> dict[str, dict[str, Any]]:
    return {stage["name"]: stage for stage in json.loads((run / "report.json").read_text())["stages"]}


def test_every_stage_has_its_figures(found: dict[str, dict[str, Any]]) -> None:
    assert list(found) == STAGES
    assert found["problems"]["rows"]["held-out.jsonl"] == 8
    for name in ("before-small", "after-sft-small", "after-dpo-small"):
        assert found[name]["exact_match"]["count"] == 8
        assert found[name]["bits_per_byte"].keys() == {"en", "zh"}
    learned = found["sft-small"]["held_out"]
    assert learned["after"]["held-out loss"] < learned["before"]["held-out loss"]
    preferred = found["dpo-small"]["held_out"]
    assert preferred["before"]["margin"] == pytest.approx(0, abs=1e-3)
    assert preferred["after"]["margin"] != 0
    assert all(answer["text"] for answer in found["answers-small"]["samples"])


def test_the_quantized_file_answers_as_the_folder_does(run: Path) -> None:
    asked, params = [{"role": "user", "content": "Name a colour."}], SamplingParams(temperature=0, max_tokens=4)
    folder, gguf = (LLM(run / "model-small" / name) for name in ("chat", "chat-q8_0.gguf"))
    assert folder.ask(asked, params).request.prompt == gguf.ask(asked, params).request.prompt
    assert folder.chat(asked, params).text.split()[:1] == gguf.chat(asked, params).text.split()[:1]


def test_a_finished_run_is_finished(run: Path) -> None:
    done = recipe("finetune.sh", "--quick", run)
    assert done.returncode == 0
    assert done.stdout.count("finished before") == len(STAGES)


def test_what_is_unknown_is_refused(tmp_path: Path) -> None:
    for words, said in ((["--fast"], "--fast is unknown"), (["--only", "huge"], "--only huge: must be small or large")):
        done = recipe("finetune.sh", *words, tmp_path)
        assert (done.returncode, done.stderr.strip()) == (
            2,
            f"finetune.sh: {said}" + ("" if "--only" in words else "; finetune.sh --help shows what there is"),
        )
