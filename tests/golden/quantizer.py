"""Record what llama.cpp's quantizer makes, so that the suite can compare without building it.

`errors`: for each format the error of `ggml_quantize_chunk` on one fixed matrix, as a share of the matrix's root mean square.
`types`: for each mix and each of the models below the type that `llama-quantize` gives every matrix, layer by layer.

    python -m tests.golden.quantizer BUILD/bin          # a build of llama.cpp (version: llama-cpp-python 0.3.36); writes quantizer.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from qwen2.config import GenerationDefaults, ModelConfig, tiny
from qwen2.quant import FORMATS, dequantize
from qwen2.tokenizer import ChatTemplate, Tokenizer
from qwen2.weights.export import to_gguf
from qwen2.weights.mixes import MIXES, PLAIN
from qwen2.weights.model import Model
from tests.golden.exports import exact_network
from tests.tokenizer.conftest import tiny_parts

HERE = Path(__file__).parent
DEEP = {"vocab": 265, "eos": (262,), "bos": None, "layers": 16, "hidden": 256, "ffn": 512}
CONFIGS: dict[str, ModelConfig] = {
    "untied": tiny(**DEEP, heads=4, kv_heads=1),
    "tied": tiny(**DEEP, heads=4, kv_heads=2, tied=True),
    "odd rows": tiny(**(DEEP | {"hidden": 288, "ffn": 768}), heads=4, kv_heads=2),  # 288 is whole blocks of 32 and not of 256
}


def matrix() -> np.ndarray:
    """(512, 1024) with a spread of sizes from row to row and some outliers, as a trained matrix has."""
    rng = np.random.default_rng(2024)
    weights = rng.standard_normal((512, 1024)) * 0.02 * np.exp(0.3 * rng.standard_normal((512, 1)))
    return (weights * np.where(rng.random(weights.shape) < 0.002, 6, 1)).astype(np.float32)


def error(raw: np.ndarray, kind: int, weights: np.ndarray) -> float:
    lost = dequantize(raw, kind, weights.shape).numpy().astype(np.float64) - weights
    return float(np.sqrt(np.square(lost).mean() / np.square(weights.astype(np.float64)).mean()))


def errors(folder: Path) -> dict[str, float]:
    library = ctypes.CDLL(str(folder / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    weights, found = matrix(), {}
    for kind, form in FORMATS.items():
        if form.block > 1:
            raw = np.empty(form.size(weights.size), dtype=np.uint8)
            library.ggml_quantize_chunk(kind, weights.ctypes.data, raw.ctypes.data, 0, *weights.shape, None)
            found[form.name] = round(error(raw, kind, weights), 6)
    return found


def layer_by_layer(path: Path) -> dict[str, str]:
    """Of every kind of matrix its types: one where all layers agree, else in order."""
    kinds: dict[str, list[str]] = {}
    for tensor in GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            parts = tensor.name.split(".")
            kinds.setdefault(parts[-2], []).append(tensor.tensor_type.name)
    return {kind: types[0] if len(set(types)) == 1 else " ".join(types) for kind, types in sorted(kinds.items())}


def model(config: ModelConfig) -> Model:
    tokenizer = Tokenizer(tiny_parts())
    return Model(
        config, tokenizer, ChatTemplate.of(tokenizer), GenerationDefaults(eos=(262,)), exact_network(config), "tiny", Path(), "F32"
    )


def types(program: Path) -> dict[str, dict[str, dict[str, str]]]:
    found: dict[str, dict[str, dict[str, str]]] = {}
    for case, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            source, made = Path(folder) / "source.gguf", Path(folder) / "made.gguf"
            to_gguf(model(config), source, "F32")
            for mix in MIXES:
                if mix not in PLAIN:
                    subprocess.run([program, source, made, mix], check=True, capture_output=True)
                    found.setdefault(case, {})[mix] = layer_by_layer(made)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    record = {"errors": errors(args.folder), "types": types(args.folder / "llama-quantize")}
    (HERE / "quantizer.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
