"""`qwen2 export` of adapters: merged into their base, from PEFT's folder, from a run's end and from its checkpoints."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from qwen2.cli.app import main
from qwen2.config import GenerationDefaults
from qwen2.model import Qwen2
from qwen2.model.lora import LoraSettings, add_lora, lora_parameters
from qwen2.train.folder import RunFolder, write_json
from qwen2.train.loop import Loop
from qwen2.train.place import origin
from qwen2.train.world import World
from qwen2.weights.adapter import save_adapter
from qwen2.weights.export import to_hf_folder
from qwen2.weights.model import load
from tests.conftest import tiny_model
from tests.model.test_lora import adapted
from tests.model.test_parity import our_logits
from tests.train.conftest import Toy, small

SETTINGS = LoraSettings(rank=4, targets="attention")


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model, as the small ones of the family are."""
    model = tiny_model()
    config = replace(model.config, tied=True)
    network = Qwen2(config)
    network.load_state_dict({name: value for name, value in model.network.state_dict().items() if not name.startswith("lm_head")})
    folder = tmp_path_factory.mktemp("models") / "tied"
    to_hf_folder(replace(model, config=config, network=network), folder)
    return folder


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 512, (2, 30), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(path: Path, tokens: torch.Tensor, packed: bool = False) -> torch.Tensor:
    return our_logits(load(path, packed=packed).network, tokens)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapter_merged_exported_and_gguf_have_the_same_logits(dora: bool, tied_folder: Path, tokens: torch.Tensor, tmp_path: Path):
    settings = LoraSettings(rank=4, dora=dora)
    network = adapted(settings, load(tied_folder).network)
    with torch.no_grad():
        expected = our_logits(network, tokens)
    assert (expected - logits_of(tied_folder, tokens)).abs().max() > 0.1
    save_adapter(network, settings, tmp_path / "adapter", str(tied_folder))
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "folder")]) == 0
    torch.testing.assert_close(logits_of(tmp_path / "folder", tokens), expected, rtol=1e-4, atol=1e-4)
    assert main(["export", str(tied_folder), str(tmp_path / "again"), "--adapter", str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "folder" / "model.safetensors").read_bytes()
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "f32.gguf"), "--to", "f32"]) == 0
    torch.testing.assert_close(logits_of(tmp_path / "f32.gguf", tokens, packed=True), expected, rtol=1e-4, atol=1e-4)
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "q8.gguf"), "--to", "q8_0"]) == 0
    noise = (logits_of(tmp_path / "q8.gguf", tokens) - expected).abs().mean()
    assert noise < 0.05 * (expected - logits_of(tied_folder, tokens)).abs().mean()


def train(run: Path, base: Path, steps: int) -> dict[str, torch.Tensor]:
    """A run of adapters as a job writes it, with averaged weights; returns those."""
    model = load(base)
    torch.manual_seed(0)
    add_lora(model.network, SETTINGS, torch.Generator().manual_seed(5))
    settings = small(steps=steps, average="ema", ema_decay=0.5)
    sections = {"settings": asdict(settings), "lora": asdict(SETTINGS), "model": model.config.to_hf(), "from": origin(str(base), run)}
    with RunFolder(run) as folder:
        folder.begin(sections, resume=False)
        model.tokenizer.save(folder.tokenizer)
        write_json(folder.tokenizer / "generation_config.json", GenerationDefaults(eos=(511,)).to_hf())
        loop = Loop(model.network, Toy(micro=4).task(), settings, folder, World())
        loop.run()
        with loop.averaged():
            return {name: parameter.detach().clone() for name, parameter in lora_parameters(model.network).items()}


@torch.no_grad()
def expected_logits(base: Path, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    network = load(base).network
    add_lora(network, SETTINGS)
    for name, parameter in lora_parameters(network).items():
        parameter.copy_(weights[name])
    return our_logits(network, tokens)


def test_a_run_of_adapters_exports_at_its_end_and_before(tied_folder: Path, tokens: torch.Tensor, tmp_path: Path):
    """The averaged adapters, also after base and run were moved together; the run's own ids end a text."""
    place = tmp_path / "before"
    shutil.copytree(tied_folder, place / "base")
    weights = train(place / "run", place / "base", steps=4)
    network = load(place / "base").network
    expected = expected_logits(place / "base", weights, tokens)
    place = place.rename(tmp_path / "after")
    assert main(["export", str(place / "run" / "checkpoints" / "step-000004"), str(tmp_path / "checkpoint")]) == 0
    assert main(["export", str(place / "run"), str(tmp_path / "newest")]) == 0
    add_lora(network, SETTINGS)
    with torch.no_grad():
        for name, parameter in lora_parameters(network).items():
            parameter.copy_(weights[name])
    save_adapter(network, SETTINGS, place / "run" / "adapter", str(tmp_path / "before" / "base"))
    assert main(["export", str(place / "run"), str(tmp_path / "end")]) == 0
    assert main(["export", str(place / "run" / "adapter"), str(tmp_path / "adapter")]) == 0
    for name in ("checkpoint", "newest", "end", "adapter"):
        torch.testing.assert_close(
            logits_of(tmp_path / name, tokens), expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text
        )
    assert load(tmp_path / "end").generation.eos == load(tmp_path / "newest").generation.eos == (511,)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (None, "{folder}: does not say which model it belongs to; name it: qwen2 export BASE DESTINATION --adapter {folder}"),
        (
            "./gone",
            "{folder}: the model that it belongs to: ./gone: no such file or folder; if it is elsewhere, "
            "name it: qwen2 export BASE DESTINATION --adapter {folder}",
        ),
        ("{folder}", "{folder}: names itself as the model that it belongs to; name it: qwen2 export BASE DESTINATION --adapter {folder}"),
    ],
    ids=["none", "gone", "itself"],
)
def test_a_base_that_is_not_there(
    base: str | None, words: str, tied_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "adapter"
    save_adapter(adapted(SETTINGS, load(tied_folder).network), SETTINGS, folder, None if base is None else base.format(folder=folder))
    assert main(["export", str(folder), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"qwen2: {words.format(folder=folder)}\n"
    assert main(["export", str(tied_folder), str(tmp_path / "out"), "--adapter", str(tied_folder)]) == 1
    assert capsys.readouterr().err == f"qwen2: --adapter {tied_folder}: no adapter's folder: adapter_config.json is not there\n"
