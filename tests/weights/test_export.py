"""Out and in again: Hugging Face folders that transformers loads, GGUF files that its own reader loads, with the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen2.config import ModelConfig, MoEConfig, tiny
from qwen2.model import Qwen2, packed_attend
from qwen2.weights.export import to_gguf, to_hf_folder
from qwen2.weights.model import load
from tests.conftest import tiny_model

LIKE_THEIRS = MoEConfig(4, 2, expert_ffn=1408, shared_ffn=5632)  # transformers' GGUF loader ignores the file's sizes for these
TOKENS = torch.randint(0, 512, (60,), generator=torch.Generator().manual_seed(3))


def logits(network: Qwen2) -> torch.Tensor:
    with torch.no_grad():
        return network.logits(network(TOKENS, packed_attend(network.config, torch.arange(len(TOKENS)), [len(TOKENS)])))


def test_a_folder_loads_in_transformers_with_the_same_logits(shape: ModelConfig, tmp_path: Path):
    model = tiny_model(shape)
    to_hf_folder(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(model.network), theirs(TOKENS[None]).logits[0], rtol=1e-4, atol=1e-4)


def test_a_folder_loads_here_bit_for_bit(shape: ModelConfig, tmp_path: Path):
    model = tiny_model(shape)
    to_hf_folder(model, tmp_path / "out", shard_bytes=60_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    again = load(tmp_path / "out")
    assert again.config == model.config
    assert again.generation == model.generation
    for (name, ours), (other, theirs) in zip(model.network.tensors(), again.network.tensors(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs), name


def test_a_folders_tokenizer_gives_transformers_the_same_ids(tiny_folder: Path):
    ours, theirs = load(tiny_folder).tokenizer, AutoTokenizer.from_pretrained(tiny_folder)
    text = "The quick brown fox: 12345, \u4f60\u597d\n\n  and more"
    assert ours.encode(text) == theirs.encode(text)


def test_types_are_kept_or_changed_as_asked(tmp_path: Path):
    model = tiny_model()
    model.network.to(torch.bfloat16)
    to_hf_folder(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load(tmp_path / "out").dtype == torch.bfloat16
    wide = load(tmp_path / "out", dtype="float32")
    assert torch.equal(wide.network.lm_head.weight, model.network.lm_head.weight.float())


def test_a_folder_of_another_type(tmp_path: Path):
    model = tiny_model()
    to_hf_folder(model, tmp_path / "out", dtype=torch.bfloat16)
    again = load(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.network.lm_head.weight, model.network.lm_head.weight.bfloat16())
    with torch.no_grad():
        model.network.lm_head.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"^lm_head\.weight: has weights that are not finite in float16; choose a wider type$"):
        to_hf_folder(model, tmp_path / "narrow", dtype=torch.float16)
    assert not (tmp_path / "narrow").exists()


@pytest.mark.parametrize("form", ["F32", "F16", "BF16", "Q8_0"])
def test_a_gguf_file_reads_back(form: str, shape: ModelConfig, tmp_path: Path):
    model = tiny_model(shape)
    if shape.moe is not None and shape.moe.sparse_step > 1:
        with pytest.raises(ValueError, match="1 of 4 layers have experts: GGUF knows all or none; export to a Hugging Face folder"):
            to_gguf(model, tmp_path / "out.gguf", form)
        return
    to_gguf(model, tmp_path / "out.gguf", form)
    again = load(tmp_path / "out.gguf", dtype="float32")
    assert again.generation == model.generation
    assert again.tokenizer.encode("hello <|im_end|> there") == model.tokenizer.encode("hello <|im_end|> there")
    limit = {"F32": 1e-5, "F16": 0.02, "BF16": 0.2, "Q8_0": 0.3}[form]
    difference = (logits(again.network) - logits(model.network)).abs()
    assert difference.mean() < limit
    if form == "F32":
        assert difference.max() < 1e-4


@pytest.mark.parametrize("form", ["F32", "Q8_0"])
@pytest.mark.parametrize("config", [tiny(), tiny(tied=True), tiny(moe=LIKE_THEIRS)], ids=["dense", "tied", "moe"])
def test_a_gguf_file_reads_the_same_in_transformers(form: str, config: ModelConfig, tmp_path: Path):
    to_gguf(tiny_model(config), tmp_path / "out.gguf", form)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32).eval()
    ours = load(tmp_path / "out.gguf", dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(logits(ours.network), theirs(TOKENS[None]).logits[0], rtol=1e-4, atol=1e-4)


def test_what_llama_cpp_computes_otherwise_is_reported(tmp_path: Path):
    moe = MoEConfig(4, 2, 32, 64, norm_topk=True)
    (note,) = to_gguf(tiny_model(tiny(moe=moe)), tmp_path / "out.gguf", "F32")
    assert note.startswith("norm_topk_prob: llama.cpp does not renormalise")
    config = load(tmp_path / "out.gguf").config
    assert config.moe is not None
    assert config.moe.norm_topk


def test_rows_that_a_format_cannot_hold_are_reported(tmp_path: Path):
    model = tiny_model(tiny(hidden=48, moe=MoEConfig(4, 2, 32, 64)))
    notes = to_gguf(model, tmp_path / "out.gguf", "Q8_0")
    assert any("48" in note and "Q8_0" in note for note in notes)
    assert (logits(load(tmp_path / "out.gguf", dtype="float32").network) - logits(model.network)).abs().mean() < 0.3


def test_a_place_that_is_not_there_is_named_and_files_are_readable(tmp_path: Path):
    model = tiny_model()
    for write in (lambda path: to_hf_folder(model, path), lambda path: to_gguf(model, path, "F32")):
        with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path / 'typo'} to write it into"):
            write(tmp_path / "typo" / "out")
    to_hf_folder(model, tmp_path / "out")
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_nothing_is_overwritten_and_nothing_is_left_half(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = load(tiny_folder)
    with pytest.raises(FileExistsError, match="exists already; name a new folder"):
        to_hf_folder(model, tiny_folder)
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        to_gguf(model, tmp_path / "out.gguf", "F32")
    assert (tmp_path / "out.gguf").read_text() == "mine"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen2.weights.export.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        to_hf_folder(model, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
