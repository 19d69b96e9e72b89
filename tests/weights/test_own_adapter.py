"""Models of one's own with an adapter: copied into the store whole, inherited, shown, exported merged, and refused by one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file

from qwen2 import LLM, SamplingParams
from qwen2.cli.quantize import quantize
from qwen2.cli.show import show
from qwen2.config import GenerationDefaults, tiny
from qwen2.weights.adapter_texts import save_texts
from qwen2.weights.create import again
from qwen2.weights.export import to_gguf, to_hf_folder
from qwen2.weights.gguf_names import gguf_names
from qwen2.weights.model import load
from qwen2.weights.modelfile import Modelfile, parse
from qwen2.weights.store import Store
from tests.conftest import random_adapter, tiny_model
from tests.weights.test_create import KILLED, upload

GREEDY = SamplingParams(temperature=0, max_tokens=10)


@pytest.fixture
def store(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("QWEN2_HOME", str(tmp_path / "home"))
    store = Store(tmp_path / "home")
    store.create("base:one", Modelfile(), {path.name: upload(store, path.read_bytes()) for path in sorted(tiny_folder.iterdir())})
    return store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_adapter(tiny(), tmp_path / "mine", rank=4)


def said(llm: LLM) -> str:
    return llm.generate("Hello", GREEDY)[0].text


def test_uploaded_with_what_lies_beside(store: Store, folder: Path):
    """Clients send a folder as it is: what says how chats are written is kept, the vocabulary is the model's."""
    tokenizer, generation = tiny_model().tokenizer, GenerationDefaults(eos=(511,), temperature=0.5)
    save_texts(folder, tokenizer, generation)
    files = {path.name: upload(store, path.read_bytes()) for path in sorted(folder.iterdir())}
    stored = store.create("up", parse("FROM base:one"), adapter=files)
    kept = ["adapter_config.json", "adapter_model.safetensors", "generation_config.json", "tokenizer_config.json"]
    assert sorted(file.path for file in stored.adapter) == kept
    assert LLM("up").generation == generation
    with pytest.raises(ValueError, match=r"adapters: 'notes.txt': an adapter's files are"):
        store.create("other", parse("FROM base:one"), adapter={**files, "notes.txt": upload(store, b"x")})


def as_gguf(folder: Path, path: Path, alpha: float = 8.0, arch: str = "qwen2") -> None:
    """What llama.cpp's convert_lora_to_gguf.py makes of an adapter's folder."""
    config = tiny(layers=3)
    writer = GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        layer, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        (theirs,) = gguf_names(f"{layer}.weight", config)
        if arch == "llama" and part[0] == "B" and layer.endswith(("q_proj", "k_proj")):
            heads = config.heads if layer.endswith("q_proj") else config.kv_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{theirs}.lora_{part[0].lower()}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
@pytest.mark.parametrize("alpha", [8.0, 0.0])
def test_an_adapter_in_gguf_is_the_one_it_was_made_from(store: Store, tmp_path: Path, arch: str, alpha: float) -> None:
    """An alpha of 0 is a scale of 1, which alpha 4 is for rank 4."""
    folder = random_adapter(tiny(), tmp_path / "mine", rank=4, alpha=alpha or 4.0)
    as_gguf(folder, tmp_path / "mine.gguf", alpha, arch)
    one = store.create("one", parse("FROM base:one\nADAPTER mine"), folder=tmp_path)
    two = store.create("two", parse("FROM base:one\nADAPTER mine.gguf"), folder=tmp_path)
    assert one.adapter_path is not None
    assert two.adapter_path is not None
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (one.adapter_path, two.adapter_path))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    ids = list(range(5, 30))
    assert torch.equal(LLM("one", home=store.home).logits(ids), LLM("two", home=store.home).logits(ids))


def test_the_adapter_is_copied_and_the_weights_are_not(store: Store, folder: Path, tiny_folder: Path) -> None:
    made = store.create("mine", parse("FROM base:one\nADAPTER ./mine\nSYSTEM x"), folder=folder.parent)
    expected = said(LLM(tiny_folder, adapter=folder))
    for path in folder.iterdir():
        path.unlink()
    assert made.digest == store.get("base:one").digest
    assert made.size == store.get("base:one").size + sum(file.size for file in made.adapter)
    assert made.made.adapter == "./mine"
    assert said(LLM("mine", home=store.home)) == expected
    assert said(LLM("base:one", home=store.home)) != expected
    store.remove("base:one")
    child = store.create("child", parse("FROM mine\nPARAMETER top_k 3"))
    copy = store.copy("mine", "copy")
    store.remove("mine")
    for name, one in (("child", child), ("copy", copy)):
        assert one.adapter == made.adapter
        assert not store.get(name).gone
        assert said(LLM(name, home=store.home)) == expected


