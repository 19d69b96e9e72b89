"""What adapters cost: a batch of 16 answers of one model with no adapter, with one, and with eight, alternating in one process.

Tokens a second of each, medians over the rounds, and their ratios, into bench/results/. Adapters are random, of every linear layer, in
float32, so that none is stored in fewer bits. Guesses are off: what is measured is a step of 16 tokens. Left out: reading prompts,
where an adapter's share is smaller, and more than one machine's worth of threads.

    python bench/adapters.py [--model qwen2.5-coder:0.5b] [--rank 16] [--rounds 5] [--tokens 64] [--threads 2]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peer.machine import processor
from peer.results import Results

from qwen2 import LLM, SamplingParams, kernels
from qwen2.model.adapted import ServedAdapter
from qwen2.model.lora import Adapter, targeted

BATCH, PROMPT = 16, 32
KINDS = {"none": 0, "one": 1, "eight": 8}
ASKED = {"eight": 0.8}  # of the tokens a second with one


def random_adapter(llm: LLM, seed: int, rank: int) -> ServedAdapter:
    """One of all linear layers, whose additions are small beside the base's products."""
    network, generator = llm.model.network, torch.Generator().manual_seed(seed)
    adapters = {}
    for path in targeted(network, ("all-linear",)):
        layer = network.get_submodule(path)
        rows, columns = int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
        a = torch.randn(rank, columns, generator=generator) / columns**0.5
        adapters[path] = Adapter(a, 0.01 * torch.randn(rows, rank, generator=generator), 2.0)
    return ServedAdapter(network, adapters, f"random {seed}", f"random {seed}")


def rate(llm: LLM, adapters: list[ServedAdapter], tokens: int) -> float:
    """Tokens a second of 16 answers at once, from the first token of the last on."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 20_000, (PROMPT,), generator=generator).tolist() for _ in range(BATCH)]
    given = [adapters[i % len(adapters)] if adapters else None for i in range(BATCH)]
    llm.engine.clear_cache()
    requests = [llm.engine.request(prompt, params, adapter=adapter) for prompt, adapter in zip(prompts, given, strict=True)]
    seconds = [chunk.output.timings.decode_seconds for _, chunk in llm.engine.run(requests) if chunk.output is not None]
    return BATCH * (tokens - 1) / max(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder:0.5b", help="a name, a folder or a file")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where results are kept; left out: bench/results/")
    asked = parser.parse_args()
    results = Results("adapters", processor(), table, asked.out)  # waits until the machine is idle
    llm = LLM(asked.model, threads=asked.threads, max_batch=BATCH, context=1024, guesses=0)
    adapters = [random_adapter(llm, seed, asked.rank) for seed in range(max(KINDS.values()))]
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for count in KINDS.values():  # warm
        rate(llm, adapters[:count], 4)
    for _ in range(asked.rounds):
        for kind, count in KINDS.items():
            rates[kind].append(rate(llm, adapters[:count], asked.tokens))
    what = f"{asked.model}, {BATCH} answers at once of {asked.tokens} tokens, adapters of rank {asked.rank}, {asked.threads} threads"
    results.add(what, {"rates": rates, "adapter_bytes": adapters[0].nbytes, "isa": kernels.isa()})
    print(results.text())


def table(kept: dict[str, Any]) -> list[str]:
    """All rows there are, as lines of Markdown."""
    lines = ["# What adapters cost"]
    for what, one in kept.items():
        rates, size = one["rates"], f"{one['adapter_bytes'] / 1e6:.0f} MB each"
        lines += ["", f"{what}; {size}, kernels for {one['isa']}, medians of {len(rates['one'])} rounds", ""]
        lines += ["| adapters | tokens/s | against one | asked |", "|---|---|---|---|"]
        for kind, found in rates.items():
            ratio = median(own / one for own, one in zip(found, rates["one"], strict=True))
            lines.append(f"| {kind} | {median(found):.1f} | {ratio:.2f} | {ASKED.get(kind, '')} |")
    return lines


if __name__ == "__main__":
    main()
