"""The reference's numbers: those of the base, computed once, kept, computed again where they are of something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen2.config.lora import LoraSettings
from qwen2.post.preference.dpo import Job, Reader, reference_sums
from qwen2.post.preference.reference import Reference
from qwen2.train.metrics import read_lines
from qwen2.train.world import World
from tests.conftest import tiny_model
from tests.post.test_dpo import HaltError, gathered, rows, run, small


def test_the_base_under_an_adapter_says_what_the_cache_says(tmp_path: Path):
    losses = []
    for kind in ("cache", "adapter"):
        run(tmp_path / kind, lora=LoraSettings(rank=4), steps=4, reference=kind)
        losses.append([line["loss"] for line in read_lines(tmp_path / kind / "metrics.jsonl") if "loss" in line])
        assert (tmp_path / kind / "reference.safetensors").exists() == (kind == "cache")
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0] - 1e-3
    with pytest.raises(ValueError, match="there is none without --lora-rank"):
        run(tmp_path / "none", reference="adapter")


def test_only_what_is_read_is_computed_and_more_is_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(tmp_path / "run", steps=2, schedule="constant", warmup=0.0, eval_pairs=3)
    sums = load_file(tmp_path / "run" / "reference.safetensors")["sums"]
    assert (~sums.isnan().any(1)).sum() == 2 * 6 + 3
    assert "of 15 prompts" in capsys.readouterr().err
    run(tmp_path / "run", resume=True, steps=4, schedule="constant", warmup=0.0, eval_pairs=8)
    more = load_file(tmp_path / "run" / "reference.safetensors")["sums"]
    assert not more.isnan().any()
    assert "of 13 prompts" in capsys.readouterr().err
    assert torch.equal(more[~sums.isnan()], sums[~sums.isnan()])


def test_a_reference_of_something_else_is_computed_again_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved, model, settings = tmp_path / "reference.safetensors", tiny_model(), small(steps=2)
    job = Job(gathered(settings), model, settings, tmp_path)

    def found(weights: str = "these weights", dtype: torch.dtype = torch.float32, job: Job = job) -> str:
        """What is said, of numbers that are right."""
        read = Reader(model.network, dtype, torch.device("cpu"))
        sums = reference_sums(job, read, weights, tmp_path, World())
        right = read([*job.data.items.groups, *job.data.held_out.groups])
        there = ~sums.isnan().any(1)
        assert there.any()
        torch.testing.assert_close(sums[there], right[there], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
        return capsys.readouterr().err

    assert found().startswith("the reference's log-probabilities of 20 prompts with their answers, once")
    assert found() == ""
    assert f"{saved}: of other model; computed again\nthe reference" in found("others")
    assert f"{saved}: of other computed in; computed again" in found("others", torch.bfloat16)
    other = replace(job, data=gathered(settings, rows(20, seed=9)))
    assert f"{saved}: of other model and data and computed in; computed again" in found(job=other)
    saved.write_bytes(saved.read_bytes()[:100])
    assert f"{saved}: cannot be read" in found(job=other)
    assert found(job=other) == ""


def test_a_long_pass_is_written_down_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qwen2.post.preference.reference.OFTEN", 4)
    found = Reference(tmp_path, {"model": "a"}, (10, 2))
    asked: list[list[int]] = []

    def compute(indices: list[int]) -> torch.Tensor:
        asked.append(list(indices))
        if len(asked) == 3:
            raise HaltError
        return torch.tensor(indices)[:, None].float() * torch.tensor([1.0, -1.0])

    with pytest.raises(HaltError):
        found.fill([9, 0, 1, 1, 2, 3, 4, 5, 6, 7], compute)  # type: ignore[arg-type]
    again = Reference(tmp_path, {"model": "a"}, (10, 2))
    again.read(pytest.fail)
    assert again.missing(range(10)) == [7, 8]
    assert asked == [[9, 0, 1, 2], [3, 4, 5, 6], [7]]
    assert again.sums[9].tolist() == [9.0, -9.0]