def test_merged_where_parameters_are_asked_for(store: Store, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exporting and training take the merged weights: what the engine says with the adapter beside them."""
    store.create("mine", parse(f"FROM base:one\nADAPTER {folder}"))
    beside = LLM("mine", home=store.home)
    assert beside.adapter is not None
    merged = load("mine", home=store.home)
    assert merged.adapter is None
    assert not any(parameter.requires_grad for parameter in merged.network.parameters())
    to_hf_folder(merged, tmp_path / "merged")
    ids = list(range(5, 60))
    expected = LLM(tmp_path / "merged").logits(ids)
    assert torch.allclose(beside.logits(ids), expected, atol=2e-3 * float(expected.abs().max()))
    assert not torch.allclose(LLM("base:one", home=store.home).logits(ids), expected, atol=0.05 * float(expected.abs().max()))
    with pytest.raises(ValueError, match="mine has an adapter, which no file of smaller weights would have: qwen2 export mine FOLDER"):
        quantize("mine", tmp_path / "small.gguf", to="q8_0")
    with pytest.raises(ValueError, match="has an adapter: take the model that it was made from"):
        LLM("base:one", home=store.home, draft="mine")
    small = store.create("small", parse("FROM mine"), mix="q8_0")
    assert (small.format, small.adapter) == ("GGUF Q8_0", store.get("mine").adapter)
    assert LLM("small", home=store.home).adapter is not None


def test_shown_and_made_again(store: Store, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = store.create("mine", parse(f"FROM base:one\nADAPTER {folder}\nSYSTEM x"))
    show("mine", json_=True)
    told = json.loads(capsys.readouterr().out)["adapter"]
    assert (told["rank"], told["layers"], told["from"], told["sha256"]) == (4, 14, str(folder), made.adapter_digest)
    text = again(store, store.get("mine"))
    assert f"ADAPTER {made.adapter_path}" in text.splitlines()
    assert store.create("second", parse(text)).adapter_digest == made.adapter_digest
    child = store.create("child", parse("FROM mine\nSYSTEM y"))
    text = again(store, child)
    assert "FROM mine:latest" in text
    assert "ADAPTER" not in text
    assert store.create("child", parse(text)).adapter == child.adapter


def test_made_again_it_replaces_what_was_there(store: Store, folder: Path, tmp_path: Path) -> None:
    other = random_adapter(tiny(), tmp_path / "other", seed=5)
    to_hf_folder(tiny_model(seed=3), tmp_path / "outside")
    for text, adapter in (
        (f"FROM base:one\nADAPTER {folder}", True),
        (f"FROM base:one\nADAPTER {folder}\nSYSTEM x", True),
        (f"FROM {tmp_path / 'outside'}\nADAPTER {other}", True),
        (f"FROM base:one\nADAPTER {other}", True),
        ("FROM base:one", False),
    ):
        made = store.create("mine", parse(text))
        assert bool(made.adapter) is adapter
        assert not store.get("mine").gone
        inside = {path.name for path in made.folder.iterdir()}
        assert {name for name in inside if name.startswith("adapter-")} == ({made.adapter_path.name} if made.adapter_path else set())
    assert not (store.home / "partial" / "mine" / "latest").exists()


def test_killed_at_any_step_the_store_is_whole(store: Store, folder: Path, tmp_path: Path) -> None:
    to_hf_folder(tiny_model(seed=3), tmp_path / "outside")
    store.copy(str(tmp_path / "outside"), "other")
    text = f"FROM base:one\nADAPTER {folder}\nSYSTEM two"
    done = subprocess.run([sys.executable, "-c", KILLED, str(store.home), text], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = [line.split() for line in done.stdout.splitlines()]
    assert [ended for _, _, ended in steps] == ["killed"] * (len(steps) - 1) + ["whole"]
    assert {system for _, system, _ in steps} == {"one", "two"}
    assert store.get("mine").adapter


@pytest.mark.parametrize(("text", "message"), [
    ("FROM base:one\nADAPTER ./nothing", "ADAPTER ./nothing: no such folder, seen from"),
    ("FROM base:one\nADAPTER ./lora.gguf", "ADAPTER ./lora.gguf: no such file, seen from"),
    ("FROM base:one\nADAPTER ./model.gguf", "not a LoRA adapter but a model; ADAPTER needs one, models stand in FROM"),
    ("FROM base:one\nADAPTER ./deep.gguf", "is not part of this model of 2 layers; the adapter was made for another model"),
    ("FROM base:one\nADAPTER .", "adapter_config.json: missing; an adapter's folder has it beside adapter_model.safetensors"),
    ("FROM base:one\nADAPTER ./wide", "this model needs"),
    ("FROM base:one\nADAPTER ./deep", "this model has no such layer; the adapter \\(of tiny\\) was made for another model"),
    ("FROM ./mine", "an adapter, and no model: name it in ADAPTER, beside FROM with the model that it is for"),
    ("FROM adapted\nADAPTER ./mine", "ADAPTER: adapted:latest has an adapter already, and a model has one"),
])  # fmt: skip
def test_what_is_refused(store: Store, folder: Path, tmp_path: Path, text: str, message: str) -> None:
    random_adapter(tiny(hidden=128), tmp_path / "wide")
    as_gguf(random_adapter(tiny(layers=3), tmp_path / "deep"), tmp_path / "deep.gguf")
    to_gguf(tiny_model(), tmp_path / "model.gguf", "F32")
    store.create("adapted", parse("FROM base:one\nADAPTER ./mine"), folder=tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        store.create("new", parse(text), folder=tmp_path)
    assert not store.has("new")
