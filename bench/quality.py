"""What quantized arithmetic costs: perplexity, KL divergence and top-1 agreement over a fixed text, ours and llama.cpp's.

The witness is the same file with its weights widened to float32 and torch's products. Every engine reads the same ids in windows of
2,048 tokens, each window from an empty cache; every token after a window's first counts. The text is the language reference that
comes with every CPython (`pydoc_data.topics`) and, a third of it, source code of its standard library; --text takes any other file.
It differs between Python versions, so figures belong to the hash that is printed. Left out: speed (peers.py).

    python bench/quality.py --llama-cpp VENV/bin/python [--model qwen2.5-coder:0.5b] [--tokens 20000] [--isa avx2]
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import torch
from peer.process import Worker, interpreter
from torch import Tensor

from qwen2 import LLM, kernels
from qwen2.weights.model import load
from qwen2.weights.store import Store

# T tokens of a window, V vocabulary

ROWS = 128  # compared at a time: (ROWS, V) in float32 is 78 MB
CODE = ("argparse", "heapq", "json.decoder", "textwrap", "fractions", "statistics", "csv", "shelve")


@dataclass
class Figures:
    """Sums over the tokens seen so far."""

    tokens: int = 0
    nats: float = 0.0
    divergence: float = 0.0
    agreed: int = 0

    def add(self, witness: Tensor, logits: Tensor, ids: list[int]) -> None:
        """Both (T, V) for the T `ids` of a window; the last row has no target."""
        for at in range(0, len(ids) - 1, ROWS):
            end = min(at + ROWS, len(ids) - 1)
            true, own = torch.log_softmax(witness[at:end].float(), -1), torch.log_softmax(logits[at:end].float(), -1)
            targets = torch.tensor(ids[at + 1 : end + 1])
            self.nats -= float(own.gather(-1, targets[:, None]).double().sum())
            self.divergence += float((true.exp() * (true - own)).sum(-1).double().sum())
            self.agreed += int((true.argmax(-1) == own.argmax(-1)).sum())
            self.tokens += end - at

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)


def default_text(prose: int, code: int) -> str:
    """So many characters of the language reference, then of source code."""
    topics = import_module("pydoc_data.topics").topics
    words = "\n\n".join(textwrap.dedent(topics[name]) for name in sorted(topics))
    source = "\n\n".join(inspect.getsource(import_module(name)) for name in CODE)
    return words[:prose] + "\n\n" + source[:code]


def windows(llm: LLM, text: str, tokens: int, length: int) -> list[list[int]]:
    """The text's first `tokens` ids in pieces; ValueError when it is too short."""
    ids = llm.tokenizer.encode(text)
    if len(ids) < tokens:
        raise ValueError(f"the text has {len(ids):,} tokens, {tokens:,} are asked for: give a longer one by --text or a smaller --tokens")
    return [ids[at : min(at + length, tokens)] for at in range(0, tokens, length)]


def theirs(worker: Worker, ids: list[int], folder: Path, vocabulary: int) -> Tensor:
    """llama.cpp's logits (T, V), mapped from the file that its worker wrote."""
    path = folder / "logits.f32"
    columns = worker.ask("logits", ids=ids, path=str(path), variant="fa")["columns"]
    return torch.from_numpy(numpy.memmap(path, numpy.float32, "r+", shape=(len(ids), columns)))[:, :vocabulary]


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity, KL and agreement of each engine."""
    ours = LLM(args.model, threads=args.threads, isa=args.isa)
    vocabulary = ours.model.config.vocab
    witness = LLM(load(args.model, dtype="float32"), threads=args.threads)
    text = default_text(3 * args.tokens + 20_000, 4 * args.tokens) if args.text is None else args.text.read_text(encoding="utf-8")
    listed = windows(ours, text, args.tokens, args.window)
    figures = {"fp32": Figures(), "ours": Figures()}
    narrow = LLM(ours.model, threads=args.threads, isa=args.isa, cache_bits=8) if kernels.isa() is not None else None
    if narrow is not None:
        figures["ours, cache of 8 bits"] = Figures()
    worker = None
    if args.llama_cpp is not None:
        python, folder = interpreter(args.llama_cpp)
        options = {"model": str(Store().resolve(args.model)[0]), "threads": args.threads, "isa": args.isa, "context": args.window}
        worker = Worker("llama.cpp", "llama.cpp", python, options, {"LLAMA_CPP_LIB_PATH": str(folder)} if folder else {})
        worker.ask("load", ids=listed[0][:8], variant="fa")
        figures["llama.cpp"] = Figures()
    with tempfile.TemporaryDirectory() as scratch:
        for number, ids in enumerate(listed):
            true = witness.logits(ids)[:, :vocabulary]  # (T, V)
            figures["fp32"].add(true, true, ids)
            figures["ours"].add(true, ours.logits(ids)[:, :vocabulary], ids)
            if narrow is not None:
                figures["ours, cache of 8 bits"].add(true, narrow.logits(ids)[:, :vocabulary], ids)
            if worker is not None:
                figures["llama.cpp"].add(true, theirs(worker, ids, Path(scratch), vocabulary), ids)
            said = ", ".join(f"{name} {f.perplexity:.4f}" for name, f in figures.items())
            print(f"window {number + 1} of {len(listed)}: {said}", file=sys.stderr)
    if worker is not None:
        worker.close()
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
    return {"model": args.model, "isa": kernels.isa(), "tokens": args.tokens, "window": args.window, "text": digest, "figures": figures}


def document(run: dict[str, Any]) -> str:
    """A Markdown table."""
    base = run["figures"]["fp32"].perplexity
    lines = [
        f"{run['model']}, kernels for {run['isa']}; {run['tokens']:,} tokens in windows of {run['window']:,}, ids {run['text']}",
        "",
        "| | perplexity | beside fp32 | mean KL(fp32, it) | top-1 agreement |",
        "|---|---|---|---|---|",
    ]
    for name, f in run["figures"].items():
        share, divergence, agreed = f.perplexity / base - 1, f.divergence / f.tokens, f.agreed / f.tokens
        lines.append(f"| {name} | {f.perplexity:.4f} | {share:+.3%} | {divergence:.6f} | {agreed:.3%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder:0.5b", help="a name or a GGUF file")
    parser.add_argument("--text", type=Path, help="a UTF-8 file; left out: Python's own documentation and code")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=("avx2", "avx512", "neon"))
    parser.add_argument("--llama-cpp", metavar="PATH", help="a Python that has llama_cpp, or a build folder of llama.cpp")
    args = parser.parse_args()
    try:
        print(document(compare(args)))
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
