"""Files made by `quantize`: types as llama.cpp chooses them, weights as near as the format allows, bytes kept where nothing changes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen2.config import MoEConfig, tiny
from qwen2.config.family import FAMILY
from qwen2.config.gguf import gguf_shapes
from qwen2.weights.export import to_gguf, to_hf_folder
from qwen2.weights.gguf import GGUFFile
from qwen2.weights.mixes import MIXES, PLAIN, choose
from qwen2.weights.model import load
from qwen2.weights.quantize import open_plan
from tests.conftest import tiny_model
from tests.golden.quantizer import CONFIGS

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "quantizer.json").read_text())["types"]
WIDE = {"hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2}  # rows that every block fits
MOE = MoEConfig(experts=4, active=2, expert_ffn=256, shared_ffn=512)


def quantized(source: Path, mix: str, place: Path) -> list[str]:
    with open_plan(source, mix) as plan:
        plan.write(place)
        return plan.notes


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix not in PLAIN])
@pytest.mark.parametrize("case", CONFIGS)
def test_every_matrix_gets_the_type_that_llama_cpp_gives_it(case: str, mix: str) -> None:
    config, kinds = CONFIGS[case], {}
    for name, shape in gguf_shapes(config).items():
        if len(shape) > 1:
            kinds.setdefault(name.split(".")[-2], []).append(choose(name, shape, config, mix).type)
    assert {kind: types[0] if len(set(types)) == 1 else " ".join(types) for kind, types in kinds.items()} == GOLDEN[case][mix]


def test_the_72b_model_s_value_projections_get_more() -> None:
    config = FAMILY["qwen2:72b"].config
    for mix in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M"):
        assert choose("blk.29.attn_v.weight", (1024, 8192), config, mix).type == "Q5_K", mix
    assert choose("blk.9.attn_k.weight", (1024, 8192), config, "Q4_K_S").type == "Q4_K"


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_file_loads_and_answers_as_its_blocks_say(kind: str, mix: str, tmp_path: Path) -> None:
    model = tiny_model(tiny(**WIDE, moe=MOE if kind == "moe" else None))
    to_hf_folder(model, tmp_path / "folder")
    quantized(tmp_path / "folder", mix, tmp_path / "out.gguf")
    again = load(tmp_path / "out.gguf", dtype="float32")
    assert again.weight_format == mix
    bits = {"F32": 24, "F16": 11, "BF16": 8}.get(mix) or int(mix.lstrip("IQ")[0])
    for (name, ours), (_, theirs) in zip(again.network.tensors(), model.network.tensors(), strict=True):
        lost = float((ours.detach() - theirs.detach()).square().mean().sqrt() / theirs.detach().square().mean().sqrt().clamp(min=1e-9))
        assert lost < 1.5 * 2.0**-bits * 1.2, name


def test_a_quantized_tensor_of_the_same_type_keeps_its_bytes(tmp_path: Path) -> None:
    to_gguf(tiny_model(tiny(**WIDE)), tmp_path / "f32.gguf", "F32")
    quantized(tmp_path / "f32.gguf", "Q4_K_S", tmp_path / "first.gguf")
    notes = quantized(tmp_path / "first.gguf", "Q4_K_M", tmp_path / "second.gguf")
    assert notes == ["the weights are Q4_K_S, whose loss comes on top: F16 or BF16 weights are a better source"]
    with GGUFFile.open(tmp_path / "first.gguf") as first, GGUFFile.open(tmp_path / "second.gguf") as second:
        assert np.array_equal(first.raw("blk.1.ffn_up.weight"), second.raw("blk.1.ffn_up.weight"))
        assert second.info("blk.1.attn_v.weight").type_name == "Q6_K"


def test_rows_that_no_block_fits_are_said(tmp_path: Path) -> None:
    to_hf_folder(tiny_model(tiny(ffn=72)), tmp_path / "folder")
    with open_plan(tmp_path / "folder", "q4_k_m") as plan:
        held = {tensor.name: tensor.choice for tensor in plan.tensors}
        assert held["blk.0.ffn_up.weight"].type == "Q5_0"
        assert held["blk.0.ffn_down.weight"].type == "F32"
        assert any(note.endswith("rows of 64 weights are not whole Q4_K blocks of 256; written as Q5_0") for note in plan.notes)
        assert any(note.endswith("rows of 72 weights are not whole Q6_K blocks of 256; written as F32") for note in plan.notes)


def test_weights_that_are_not_numbers_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = tiny_model(tiny(**WIDE))
    with torch.no_grad():
        model.network.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    to_gguf(model, tmp_path / "f32.gguf", "F32")
    with pytest.raises(ValueError, match=r"^tensor blk\.1\.ffn_up\.weight has weights that are not finite"):
        quantized(tmp_path / "f32.gguf", "q4_k_m", tmp_path / "out.gguf")
    assert os.listdir(tmp_path) == ["f32.gguf"]


def test_an_unknown_mix_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"^GGUF format 'q4_k' cannot be written; choose one of F32, F16, Q4_0"),
        open_plan(tmp_path, "q4_k"),
    ):
        pass
