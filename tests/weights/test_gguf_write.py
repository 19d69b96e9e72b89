"""GGUF names and export: the file holds what the gguf package would have written, and reads back as the same parameters."""

from __future__ import annotations

import errno
import os
import shutil
from array import array
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize as reference_quantize

from qwen2.config import ModelConfig, MoEConfig, tiny
from qwen2.config.gguf import config_from_gguf, gguf_shapes
from qwen2.model import Qwen2
from qwen2.weights.gguf import GGUFFile
from qwen2.weights.gguf_header import read_header
from qwen2.weights.gguf_names import gguf_names, hf_name, unpermute
from qwen2.weights.gguf_write import gguf_tensors, write_gguf
from qwen2.weights.mixes import MIXES

MOE = MoEConfig(experts=4, active=2, expert_ffn=32, shared_ffn=64)
CONFIGS = {"dense": tiny(), "tied": tiny(tied=True), "moe": tiny(moe=MOE), "moe tied": tiny(moe=MOE, tied=True)}


def random_parameters(config: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        names = {name: parameter.shape for name, parameter in Qwen2(config).named_parameters()}
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


@pytest.mark.parametrize("case", CONFIGS)
def test_names_are_a_bijection_up_to_the_stacked_halves(case: str) -> None:
    config = CONFIGS[case]
    theirs = set(gguf_shapes(config))
    assert {hf_name(name, config) for name in theirs} == set(random_parameters(config))
    assert {name for ours in random_parameters(config) for name in gguf_names(ours, config)} == theirs
    for name in theirs:
        assert name in gguf_names(hf_name(name, config), config)


def test_names_agree_with_the_gguf_package() -> None:
    """Its table maps names without the stacked experts' last part; the dense ones are the same."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    for name in random_parameters(tiny()):
        assert table.get_name(name, try_suffixes=(".weight", ".bias")) == gguf_names(name, tiny())[0]


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.2.attn_q.weight", "blk.00.attn_q.weight", "blk.0.ffn_gate_exps.weight", "x"])
def test_unknown_names_are_named(name: str) -> None:
    with pytest.raises(ValueError) as error:
        hf_name(name, tiny())
    assert str(error.value) == f"GGUF tensor {name!r} is not part of this model of 2 layers"
    with pytest.raises(ValueError) as error:
        gguf_names("model.layers.7.self_attn.q_proj.weight", tiny())
    assert str(error.value) == "parameter 'model.layers.7.self_attn.q_proj.weight' is not part of this model of 2 layers"


def test_unpermute_undoes_llama_cpp_s_order() -> None:
    heads, size = 3, 8
    weight = torch.randn(heads * size, 5)
    permuted = torch.empty_like(weight)  # row by row, as the rotation pairs them: (i, i + d/2) become neighbours
    for head in range(heads):
        for i in range(size // 2):
            permuted[head * size + 2 * i] = weight[head * size + i]
            permuted[head * size + 2 * i + 1] = weight[head * size + i + size // 2]
    assert torch.equal(unpermute(permuted, heads), weight)
    assert torch.equal(unpermute(permuted[:, 0], heads), weight[:, 0])  # a bias


@pytest.mark.parametrize("form", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("case", CONFIGS)
def test_the_file_holds_what_the_gguf_package_would_write(case: str, form: str, tmp_path: Path) -> None:
    config = CONFIGS[case]
    parameters = random_parameters(config)
    tensors, notes = gguf_tensors(config, parameters, form)
    assert notes == []
    path = tmp_path / "model.gguf"
    write_gguf(path, config.to_gguf("Tiny") | {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 3]}, tensors, form)
    assert os.listdir(tmp_path) == ["model.gguf"]

    reader = gguf.GGUFReader(path)
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[{"F32": "ALL_F32"}.get(form, f"MOSTLY_{form}")]
    for tensor in reader.tensors:
        ours = hf_name(tensor.name, replace(config, tied=False))
        source = parameters["model.embed_tokens.weight" if ours not in parameters else ours]
        if "_exps" in tensor.name and "down" not in tensor.name:
            half = source.shape[1] // 2
            source = source[:, :half] if "gate" in tensor.name else source[:, half:]
        single = len(tensor.shape) == 1 or "ffn_gate_inp." in tensor.name
        assert tensor.tensor_type.name == ("F32" if single else form), tensor.name
        expected = reference_quantize(source.numpy(), tensor.tensor_type)
        assert tensor.data.tobytes() == expected.tobytes(), tensor.name

    with GGUFFile.open(path) as file:
        back = config_from_gguf(file.metadata, {name: info.shape for name, info in file.tensors.items()})
        # no key says the dtype; a tied mixture of experts is written with its output matrix
        assert back == replace(config, tied=config.tied and config.moe is None, bos=None, eos=(), dtype="bfloat16")
        assert list(file.metadata["tokenizer.ggml.tokens"]) == ["a", "b"]
        assert file.metadata["tokenizer.ggml.token_type"] == array("i", [1, 3])


def test_rows_that_are_not_whole_blocks_are_reported(tmp_path: Path) -> None:
    config = tiny(ffn=72)
    tensors, notes = gguf_tensors(config, random_parameters(config), "q8_0")
    assert notes == ["2 matrices from blk.0.ffn_down.weight on: rows of 72 weights are not whole Q8_0 blocks of 32; written as F32"]
    write_gguf(tmp_path / "x.gguf", config.to_gguf(), tensors, "q8_0")
    kinds = {name: info.type_name for name, info in read_header(tmp_path / "x.gguf").tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == "F32"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")
    parameters = random_parameters(tiny())
    parameters["model.layers.1.mlp.up_proj.weight"][3, 4] = -70000.0
    tensors, _ = gguf_tensors(tiny(), parameters, "F16")
    with pytest.raises(ValueError) as error:
        write_gguf(path, tiny().to_gguf(), tensors, "F16")
    assert str(error.value) == "tensor blk.1.ffn_up.weight has a weight of magnitude 70000, and F16 ends at 65504; write BF16"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.gguf"]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10_000, 9_000, 1_000))
    tensors, _ = gguf_tensors(tiny(), random_parameters(tiny()), "F32")
    path = tmp_path / "x.gguf"
    with pytest.raises(OSError) as error:
        write_gguf(path, tiny().to_gguf(), tensors, "F32")
    assert error.value.errno == errno.ENOSPC
    needed = sum(tensor.nbytes for tensor in tensors)
    assert error.value.strerror == f"{path}: the file needs {needed} bytes and the disk has 1000 free; make room or write elsewhere"
    assert os.listdir(tmp_path) == []


def test_other_refusals() -> None:
    parameters = random_parameters(tiny())
    with pytest.raises(ValueError) as error:
        gguf_tensors(tiny(), parameters, "Q4_K")
    assert str(error.value) == f"GGUF format 'Q4_K' cannot be written; choose one of {', '.join(MIXES)}"
    del parameters["model.norm.weight"]
    with pytest.raises(ValueError) as error:
        gguf_tensors(tiny(), parameters, "F32")
    assert str(error.value) == "parameter model.norm.weight is missing, from which GGUF tensor output_norm.weight is written"


def test_numbers_are_written_in_the_width_that_holds_them(tmp_path: Path) -> None:
    values = {"a": 2**32 - 1, "b": -5, "c": 2**40, "d": -(2**40), "e": 2**64 - 1, "f": True, "g": 0.1, "h": array("Q", [2**64 - 1])}
    write_gguf(tmp_path / "x.gguf", {"general.architecture": "qwen2"} | values, [], "F32")
    metadata = read_header(tmp_path / "x.gguf").metadata
    assert {key: metadata[key] for key in values} == values | {"g": float(np.float32(0.1))}
    with pytest.raises(ValueError, match="GGUF key x: a value of type dict cannot be written"):
        write_gguf(tmp_path / "y.gguf", {"general.architecture": "qwen2", "x": {}}, [], "F32")
