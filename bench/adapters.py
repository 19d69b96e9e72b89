"""What adapters cost: a batch of 16 answers of one model with no adapter, with one, and with eight, alternating in one process.

Prints Markdown: tokens a second of each, medians over the rounds, and their ratios. Adapters are random, of every linear layer, in
float32, so that none is stored in fewer bits. Guesses are off: what is measured is a step of 16 tokens. Left out: reading prompts,
where an adapter's share is smaller, and more than one machine's worth of threads.

    python bench/adapters.py [--model qwen2.5-coder:0.5b] [--rank 16] [--rounds 5] [--tokens 64] [--threads 2]
"""

from __future__ import annotations

import argparse
from statistics import median

import torch

from qwen2 import LLM, SamplingParams
from qwen2.model.adapted import ServedAdapter
from qwen2.model.lora import Adapter, targeted

BATCH, PROMPT = 16, 32
KINDS = {"none": 0, "one": 1, "eight": 8}


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
    asked = parser.parse_args()
    llm = LLM(asked.model, threads=asked.threads, max_batch=BATCH, context=1024, guesses=0)
    adapters = [random_adapter(llm, seed, asked.rank) for seed in range(max(KINDS.values()))]
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for count in KINDS.values():  # warm
        rate(llm, adapters[:count], 4)
    for _ in range(asked.rounds):
        for kind, count in KINDS.items():
            rates[kind].append(rate(llm, adapters[:count], asked.tokens))
    size = adapters[0].nbytes / 1e6
    print(f"{asked.model}, {BATCH} answers at once, adapters of rank {asked.rank} with {size:.0f} MB each, {asked.threads} threads\n")
    print("| adapters | tokens/s | against one |\n|---|---|---|")
    for kind, found in rates.items():
        ratio = median(own / one for own, one in zip(found, rates["one"], strict=True))
        print(f"| {kind} | {median(found):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
