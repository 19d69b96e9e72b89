"""`qwen2 pretrain`: a run and its stages from the command line, resuming, and what is refused in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2 import LLM, SamplingParams
from qwen2.cli.app import main
from qwen2.cli.ranks import say_idle_gpus
from qwen2.config import tiny
from qwen2.data.shards import Shards
from qwen2.train.metrics import read_lines
from qwen2.train.settings import Settings
from qwen2.train.stage import PretrainSettings
from tests.train.conftest import write_shards

QUICK = ["--steps", "4", "--length", "48", "--batch", "4", "--micro-batch", "2", "--log-every", "1", "--no-tensorboard", "--no-measure"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("corpus") / "shards")


@pytest.fixture(scope="module")
def ended(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["pretrain", str(shards), "--out", str(out), "--size", "tiny", *QUICK, "--save-every", "2"]) == 0
    return out


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line is refused with: one line."""
    capsys.readouterr()
    assert main(["pretrain", *words]) in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_a_run_leaves_all_that_it_should(ended: Path, capsys: pytest.CaptureFixture[str]):
    assert sorted(path.name for path in ended.iterdir() if not path.name.startswith(".")) == [
        "checkpoints", "config.json", "curves.png", "metrics.jsonl", "model", "tokenizer",
    ]  # fmt: skip
    lines = read_lines(ended / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert {"tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu"} <= lines[1].keys()
    assert [sorted(line["eval"]) for line in lines if "eval" in line] == [["de", "en"]] * 2
    settings = json.loads((ended / "config.json").read_text())["settings"]
    assert settings.pop("precision") in ("float32", "bfloat16"), "what auto stood for"
    assert PretrainSettings(**{**settings, "weight": tuple(settings["weight"])}) == PretrainSettings(
        steps=4, length=48, batch=4, micro_batch=2, log_every=1, save_every=2, tensorboard=False, measure=False
    )


def test_the_model_answers_and_becomes_a_gguf_file(ended: Path, tmp_path: Path):
    (answer,) = LLM(ended / "model").generate(["the quick"], SamplingParams(temperature=0, max_tokens=3))
    assert answer.usage.completion_tokens == 3
    assert main(["export", str(ended / "model"), str(tmp_path / "model.gguf")]) == 0
    assert (tmp_path / "model.gguf").stat().st_size > 100_000


def test_a_stage_goes_on_with_a_longer_context(ended: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--from", str(ended), "--rope-theta", "1000000", *(word.replace("48", "96") for word in QUICK)]
    assert main(["pretrain", str(shards), "--out", str(tmp_path / "long"), *words]) == 0
    assert "96 tokens a row, rotary base 1,000,000" in capsys.readouterr().err
    config = json.loads((tmp_path / "long" / "model" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_theta"]) == (96, 1e6)
    assert json.loads((tmp_path / "long" / "config.json").read_text())["from"] == {
        "model": str(ended), "relative": os.path.relpath(ended, tmp_path / "long"),
    }  # fmt: skip


def test_a_run_that_is_done_is_resumed_to_the_same_end(ended: Path, shards: Path, capsys: pytest.CaptureFixture[str]):
    before = (ended / "metrics.jsonl").read_text(), (ended / "model" / "model.safetensors").read_bytes()
    assert main(["pretrain", str(shards), "--out", str(ended), "--resume"]) == 0
    assert "going on from step 4 of 4" in capsys.readouterr().err
    assert ((ended / "metrics.jsonl").read_text(), (ended / "model" / "model.safetensors").read_bytes()) == before


def test_a_run_whose_evaluation_was_counted_in_tokens_goes_on(
    ended: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = Path(shutil.copytree(ended, tmp_path / "run"))
    written = json.loads((run / "config.json").read_text())
    del written["settings"]["eval_bytes"]
    written["settings"]["eval_tokens"] = 100
    (run / "config.json").write_text(json.dumps(written))
    assert main(["pretrain", str(shards), "--out", str(run), "--resume"]) == 0
    assert "eval_bytes 300 in place of eval_tokens 100" in capsys.readouterr().err
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert settings["eval_bytes"] == 300
    assert "eval_tokens" not in settings


def test_tokens_stand_for_steps(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["pretrain", str(shards), "--out", str(tmp_path / "a"), "--size", "tiny", "--tokens", "300", "--length", "48", "--batch", "3",
                 "--micro-batch", "3", "--no-tensorboard", "--no-measure"]) == 0  # fmt: skip
    assert "3 steps of 3 rows: 432 tokens" in capsys.readouterr().err


def test_the_mixture_is_the_recipe_s_where_no_flag_says_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    mixture = {"weights": {"de/words": 3, "lo/words": 2}, "temperature": 2.0}
    shards = write_shards(tmp_path / "shards", recipe={"name": "mine", "sources": [], **mixture})

    def run(name: str, *flags: str) -> tuple[str, dict[str, object]]:
        capsys.readouterr()
        assert main(["pretrain", str(shards), "--out", str(tmp_path / name), *flags]) == 0
        settings = json.loads((tmp_path / name / "config.json").read_text())["settings"]
        return capsys.readouterr().err, {key: settings[key] for key in ("weight", "temperature")}

    text, kept = run("recipe", "--size", "tiny", *QUICK)
    assert kept == {"weight": ["de/words=3"], "temperature": 2.0}
    assert "mixture of the shards' recipe: --weight de/words=3, --temperature 2\n" in text
    assert "for what the shards have no text of: lo/words" in text
    text, kept = run("flag", "--size", "tiny", *QUICK, "--temperature", "1")
    assert kept == {"weight": ["de/words=3"], "temperature": 1.0}
    assert "recipe: --weight de/words=3\n" in text
    text, kept = run("flag", "--resume")
    assert kept == {"weight": ["de/words=3"], "temperature": 1.0}, "a run that is resumed keeps its own"
    assert "mixture of the shards" not in text


def test_a_recipe_whose_mixture_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number, mixture in enumerate(({"temperature": "warm"}, {"weights": {"en": 1}}, {"weights": []})):
        shards = write_shards(tmp_path / str(number), recipe=mixture)
        assert "the mixture of the shards' recipe: " in said([str(shards), "--out", str(tmp_path / "run"), "--size", "tiny"], capsys)


def test_what_is_repeated_is_said(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """German is a third of the text: at temperature 1 nothing is more often than the rest."""
    words = [str(shards), "--size", "tiny", *QUICK]
    assert main(["pretrain", *words, "--out", str(tmp_path / "even")]) == 0
    text = capsys.readouterr().err
    assert "times the" in text
    assert "most often" not in text
    assert "warning" not in text
    words[words.index("--length") + 1] = "512"
    assert main(["pretrain", *words, "--out", str(tmp_path / "often"), "--weight", "en/*=0.01"]) == 0
    text = capsys.readouterr().err
    found = re.search(r"of the shards; most often de (\d+\.\d) times, en 0\.\d times\n", text)
    assert found
    assert float(found[1]) > 4
    assert "warning: read more than 4 times: de; that is memory, not learning" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to train: --size nano, or --config FILE, or --from RUN"),
        (["--size", "nano", "--from", "x"], "say what to train"),
        (["--size", "tiny", "--lr", "0"], "lr 0.0: the learning rate must be a number above 0"),
        (["--size", "tiny", "--lr", "nan"], "lr nan: the learning rate must be a number above 0"),
        (["--size", "tiny", "--precision", "float16"], "precision float16: Qwen2's large key biases overflow its range"),
        (["--size", "tiny", "--leng", "12"], "Unknown option: --leng"),
        (["--size", "huge"], "huge"),
        (["--size", "tiny", "--tokens", "5", "--steps", "5"], "--tokens and --steps: give one of them"),
        (["--size", "tiny", "--tokens", "0"], "--tokens 0: must be at least 1"),
        (["--size", "tiny", "--threads", "0"], "--threads 0: must be at least 1"),
        (["--size", "tiny", "--micro-batch", "32"], "micro_batch 32: a step has 16 rows in all"),
        (["--size", "tiny", "--weight", "en"], "weight 'en'"),
        (["--size", "tiny", "--weight", "fr/web=2", "--batch", "4", "--micro-batch", "4"], "weight of fr/web: there is no such language"),
        (["--size", "tiny", "--device", "cuda"], "--device cuda: torch finds no such device here"),
        (["--size", "tiny", "--tokenizer", "{tmp}"], "no tokenizer there; name the folder"),
        (["--config", "{tmp}/none.json"], "none.json: missing"),
        (["--config", "{tmp}/bad.json"], "qwen2: {tmp}/bad.json: model_type None is not one this package runs"),
        (["--config", "{tmp}/odd.json"], "qwen2: {tmp}/odd.json: rope scaling type 'longer' is not supported"),
        (["--from", "{tmp}/none"], "none"),
        (["--resume"], "no run to resume here"),
    ],
)
def test_refusals(words: list[str], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "bad.json").write_text('{"hidden_size": 64}')
    (tmp_path / "odd.json").write_text(json.dumps({**tiny().to_hf(), "rope_scaling": {"type": "longer"}}))
    text = said([str(shards), "--out", str(tmp_path / "run"), *(word.format(tmp=tmp_path) for word in words)], capsys)
    assert text.startswith("qwen2: ")
    assert message.format(tmp=tmp_path) in text
    assert not (tmp_path / "run" / "model").exists()


def test_a_small_batch_needs_no_other_flag(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = ["pretrain", str(shards), "--out", str(tmp_path / "run"), "--no-tensorboard", "--no-measure"]
    assert main([*run, "--size", "tiny", "--length", "48", "--batch", "4", "--steps", "2", "--schedule", "constant"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["micro_batch"] is None
    assert main([*run, "--resume", "--steps", "3"]) == 0
    assert "micro_batch" not in capsys.readouterr().err
    assert main([*run, "--resume", "--steps", "4", "--micro-batch", "2"]) == 0
    assert "micro_batch was left out and is 2: numbers are rounded otherwise" in capsys.readouterr().err
    assert "micro_batch 8: a step has 4 rows in all" in said([*run[1:], "--resume", "--micro-batch", "8"], capsys)


def test_rows_are_cut_from_long_documents_where_that_is_asked(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    opened = Shards.open(shards)
    lengths = {code: [len(d) for r in opened.select("train", code) for d in opened.documents(r)] for code in ("de", "en")}
    least = 60
    had = sum(length for found in lengths.values() for length in found if length >= least)
    run = ["pretrain", str(shards), "--out", str(tmp_path / "run"), *QUICK[2:]]
    assert main([*run, "--size", "tiny", "--least-document", str(least)]) == 0
    text = capsys.readouterr().err
    assert f"{-(-had // (4 * 48)):,} steps of 4 rows" in text, "each document once"
    assert f"times the {had:,} of the shards in documents of at least 60" in text
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["least_document"] == least
    assert main([*run, "--resume"]) == 0
    assert "settings: least_document is 60 in the run, 0 here" in said([*run[1:], "--resume", "--least-document", "0"], capsys)
    longest = max(map(max, lengths.values()))
    other = [str(shards), "--out", str(tmp_path / "other"), "--size", "tiny", "--least-document", str(longest + 1)]
    assert f"least_document {longest + 1}: no document of {shards} is so long; the longest has {longest}" in said(other, capsys)
    short, rest = sorted(lengths, key=lambda code: max(lengths[code]))
    assert max(lengths[short]) < max(lengths[rest])
    least = max(lengths[short]) + 1
    assert main([*run[:3], str(tmp_path / "third"), *QUICK, "--size", "tiny", "--least-document", str(least)]) == 0
    assert f"in documents of at least {least:,} (all of {short})" in capsys.readouterr().err


def test_a_run_of_the_version_before_knows_no_least_document(ended: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old = shutil.copytree(ended, tmp_path / "old")
    written = json.loads((old / "config.json").read_text())
    del written["settings"]["least_document"]
    (old / "config.json").write_text(json.dumps(written))
    assert "least_document is 0 in the run, 5 here" in said([str(shards), "--out", str(old), "--resume", "--least-document", "5"], capsys)
    assert main(["pretrain", str(shards), "--out", str(old), "--resume"]) == 0


def test_rows_at_once_are_as_many_as_there_are():
    assert [PretrainSettings(batch=batch).at_once for batch in (1, 4, 8, 64)] == [1, 4, 8, 8]
    assert PretrainSettings(batch=64, micro_batch=32).at_once == 32


def test_a_run_is_not_written_over_and_not_resumed_as_another(ended: Path, shards: Path, capsys: pytest.CaptureFixture[str]):
    run = [str(shards), "--out", str(ended)]
    assert "holds a run already; go on with it by --resume" in said([*run, "--size", "tiny", *QUICK], capsys)
    assert "settings: beta1 is 0.9 in the run, 0.8 here" in said([*run, "--resume", "--beta1", "0.8"], capsys)
    assert "the rate began to fall after step 3, 4 are done; start another run from it: --from" in said(
        [*run, "--resume", "--steps", "9"], capsys
    )
    assert "settings: length is 48 in the run, 64 here" in said([*run, "--resume", "--length", "64"], capsys)
    assert "model: hidden_size is 64 in the run, 384 here" in said([*run, "--resume", "--size", "nano"], capsys)
    assert "model: rope_theta is 10000.0 in the run, 5.0 here" in said([*run, "--resume", "--rope-theta", "5"], capsys)


def test_other_shards_are_refused(ended: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = write_shards(tmp_path / "other", seed=1)
    capsys.readouterr()
    assert main(["pretrain", str(other), "--out", str(ended), "--resume"]) == 1
    text = capsys.readouterr().err
    read = len(json.loads((ended / "config.json").read_text())["data"]["shards"])
    place = f"resume it with {os.path.relpath(shards)}, or start another run"
    assert re.fullmatch(rf"qwen2: {ended}: [1-{read}] of the {read} shards that it reads are not in {other}; {re.escape(place)}.*\n", text)
    file = next(other.glob("train-*.tokens"))
    os.truncate(file, file.stat().st_size - 2)
    assert f"{file}: has" in said([str(other), "--out", str(tmp_path / "new"), "--size", "tiny"], capsys)


def test_one_process_of_a_machine_reads_the_shards_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The others look at sizes, and come as far as the device that is not there; a hash that was read is remembered."""
    shards = write_shards(tmp_path / "shards")
    words = [str(shards), "--out", str(tmp_path / "run"), "--size", "tiny", "--device", "cuda"]
    file = next(shards.glob("train-*.tokens"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"\x00")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "torch finds no such device here" in said(words, capsys)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert f"{file}: its sha256 is not the one in manifest.json" in said(words, capsys)
    file.write_bytes(whole)
    for path in shards.glob("*.*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    assert "torch finds no such device here" in said(words, capsys)
    assert file.name in json.loads((shards / ".verified.json").read_text())


def test_gpus_that_are_left_alone_are_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    say_idle_gpus("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    say_idle_gpus("cpu")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    say_idle_gpus("cpu")
    assert capsys.readouterr().err == (
        "this machine has 8 GPUs, and the run computes on the CPU: --device cuda takes a GPU for each process\n"
    )


def test_a_mixture_is_balanced_as_its_config_says(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What `qwen2 upcycle --aux-coef` writes is what training takes, where it is not told another."""
    words = ["pretrain", str(shards), "--size", "tiny", "--out", str(tmp_path / "dense"), *QUICK]
    assert main(words) == 0
    how = ["--experts", "4", "--active", "2", "--aux-coef", "0.5"]
    assert main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), *how]) == 0
    capsys.readouterr()
    for out, flags, weight in (("own", [], 0.5), ("told", ["--balance", "0.25"], 0.25)):
        run = ["pretrain", str(shards), "--out", str(tmp_path / out), "--from", str(tmp_path / "moe"), *QUICK]
        assert main([*run, "--precision", "float32", *flags]) == 0
        assert f"their balance weighs {weight:g}, " in capsys.readouterr().err
        lines = [line for line in read_lines(tmp_path / out / "metrics.jsonl") if "loss" in line]
        assert all(line["loss"] == pytest.approx(line["nll"] + weight * line["balance"], rel=1e-5) for line in lines)


def test_another_tokenizer_is_refused(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tokenizer.json").write_text((shards / "tokenizer" / "tokenizer.json").read_text() + "\n")
    text = said([str(shards), "--out", str(tmp_path / "run"), "--size", "tiny", "--tokenizer", str(tmp_path)], capsys)
    assert "not the tokenizer that" in text
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny(vocab=300).to_hf()))
    assert "vocab_size 300: the tokenizer of" in said([str(shards), "--out", str(tmp_path / "run"), "--config", str(config)], capsys)


def test_help_needs_no_torch_and_has_every_setting(capsys: pytest.CaptureFixture[str]):
    program = "import sys; from qwen2.cli.app import main; main(['pretrain', '--help']); print('torch' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert shown.stdout.splitlines()[-1] == "False"
    for name in Settings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown.stdout
    assert "qwen2 pretrain corpus/shards --out run" in shown.stdout
