"""PEFT's folders in and out: the same logits and gradients in PEFT and here; what is refused, and how it is said."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qwen2.config import GenerationDefaults, ModelConfig, MoEConfig, tiny
from qwen2.model import Qwen2
from qwen2.model.lora import LoraSettings, adapted_layers, add_lora, lora_parameters, merge
from qwen2.train.place import is_adapter
from qwen2.weights.adapter import load_adapter, read_adapter, save_adapter
from tests.conftest import random_network, tiny_tokenizer
from tests.model.test_lora import adapted
from tests.model.test_parity import our_import, our_logits, theirs_like

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by an old name

MOE = tiny(moe=MoEConfig(experts=4, active=2, expert_ffn=32, shared_ffn=96))
KINDS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "tied": (tiny(tied=True), {}),
    "rslora-attention": (tiny(), {"use_rslora": True, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "dora": (tiny(tied=True), {"use_dora": True, "lora_alpha": 6}),
    "head": (tiny(), {"target_modules": ["lm_head", "model.layers.1.mlp.down_proj"]}),
    "moe": (MOE, {}),
    "some-layers": (tiny(tied=True), {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "patterns": (tiny(), {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}}),
    "patterns-rslora": (tiny(), {"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"q_proj": 6}, "use_rslora": True}),
    "names-of-others": (tiny(), {"target_modules": ["q_proj", "v_proj", "query_key_value"]}),
}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 512, (2, 30), generator=torch.Generator().manual_seed(1))


def theirs_adapted(config: ModelConfig, folder: Path, **changes: Any) -> PeftModel:
    """A random model in `folder`/base and a random adapter of PEFT's on it, all of whose numbers matter."""
    base = theirs_like(config)
    base.save_pretrained(folder / "base")
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(base, LoraConfig(**given))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter * (1 + 0.2 * noise) if "magnitude" in name else 0.1 * noise)
    return model.eval()


