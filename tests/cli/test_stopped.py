"""Runs that did not end: exported and gone on from at any checkpoint, resumed with other settings, without their source, from elsewhere."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen2.cli.app import main
from qwen2.config import tiny
from qwen2.train.loop import Loop
from qwen2.train.metrics import read_lines
from qwen2.train.world import World
from qwen2.weights.model import load
from tests.train.conftest import write_shards

ROWS = ["--length", "48", "--batch", "4", "--micro-batch", "4", "--log-every", "1", "--save-every", "2", "--eval-bytes", "600"]
ALIKE = [*ROWS, "--no-tensorboard", "--no-measure", "--precision", "float32"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("corpus") / "shards")


def stop_at(step: int, words: list[str]) -> None:
    """Run a command line whose run is interrupted when it has done that many steps."""
    begin = Loop.step

    def stepped(self: Loop) -> object:
        if self.state.step == step:
            raise KeyboardInterrupt
        return begin(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", stepped)
        assert main(words) == 130


@pytest.fixture(scope="module")
def kept(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2,000 steps that was stopped after five: checkpoints of steps 2 and 4, with averaged weights."""
    out = tmp_path_factory.mktemp("runs") / "run"
    (out.parent / "tied.json").write_text(json.dumps(tiny(tied=True, context=48).to_hf()))
    words = ["pretrain", str(shards), "--out", str(out), "--config", str(out.parent / "tied.json"), "--steps", "2000"]
    stop_at(5, [*words, *ALIKE, "--average", "ema", "--ema-decay", "0.5"])
    return out


@pytest.fixture
def stopped(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "run"))


