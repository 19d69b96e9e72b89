"""What `qwen2 sft` and `qwen2 dpo` share: what they refuse before a run's folder is taken, and training that goes on with an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qwen2.cli.app import main
from qwen2.config import tiny
from qwen2.tokenizer.styles import QWEN2_JINJA
from qwen2.train.saved import take, with_adapter
from qwen2.weights.adapter import read_adapter
from qwen2.weights.adapter_texts import save_texts
from qwen2.weights.export import to_gguf
from qwen2.weights.model import load
from qwen2.weights.modelfile import parse
from qwen2.weights.store import Store
from tests.conftest import random_adapter, tiny_model, tiny_tokenizer
from tests.model.test_parity import our_logits

QUICK = ["--steps", "1", "--batch", "4", "--length", "128", "--precision", "float32", "--no-measure", "--no-tensorboard"]
VERBS = pytest.mark.parametrize("verb", ["sft", "dpo"])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pairs, which both verbs read."""
    rows = [{"prompt": f"the {i} dog", "chosen": "a fox", "rejected": f"dog {i}"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pairs.jsonl"


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a command ends with."""
    capsys.readouterr()
    assert main(words) == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


@VERBS
def test_a_mistake_leaves_the_folder_free(
    verb: str, tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be trained is no run: the corrected command goes into the same folder."""
    run = tmp_path / "run"
    words = [verb, str(tiny_folder), str(data), "--out", str(run), "--lora-rank", "4", *QUICK]
    assert "target 'nonsense': there is no such layer" in refused([*words, "--lora-targets", "nonsense"], capsys)
    with monkeypatch.context() as without:
        without.setattr("qwen2.train.metrics.find_spec", lambda name: None if name == "tensorboard" else name)
        assert "or say --no-tensorboard" in refused(words[:-1], capsys)
    assert [path.name for path in run.iterdir()] == [".lock"]
    assert main(words) == 0
    said = refused([*words, "--resume", "--lora-targets", "q_proj"], capsys)
    assert "targets is 'all-linear' in the run, 'q_proj' here; resume it as it was started, or start another run from it: " in said
    assert said.endswith("name its folder as the model, and another one with --out")
    longer = ["3" if word == "1" else word for word in words]
    assert "under cosine the 1 steps that are done" in (said := refused([*longer, "--resume"], capsys))
    assert said.endswith("name its folder as the model, and another one with --out")
    assert main([verb, str(run), str(data), "--out", str(tmp_path / "next"), *QUICK]) == 0


@VERBS
def test_a_model_with_an_adapter_of_its_own_is_not_left_in_blocks(
    verb: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside packed weights it would take no part in training, and again be there when what was trained is merged."""
    monkeypatch.setenv("QWEN2_HOME", str(tmp_path / "home"))
    to_gguf(tiny_model(), tmp_path / "base.gguf", "Q8_0")
    adapter = random_adapter(tiny_model().config, tmp_path / "adapter")
    stored = Store(tmp_path / "home").create("mine", parse(f"FROM {tmp_path / 'base.gguf'}\nADAPTER {adapter}"))
    words = [verb, "mine", str(data), "--out", str(tmp_path / "run"), "--lora-rank", "4", *QUICK]
    said = refused([*words, "--qlora"], capsys)
    assert "--qlora: mine has an adapter, which its blocks cannot take in: merge it, qwen2 export mine FOLDER, and quantize that" in said
    assert str(stored.adapter_path) in said
    assert not (tmp_path / "run").exists()
    assert main(words) == 0


# --- where a run ends


@VERBS
def test_an_end_that_was_moved_stays_moved(
    verb: str, tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run by epochs with another end: going on without a word of it neither moves it back nor is refused."""
    run = tmp_path / "run"
    words, still = [verb, str(tiny_folder), str(data), "--out", str(run)], ["--schedule", "constant", "--warmup", "0"]
    assert main([*words, *QUICK[2:], *still, "--epochs", "0.5", "--samples", "0"][: None if verb == "sft" else -2]) == 0
    capsys.readouterr()
    counted = json.loads((run / "config.json").read_text())["settings"]["steps"]
    for more in (["--steps", str(counted + 2)], [], ["--save-every", "1"]):
        assert main([*words, "--resume", *more]) == 0, capsys.readouterr().err
        settings = json.loads((run / "config.json").read_text())["settings"]
        assert (settings["steps"], settings["epochs"]) == (counted + 2, 0.5)
    said = capsys.readouterr()
    assert f"written after {counted + 2} steps" in said.out
    assert f"{counted + 2} steps of up to 4" in said.err
    assert ": 0.5 epochs" not in said.err
    said = refused([*words, "--resume", "--epochs", "0.5"], capsys)  # said again, they count
    assert f"steps is {counted + 2} in the run, {counted} here: {counted + 2} are done already" in said


@VERBS
@pytest.mark.parametrize("epochs", ["0", "-1", "nan"])
def test_no_epochs_are_no_run(
    verb: str, epochs: str, tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [verb, str(tiny_folder), str(data), "--out", str(tmp_path / "run"), *QUICK[2:], "--epochs", epochs]
    assert refused(words, capsys).endswith(f"--epochs {epochs}: must be above 0; where steps are counted instead, say --steps N alone")
    assert not (tmp_path / "run").exists()


# --- training that goes on with an adapter


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """One as PEFT writes it, with ranks and alphas of some layers' own, and a template."""
    config = tiny_model().config
    folder = random_adapter(config, tmp_path / "theirs", size=0.05, targets=("q_proj", "v_proj", "up_proj"), alpha=6, rank=3)
    tensors = {
        f"base_model.model.{path}.{part}.weight": value
        for path, parts in read_adapter(folder).tensors.items()
        for part, value in parts.items()
    }
    for name in tensors:
        if "q_proj.lora_A" in name:
            tensors[name] = tensors[name][:2]
        elif "q_proj.lora_B" in name:
            tensors[name] = tensors[name][:, :2].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}, "target_modules": ["q_proj", "v_proj", "up_proj", "w_pack"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | patterns))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = QWEN2_JINJA.replace("SYSTEM", "You are a fox.")
    save_texts(folder, tokenizer, tiny_model().generation)
    return folder


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{path}.{part}": value for path, parts in read_adapter(folder).tensors.items() for part, value in parts.items()}


def reference(run: Path) -> torch.Tensor:
    with safe_open(run / "reference.safetensors", "pt") as file:
        return file.get_tensor("sums")


@VERBS
def test_training_goes_on_with_an_adapter(verb: str, adapter: Path, tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """At a rate of nothing it is the same adapter after a step, patterns and template too; else another; resumed, the same bits."""
    words = [verb, str(tiny_folder), str(data), "--adapter", str(adapter), *QUICK]
    still = ["--schedule", "constant", "--warmup", "0", "--lr", "1e-30"]
    assert main([*words, *still, "--out", str(tmp_path / "still")]) == 0
    before, after = numbers(adapter), numbers(tmp_path / "still" / "adapter")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-20)
    assert dict(read_adapter(tmp_path / "still" / "adapter").scales) == dict(read_adapter(adapter).scales)
    merged = take(tmp_path / "still", print)
    assert merged.template.default_system == "You are a fox."
    tokens = torch.arange(40).view(2, 20)
    expected = our_logits(with_adapter(load(tiny_folder), adapter).network, tokens)
    torch.testing.assert_close(our_logits(merged.network, tokens), expected, rtol=1e-5, atol=1e-5)

    longer = ["4" if word == "1" else word for word in words]
    longer += ["--lora-dropout", "0.2", "--schedule", "constant", "--lr", "1e-3", "--save-every", "2"]
    assert main([*longer, "--out", str(tmp_path / "whole")]) == 0
    assert not torch.equal(
        numbers(tmp_path / "whole" / "adapter")["model.layers.0.self_attn.q_proj.lora_A"], before["model.layers.0.self_attn.q_proj.lora_A"]
    )
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "adapter")
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    middle = take(cut / "checkpoints" / "step-000002", print)
    adapter.rename(tmp_path / "elsewhere")
    resumed = [verb, str(tiny_folder), str(data), "--out", str(cut), "--resume"]
    assert main(resumed) == 0
    for name, tensor in numbers(tmp_path / "whole" / "adapter").items():
        assert torch.equal(numbers(cut / "adapter")[name], tensor), name
    assert not torch.equal(our_logits(middle.network, tokens), our_logits(take(cut, print).network, tokens))


def test_preferences_after_adapters_over_blocks(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SFT and then DPO of one adapter, the base in its blocks: what it is compared with is the model that SFT left."""
    to_gguf(tiny_model(), tmp_path / "base.gguf", "Q8_0")
    base, first = str(tmp_path / "base.gguf"), tmp_path / "first"
    assert main(["sft", base, str(data), "--out", str(first), "--lora-rank", "4", "--lr", "0.1", "--qlora", *QUICK]) == 0
    words = ["dpo", base, str(data), "--adapter", str(first), "--qlora", *QUICK]
    said = refused([*words, "--out", str(tmp_path / "next"), "--reference", "adapter"], capsys)
    assert "reference adapter: training goes on with an adapter, and the base without it is not what it is compared with" in said
    assert main([*words, "--out", str(tmp_path / "next")]) == 0
    assert main(["dpo", str(first), str(data), "--out", str(tmp_path / "merged"), *QUICK]) == 0
    assert main(["dpo", base, str(data), "--out", str(tmp_path / "base"), "--lora-rank", "4", "--qlora", *QUICK]) == 0
    found, merged, bare = (reference(tmp_path / name)[:, :2] for name in ("next", "merged", "base"))
    noise, learned = (found - merged).abs().nanmean(), (merged - bare).abs().nanmean()  # products of blocks are in int8, of a merge not
    assert noise < 0.1 * learned, (noise, learned)
    assert json.loads((tmp_path / "next" / "config.json").read_text())["start"]["weights"] == "packed"
    assert "go on with its adapter over the model that it started from: --adapter" in refused(
        ["dpo", str(first), str(data), "--out", str(tmp_path / "other"), "--lora-rank", "4", "--qlora", *QUICK], capsys
    )


@VERBS
def test_what_does_not_go_on(
    verb: str, adapter: Path, tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = tmp_path / "run", str(tiny_folder)
    wide = random_adapter(tiny(hidden=128), tmp_path / "wide")
    cases = {
        "--lora-rank 8: the adapter that training goes on with has 3; leave it out": [model, "--adapter", str(adapter), "--lora-rank", "8"],
        "--lora-alpha 7.0: the adapter that training goes on with has 6": [model, "--adapter", str(adapter), "--lora-alpha", "7"],
        "--lora-targets all-linear: the adapter": [model, "--adapter", str(adapter), "--lora-targets", "all-linear"],
        "--dora: the adapter that training goes on with has none of it": [model, "--adapter", str(adapter), "--dora"],
        f"--adapter {model}: no adapter's folder": [model, "--adapter", model],
        "this model needs [64, 4]: the adapter (of tiny) was made for another model": [model, "--adapter", str(wide)],
        f"go on training it with --adapter {adapter}": [str(adapter)],
    }
    for words, given in cases.items():
        assert words in refused([verb, given[0], str(data), *given[1:], "--out", str(run), *QUICK], capsys), words
    same = ["--lora-rank", "3", "--lora-alpha", "6", "--lora-targets", "v_proj,up_proj,q_proj"]
    words = [verb, model, str(data), "--out", str(run), *QUICK]
    assert main([*words, "--adapter", str(adapter), *same]) == 0
    assert "was started with another adapter, of which it has a copy; leave --adapter out" in refused(
        [*words, "--adapter", str(random_adapter(tiny_model().config, tmp_path / "b")), "--resume"], capsys
    )
    assert "--lora-rank 4: the adapter that training goes on with has 3" in refused([*words, "--lora-rank", "4", "--resume"], capsys)
