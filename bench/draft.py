"""What a draft brings: one model with and without a smaller one that guesses, alternating in one process on the same prompts.

Prints Markdown: tokens a second of both, medians over the rounds, their ratio, and how many guesses were right. The texts must be
the same, or it ends with an error. Prompt lookup is on in both. Left out: many answers at once, where nobody guesses.

    python bench/draft.py [--model qwen2.5-coder:1.5b] [--draft qwen2.5-coder:0.5b] [--rounds 3] [--tokens 128]
"""

from __future__ import annotations

import argparse
from statistics import median

from qwen2 import LLM, SamplingParams
from qwen2.weights.model import load

PROMPTS = {
    "code": "Write a Python class for a binary search tree with insert, delete, search and an iterator over its keys in order.",
    "prose": "Explain to a curious adult why the sky is blue at noon and red in the evening.",
    "Chinese": "\u8bf7\u7528\u4e00\u6bb5\u8bdd\u4ecb\u7ecd\u676d\u5dde\u7684\u897f\u6e56\u3002",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder:1.5b", help="a name, a folder or a file")
    parser.add_argument("--draft", default="qwen2.5-coder:0.5b", help="a smaller one of the same tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompts", type=lambda text: text.split(","), default=list(PROMPTS), help=f"of {', '.join(PROMPTS)}")
    asked = parser.parse_args()
    model = load(asked.model, packed=True)
    engines = {"alone": LLM(model), "with a draft": LLM(model, draft=asked.draft)}
    params = SamplingParams(temperature=asked.temperature, seed=1, repetition_penalty=1.0, max_tokens=asked.tokens, ignore_eos=True)
    print(f"| {asked.model} | alone | with {asked.draft} | ratio | guesses of the draft, right |\n|---|---|---|---|---|")
    for name in asked.prompts:
        rates: dict[str, list[float]] = {kind: [] for kind in engines}
        texts = set()
        engine = engines["with a draft"].engine
        before = engine.drafted, engine.drafted_right
        for _ in range(asked.rounds):
            for kind, llm in engines.items():
                llm.engine.clear_cache()
                output = llm.chat([{"role": "user", "content": PROMPTS[name]}], params)
                rates[kind].append((asked.tokens - 1) / output.timings.decode_seconds)
                texts.add(output.token_ids)
        if len(texts) != 1:
            raise SystemExit(f"{name}: the texts differ")
        plain, drafted = (median(rates[kind]) for kind in engines)
        ratio = median(b / a for a, b in zip(*rates.values(), strict=True))
        guesses, right = (now - then for now, then in zip((engine.drafted, engine.drafted_right), before, strict=True))
        print(f"| {name} | {plain:.1f} | {drafted:.1f} | {ratio:.2f} | {guesses}, {right / max(1, guesses):.0%} |", flush=True)


if __name__ == "__main__":
    main()