def weights(checkpoint: Path, kind: str = "average") -> dict[str, torch.Tensor]:
    tensors = load_file(checkpoint / "tensors-0000.safetensors")
    return {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{kind}/")}


@pytest.mark.parametrize("what", ["", "checkpoints/step-000002"])
def test_every_checkpoint_exports(what: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The averaged weights and the shards' tokenizer, as a folder and as GGUF; a run gives its newest one and says so."""
    taken = stopped / "checkpoints" / ("step-000002" if what else "step-000004")
    assert main(["export", str(stopped / what), str(tmp_path / "out")]) == 0
    said = f"qwen2: {stopped}: this run has not ended; its model after step 4 is taken"
    assert (said in capsys.readouterr().err) == (not what)
    model = load(tmp_path / "out")
    assert model.generation.eos == (509,)
    wanted = weights(taken)
    assert not torch.equal(wanted["model.norm.weight"], weights(taken, "model")["model.norm.weight"])
    for name, parameter in model.network.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    assert main(["export", str(stopped / what), str(tmp_path / "out.gguf"), "--to", "q8_0"]) == 0
    assert load(tmp_path / "out.gguf").tokenizer.encode("the quick") == model.tokenizer.encode("the quick")


def test_a_stage_goes_on_from_a_checkpoint(stopped: Path, shards: Path, tmp_path: Path):
    """Of a run that never ended; a rate of next to nothing leaves the weights as they were taken."""
    checkpoint = stopped / "checkpoints" / "step-000002"
    words = ["pretrain", str(shards), "--out", str(tmp_path / "next"), "--from", str(checkpoint), "--steps", "1", "--lr", "1e-12"]
    assert main([*words, *ALIKE]) == 0
    wanted = weights(checkpoint)
    for name, tensor in load_file(tmp_path / "next" / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-9)
    assert main(["upcycle", str(stopped), str(tmp_path / "mixture"), "--experts", "4", "--active", "2"]) == 0
    assert load(tmp_path / "mixture").config.moe is not None


def test_the_model_of_an_end_counts_until_a_later_checkpoint(stopped: Path, shards: Path, tmp_path: Path):
    resume = ["pretrain", str(shards), "--out", str(stopped), "--resume"]
    assert main([*resume, "--steps", "6"]) == 0
    assert main(["export", str(stopped), str(tmp_path / "end")]) == 0
    assert (tmp_path / "end" / "model.safetensors").read_bytes() == (stopped / "model" / "model.safetensors").read_bytes()
    config = json.loads((stopped / "config.json").read_text())
    config["settings"]["steps"] = 2000  # as if the end had been moved, and the run been killed after step 6
    (stopped / "config.json").write_text(json.dumps(config))
    with (stopped / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    assert main(["export", str(stopped), str(tmp_path / "newest")]) == 0
    assert (tmp_path / "newest" / "model.safetensors").read_bytes() == (tmp_path / "end" / "model.safetensors").read_bytes()


def test_a_checkpoint_that_goes_while_it_is_read_gives_way_to_a_newer_one(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As of a run that goes on beside the export."""
    folder, read = stopped / "checkpoints", World.read

    def meanwhile(self: World, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        monkeypatch.setattr(World, "read", read)
        shutil.copytree(path, folder / "step-000006")
        shutil.rmtree(path)
        read(self, path, tensors)

    monkeypatch.setattr(World, "read", meanwhile)
    assert main(["export", str(stopped), str(tmp_path / "out")]) == 0
    assert not (folder / "step-000004").exists()
    assert "its model after step 4 is taken" in capsys.readouterr().err  # what the copy says of itself
    assert load(tmp_path / "out").config.tied


def test_a_folder_that_is_no_run_s_is_not_taken_for_one(stopped: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A model's folder has a config.json too: it is neither resumed nor called a run."""
    assert main(["export", str(stopped), str(tmp_path / "model")]) == 0
    for words in (["--resume"], ["--size", "tiny"]):
        capsys.readouterr()
        assert main(["pretrain", str(shards), "--out", str(tmp_path / "model"), *words]) == 1
        assert "config.json: not that of a run (it has no 'settings'); name another folder with --out" in capsys.readouterr().err
    assert not (tmp_path / "model" / "checkpoints").exists()


@pytest.mark.parametrize("what", ["", "checkpoints/step-000002"])
def test_a_run_is_not_talked_to_but_said_how(what: str, stopped: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(["run", str(stopped / what), "Hello", "--local"]) == 1
    assert f"qwen2: {stopped / what}: a training run: its end is RUN/model, and qwen2 export" in capsys.readouterr().err


def test_what_cannot_be_taken_is_said(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    newest = stopped / "checkpoints" / "step-000004"
    (newest / "tensors-0000.safetensors").write_bytes(b"")
    assert main(["export", str(newest), str(tmp_path / "out")]) == 1
    assert f"qwen2: {newest}: tensors-0000.safetensors has 0 bytes" in capsys.readouterr().err
    assert main(["export", str(stopped), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert f"{newest}: passed over: tensors-0000.safetensors has 0 bytes" in said
    assert "its model after step 2 is taken" in said
    shutil.rmtree(stopped / "checkpoints" / "step-000002")
    shutil.rmtree(newest)
    assert main(["export", str(stopped), str(tmp_path / "again")]) == 1
    assert "has neither a model nor a checkpoint yet; go on with it by --resume" in capsys.readouterr().err


def test_the_end_can_be_moved(stopped: Path, shards: Path, capsys: pytest.CaptureFixture[str]):
    """It falls from the peak in the steps that are left; what changed stands in the metrics; the run remembers its new end."""
    resume = ["pretrain", str(shards), "--out", str(stopped), "--resume"]
    assert main([*resume, "--steps", "8"]) == 0
    said = "the run was to end after 2,000 steps and ends after 8: "
    said += "the rate rises in the first 0 instead of 60 and falls in the last 2"
    assert said in capsys.readouterr().err
    lines = read_lines(stopped / "metrics.jsonl")
    assert [(line["step"], line["text"]) for line in lines if "event" in line] == [(4, said)]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    rates = {line["step"]: line["lr"] for line in lines if "loss" in line}
    assert rates[6] == pytest.approx(1e-3)
    assert rates[6] > rates[7] > rates[8] > 0
    assert main(resume) == 0
    assert main([*resume, "--steps", "9"]) == 1
    assert "the rate began to fall after step 6, 8 are done; start another run from it: --from" in capsys.readouterr().err


def test_less_memory_another_rate_and_other_manners(stopped: Path, shards: Path, capsys: pytest.CaptureFixture[str]):
    """What a run that was killed for memory, or ended in numbers that are not finite, needs to go on."""
    resume = ["pretrain", str(shards), "--out", str(stopped), "--resume"]
    less = ["--micro-batch", "1", "--recompute", "layers", "--lr", "5e-4", "--on-nonfinite", "skip", "--on-spike", "rollback"]
    assert main([*resume, "--steps", "6", *less]) == 0
    said = capsys.readouterr().err
    assert "micro_batch was 4 and is 1: numbers are rounded otherwise from here on" in said
    assert "recompute was none and is layers: numbers are rounded otherwise from here on" in said
    assert "lr was 0.001 and is 0.0005: numbers differ" in said
    assert "on_nonfinite" not in said
    settings = json.loads((stopped / "config.json").read_text())["settings"]
    assert (settings["micro_batch"], settings["recompute"], settings["on_nonfinite"]) == (1, "layers", "skip")
    assert main(resume) == 0
    assert "was" not in [word for line in capsys.readouterr().err.splitlines() for word in line.split()]


def test_a_run_goes_on_without_its_source_and_from_anywhere(
    stopped: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The model that it started from is renamed, the shards' tokenizer is gone, and the command is given in another folder."""
    own = shutil.copytree(shards, tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    stop_at(3, ["pretrain", "shards", "--out", "next", "--from", "run", "--steps", "4", *ALIKE])
    before = json.loads(Path("next/config.json").read_text())["from"]
    assert before == {"model": str(tmp_path / "run"), "relative": "../run"}
    shutil.copytree("next", "early")
    stopped.rename(tmp_path / "renamed")
    shutil.rmtree(own / "tokenizer")
    monkeypatch.chdir("/")
    moved = shutil.copytree(tmp_path, tmp_path.with_name("elsewhere"))
    again = ["pretrain", str(own), "--out", str(tmp_path / "next"), "--resume"]
    assert main([*again, "--from", str(moved / "run")]) == 1  # another model, for all that is known
    assert "from: model is" in capsys.readouterr().err
    assert main([*again, "--from", str(tmp_path / "run")]) == 0
    (moved / "renamed").rename(moved / "run")
    assert main(["pretrain", str(own), "--out", str(moved / "next"), "--resume", "--from", str(moved / "run")]) == 0
    shutil.rmtree(tmp_path / "early" / "checkpoints")
    capsys.readouterr()
    assert main(["pretrain", str(own), "--out", str(tmp_path / "early"), "--resume"]) == 1  # without a checkpoint it needs the source
    assert str(tmp_path / "run") in capsys.readouterr().err


def test_the_page_is_the_same_from_anywhere_and_when_all_was_moved(
    stopped: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from qwen2.train.report import begins, report

    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", str(shards), "--out", "run", "--resume", "--steps", "6"]) == 0
    assert main(["pretrain", str(shards), "--out", "long", "--from", "run", "--steps", "2", *ALIKE]) == 0
    for name in ("run", "long"):
        assert main(["report", "add", ".", name, "--kind", "training", "--seconds", "1"]) == 0
    wanted = {"run": 0, "long": 6 * 4 * 48}
    assert begins(report(tmp_path), tmp_path) == wanted
    monkeypatch.chdir("/")
    assert begins(report(tmp_path), tmp_path) == wanted
    moved = shutil.copytree(tmp_path, tmp_path.with_name("moved"))
    shutil.rmtree(tmp_path)
    assert begins(report(moved), moved) == wanted