@pytest.mark.parametrize(("config", "changes"), KINDS.values(), ids=KINDS)
def test_their_adapter_here(config: ModelConfig, changes: dict[str, Any], tokens: torch.Tensor, tmp_path: Path):
    """Logits and gradients, then the merged network, and the adapter written anew and loaded by PEFT."""
    theirs = theirs_adapted(config, tmp_path, **changes)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = our_import(tmp_path / "base")
    base = our_logits(ours, tokens).detach()
    saved = load_adapter(ours, tmp_path / "adapter")
    expected = theirs(tokens).logits
    assert (expected - base).abs().max() > 0.02
    torch.testing.assert_close(our_logits(ours, tokens), expected, rtol=1e-4, atol=1e-4)
    labels = tokens.roll(-1, 1).flatten()
    for logits in (our_logits(ours, tokens), expected):
        F.cross_entropy(logits.flatten(0, 1), labels).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    mine = lora_parameters(ours)
    assert len(mine) == len(gradients)
    for name, gradient in gradients.items():
        own = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight").replace(".lora_", ".adapter.lora_")
        torch.testing.assert_close(mine[own].grad, gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    save_adapter(ours, saved.settings, tmp_path / "again", "base")
    again = PeftModel.from_pretrained(theirs_like(config), tmp_path / "again").eval()
    torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    anew = our_import(tmp_path / "base")
    load_adapter(anew, tmp_path / "again")
    torch.testing.assert_close(our_logits(anew, tokens), our_logits(ours, tokens), rtol=1e-5, atol=1e-5)
    merge(ours)
    torch.testing.assert_close(our_logits(ours, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        LoraSettings(rank=4, alpha=8, dropout=0.1),
        LoraSettings(rank=2, rslora=True, targets=("v_proj", "model.layers.0.mlp.gate_proj")),
        LoraSettings(rank=4, alpha=2.5, dora=True, targets="attention"),
    ],
    ids=["lora", "rslora", "dora"],
)
def test_ours_in_peft(settings: LoraSettings, tokens: torch.Tensor, tmp_path: Path):
    theirs_like(tiny(tied=True)).save_pretrained(tmp_path / "base")
    network = adapted(settings, our_import(tmp_path / "base"))
    save_adapter(network, settings, tmp_path / "adapter", "somewhere", texts=(tiny_tokenizer(), GenerationDefaults(eos=(511, 509))))
    assert is_adapter(tmp_path / "adapter")
    assert not is_adapter(tmp_path / "base")
    assert not list(tmp_path.glob(".*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing or unexpected keys are warnings in PEFT
        theirs = PeftModel.from_pretrained(theirs_like(tiny(tied=True)), tmp_path / "adapter").eval()
    given = theirs.peft_config["default"]
    assert (given.r, given.lora_alpha, given.lora_dropout) == (settings.rank, settings.alpha, settings.dropout)
    torch.testing.assert_close(our_logits(network, tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    read = read_adapter(tmp_path / "adapter")
    assert (read.settings.rank, read.settings.scale, read.base) == (settings.rank, settings.scale, "somewhere")
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(our_logits(network, tokens), merged(tokens).logits, rtol=1e-4, atol=1e-4)


def test_first_values_are_distributed_as_theirs(tmp_path: Path):
    theirs = get_peft_model(theirs_like(tiny()), LoraConfig(r=16, target_modules=["q_proj", "down_proj"]))
    ours = random_network(tiny())
    add_lora(ours, LoraSettings(rank=16, targets="q_proj,down_proj"))
    mine = lora_parameters(ours)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            own = name.removeprefix("base_model.model.").replace(".default.weight", "").replace(".lora_", ".adapter.lora_")
            assert mine[own].shape == parameter.shape
            assert mine[own].abs().max().item() == pytest.approx(parameter.abs().max().item(), rel=0.02)
            assert mine[own].std().item() == pytest.approx(parameter.std().item(), rel=0.1)


def write(folder: Path, values: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """An adapter of ours on q_proj, with other values or tensors."""
    settings = LoraSettings(rank=4, targets="q_proj")
    save_adapter(adapted(settings), settings, folder, "some/base")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | (values or {})
    path.write_text(json.dumps(config))
    if tensors is not None:
        there = load_file(folder / "adapter_model.safetensors")
        there.update(tensors)
        save_file({name: tensor for name, tensor in there.items() if tensor.numel()}, folder / "adapter_model.safetensors")
    return folder


Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("values", "tensors", "words"),
    [
        ({"peft_type": "LOHA"}, None, "peft_type 'LOHA' is not supported, only 'LORA'"),
        ({"bias": "all"}, None, "bias 'all' is not supported, only 'none'"),
        ({"fan_in_fan_out": True}, None, "fan_in_fan_out True is not supported"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save: not supported, and it may change"),
        ({"layer_replication": [[0, 2]], "lora_bias": True}, None, "layer_replication, lora_bias: not supported"),
        ({"of_next_year": 1}, None, "of_next_year: not supported, and it may change what the adapter does: merge the adapter in PEFT"),
        ({"init_lora_weights": "pissa_niter_4"}, None, "init_lora_weights 'pissa_niter_4' changes the base's weights too"),
        ({"rank_pattern": {"(q|v)_proj": 2}}, None, r"'\(q\|v\)_proj' is a regular expression"),
        ({"r": 0}, None, "rank 0: must be a whole number of at least 1"),
        ({"r": 8}, None, "model.layers.0.self_attn.q_proj: lora_A has rank 4, adapter_config.json says 8"),
        ({"lora_alpha": "x"}, None, "lora_alpha is 'x', must be a finite number"),
        ({"target_modules": []}, None, r"target_modules is \[\], must be a list of names or a string"),
        ({"use_dora": True}, None, "q_proj has no lora_magnitude_vector"),
        ({}, {f"{Q}.lora_magnitude_vector": torch.ones(64)}, "has a lora_magnitude_vector, but use_dora is false"),
        ({}, {f"{Q}.lora_B.weight": torch.empty(0)}, "model.layers.1.self_attn.q_proj has no lora_B"),
        ({}, {f"{Q}.lora_A.weight": torch.full((4, 64), float("nan"))}, "has numbers that are not finite"),
        ({}, {f"{Q}.lora_A.weight": torch.ones(4, 64).to(torch.float8_e4m3fn)}, "is of type F8_E4M3, not one of F32"),
        ({}, {f"{Q}.lora_A.weight": torch.ones(64)}, r"has shape \[64\]: not what a linear layer's adapter has"),
        ({}, {"base_model.model.lm_head.weight": torch.ones(4)}, "lm_head.weight: an embedding or a layer saved whole; it would change"),
        (
            {},
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4)},
            "lora_embedding_A: an embedding or a layer saved whole",
        ),
    ],
)
def test_what_is_refused(values: dict[str, Any], tensors: dict[str, torch.Tensor] | None, words: str, tmp_path: Path):
    folder = write(tmp_path / "adapter", values, tensors)
    with pytest.raises(ValueError, match=words) as error:
        read_adapter(folder)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        (
            tiny(hidden=128, heads=8, tied=True),
            None,
            r"layers.0.self_attn.q_proj: lora_A is \[4, 64\], this model needs \[4, 128\]: the adapter \(of some/base\) was made for another",
        ),
        (tiny(layers=1, tied=True), None, "layers.1.self_attn.q_proj: this model has no such layer; the adapter"),
        (
            tiny(tied=True),
            {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64), "base_model.model.lm_head.lora_B.weight": torch.ones(512, 4)},
            "lm_head: the embedding and the output head are one matrix in this model: adapted in one place, it would change in the other",
        ),
        (
            tiny(tied=True),
            {f"{Q}.lora_A.weight": torch.empty(0), f"{Q}.lora_B.weight": torch.empty(0)},
            "adapter_config.json targets model.layers.1.self_attn.q_proj, and adapter_model.safetensors has nothing of it",
        ),
        (
            tiny(tied=True),
            {f"{Q}.base_layer.weight": torch.randn(64, 64)},
            "model.layers.1.self_attn.q_proj: its base's own weights, which the file has too, are not this model's",
        ),
    ],
    ids=["width", "depth", "tied", "incomplete", "other-weights"],
)
def test_an_adapter_that_does_not_fit(config: ModelConfig, tensors: dict[str, torch.Tensor] | None, words: str, tmp_path: Path):
    folder, network = write(tmp_path / "adapter", None, tensors), random_network(config)
    with pytest.raises(ValueError, match=words) as error:
        load_adapter(network, folder)
    assert str(error.value).startswith(str(folder))
    assert not list(adapted_layers(network))


def test_targets_that_no_layer_of_this_model_is(tmp_path: Path):
    """PEFT goes on where one of them is there. An embedding is, and not as a layer: an adapter of it would be missing."""
    folder = write(tmp_path / "adapter", {"target_modules": ["query_key_value", "w_pack"]})
    for targets, words in (
        (["query_key_value", "w_pack"], "adapter_config.json targets query_key_value, w_pack: this model has no such layers"),
        (["q_proj", "embed_tokens"], "adapter_config.json: target 'embed_tokens': the embedding and the output head are one matrix"),
    ):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": targets}))
        with pytest.raises(ValueError, match=words) as error:
            load_adapter(random_network(tiny(tied=True)), folder)
        assert str(error.value).startswith(str(folder))


def test_files_that_are_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json: missing; an adapter's folder has it"):
        read_adapter(tmp_path)
    folder = write(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors: missing; an adapter's folder"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"adapter_model.bin: pickled weights are not read, they can run code"):
        read_adapter(folder)


def test_what_is_written_takes_the_place_of_an_adapter_and_of_nothing_else(tmp_path: Path):
    settings = LoraSettings(rank=4, targets="q_proj")
    first, second = adapted(settings), adapted(settings, seed=1)
    save_adapter(first, settings, tmp_path / "adapter", None)
    save_adapter(second, settings, tmp_path / "adapter", None)
    kept = read_adapter(tmp_path / "adapter").tensors["model.layers.0.self_attn.q_proj"]["lora_A"]
    assert torch.equal(kept, lora_parameters(second)["model.layers.0.self_attn.q_proj.adapter.lora_A"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(OSError, match="mine"):
        save_adapter(second, settings, tmp_path / "mine", None)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="no adapters to write"):
        save_adapter(Qwen2(tiny()), settings, tmp_path / "none", None)
    with torch.no_grad():
        lora_parameters(first)["model.layers.0.self_attn.q_proj.adapter.lora_B"].fill_(float("inf"))
    with pytest.raises(ValueError, match=r"q_proj.lora_B has numbers that are not finite"):
        save_adapter(first, settings, tmp_path / "none", None)
