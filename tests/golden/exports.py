"""Tiny models whose exported files are the same to the byte on every machine, for llama.cpp to answer.

A vocabulary that `qwen2 tokenizer train` learns is among them, in FOLDER/vocabulary, for llama.cpp to cut text with.

Weights are small integers over a power of two, drawn from a seeded integer generator: no rounding anywhere, in F16 and BF16
neither, so that only Q8_0 changes them. The vocabulary is all bytes and a few merges. `quantize` makes the files of WIDE, whose rows
every block fits.

    python -m tests.golden.exports FOLDER          # writes them; then make_llama_cpp.py --exports FOLDER --vocabulary FOLDER/vocabulary
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from qwen2.config import GenerationDefaults, ModelConfig, MoEConfig, RopeScaling, tiny
from qwen2.model import Qwen2
from qwen2.tokenizer import ChatTemplate, Tokenizer
from qwen2.tokenizer.train import Settings, learn
from qwen2.weights.export import to_gguf
from qwen2.weights.model import Model
from qwen2.weights.quantize import open_plan
from tests.tokenizer.conftest import DATA, tiny_parts

FORMS = ("F32", "F16", "BF16", "Q8_0")
CONFIGS = {
    "dense": tiny(vocab=265, eos=(262,), bos=None),
    "tied": tiny(vocab=265, eos=(262,), bos=None, tied=True),
    "yarn": tiny(vocab=265, eos=(262,), bos=None, rope_scaling=RopeScaling(factor=4.0, original_context=16), context=64),
    "moe": tiny(vocab=265, eos=(262,), bos=None, moe=MoEConfig(experts=8, active=2, expert_ffn=32, shared_ffn=64)),
}
WIDE = "wide"
CONFIGS_TO_QUANTIZE = {WIDE: tiny(vocab=265, eos=(262,), bos=None, hidden=256, ffn=512, heads=4, kv_heads=2)}
TRAINED = "trained"
MADE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")


def exact_network(config: ModelConfig) -> Qwen2:
    """Every parameter a multiple of 1/256 with at most seven bits."""
    generator = torch.Generator().manual_seed(2024)
    network = Qwen2(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            whole = torch.randint(-64, 65, parameter.shape, generator=generator, dtype=torch.int32)
            parameter.copy_(1 + whole // 8 / 16 if "norm" in name else whole / 256)
    return network.eval()


def export_model(name: str) -> Model:
    config, tokenizer = (CONFIGS | CONFIGS_TO_QUANTIZE)[name], Tokenizer(tiny_parts())
    template, generation = ChatTemplate.of(tokenizer), GenerationDefaults(eos=(262, 260))
    return Model(config, tokenizer, template, generation, exact_network(config), name, Path(name), "float32")


def declaration() -> Iterator[tuple[str, str]]:
    """The first paragraphs of the Universal Declaration of Human Rights in 29 languages."""
    for line in gzip.decompress((DATA / "udhr.jsonl.gz").read_bytes()).splitlines():
        row = json.loads(line)
        for paragraph in row["paragraphs"][:20]:
            yield row["code"], paragraph


def trained_model() -> Model:
    """Exact weights over a vocabulary of 1,024 entries that was learned as `qwen2 tokenizer train` learns one."""
    tokenizer = learn(declaration, Settings(vocab=1024)).tokenizer
    end = tokenizer.control["<|endoftext|>"]
    config = tiny(vocab=1024, eos=(end,), bos=None)
    defaults = GenerationDefaults(eos=(end,))
    return Model(config, tokenizer, ChatTemplate.of(tokenizer), defaults, exact_network(config), TRAINED, Path(TRAINED), "float32")


def write_quantized(mix: str, source: Path, path: Path) -> None:
    """What `qwen2 quantize` makes of the wide model's exact weights."""
    to_gguf(export_model(WIDE), source, "F32")
    with open_plan(source, mix, WIDE) as plan:
        plan.write(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in CONFIGS:
        for form in FORMS:
            to_gguf(export_model(name), folder / f"{name}.{form}.gguf", form)
    for mix in MADE:
        source = folder / "source.gguf"
        write_quantized(mix, source, folder / f"quantized.{mix}.gguf")
        source.unlink()
    (folder / "vocabulary").mkdir(exist_ok=True)
    to_gguf(trained_model(), folder / "vocabulary" / f"{TRAINED}.gguf", "F32")


if __name__ == "__main__":
    main()
