"""What each GGUF mix loses: files of `qwen2 quantize` and of llama.cpp's `llama-quantize`, made from one source, read by one engine.

Perplexity and KL divergence are measured against the source file, over the text and windows of quality.py. Where the source's own
weights were quantized before, mixes that reproduce that grid lose nothing; look at the others. The source's logits are kept, 0.6 MB a
token. Left out: speed (peers.py).

    python bench/formats.py model-f16.gguf --llama-quantize BUILD/bin/llama-quantize [--mixes q4_k_m,q4_0] [--tokens 20000]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from quality import Figures, default_text, windows
from torch import Tensor

from qwen2 import LLM
from qwen2.weights.mixes import MIXES, PLAIN
from qwen2.weights.quantize import open_plan


def make(source: Path, mix: str, theirs: Path | None, folder: Path, threads: int) -> dict[str, Path]:
    """The mix's files by their maker, with the time that each took on stderr."""
    files = {"ours": folder / f"ours-{mix}.gguf"}
    start = time.monotonic()
    with open_plan(source, mix) as plan:
        plan.write(files["ours"])
    said = f"{mix}: ours {time.monotonic() - start:.1f} s"
    if theirs is not None:
        files["llama.cpp"] = folder / f"llama-{mix}.gguf"
        start = time.monotonic()
        command = [str(theirs), str(source), str(files["llama.cpp"]), mix, str(threads)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        said += f", llama.cpp {time.monotonic() - start:.1f} s"
    print(said, file=sys.stderr)
    return files


def judge(witness: list[Tensor], path: Path, listed: list[list[int]], threads: int) -> Figures:
    """The file's figures beside its source's logits, each window's (T, V)."""
    figures, llm = Figures(), LLM(path, threads=threads)
    for ids, true in zip(listed, witness, strict=True):
        figures.add(true, llm.logits(ids)[:, : true.shape[1]], ids)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a GGUF file of F16, BF16 or F32")
    parser.add_argument("--llama-quantize", type=Path)
    parser.add_argument("--mixes", default=",".join(mix for mix in MIXES if mix not in PLAIN))
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = LLM(args.source, threads=args.threads)
    listed = windows(source, default_text(3 * args.tokens + 20_000, 4 * args.tokens), args.tokens, args.window)
    vocabulary = source.model.config.vocab
    witness = [source.logits(ids)[:, :vocabulary] for ids in listed]  # 0.6 MB a token
    base = Figures()
    for ids, true in zip(listed, witness, strict=True):
        base.add(true, true, ids)
    print(f"{args.source.name}: perplexity {base.perplexity:.4f} over {args.tokens:,} tokens in windows of {args.window:,}\n")
    print("| mix | by | MB | perplexity | beside the source | mean KL | top-1 agreement |\n|---|---|---|---|---|---|---|")
    for mix in args.mixes.upper().split(","):
        with tempfile.TemporaryDirectory() as folder:
            for maker, path in make(args.source, mix, args.llama_quantize, Path(folder), args.threads).items():
                f = judge(witness, path, listed, args.threads)
                loss, divergence, agreed = f.perplexity / base.perplexity - 1, f.divergence / f.tokens, f.agreed / f.tokens
                row = [
                    mix,
                    maker,
                    f"{path.stat().st_size / 1e6:.0f}",
                    f"{f.perplexity:.4f}",
                    f"{loss:+.2%}",
                    f"{divergence:.5f}",
                    f"{agreed:.2%}",
                ]
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
