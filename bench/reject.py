"""Rejection sampling beside transformers' generate: answers per second of k samples a prompt, same weights, prompts, sampling and ends.

Ours runs the file as it is (`post/synth/sampling.py`, the engine's batch kept full across prompts); transformers gets the same weights
widened, once per precision and batch size, and of both the quickest row counts. Prompts are sorted by length for it, so that it pads
little; a group's next prompts wait for its slowest answer, as `generate` does. Each run is a process of its own, after a warm-up;
prompts are arithmetic in 25 languages (`post/synth/arithmetic.py`). Checking is left out of both: a number is read in microseconds.

    python bench/reject.py [--model qwen2.5-coder:0.5b] [--k 16] [--prompts 12] [--batches 16 32 64] [--precisions bfloat16 float32]
    python bench/reject.py --ours --precisions float32 --batches 64         # a row more; those that are there are kept
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peer.machine import processor
from peer.results import Results

ASKED = 2  # times as many answers a second
SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


def prompts_of(count: int) -> list[dict[str, Any]]:
    from qwen2.post.synth.arithmetic import problems

    return [problem.row() for problem in problems(count, "held-out")]


def ours(args: argparse.Namespace, batch: int) -> dict[str, float]:
    """Answers, tokens, seconds of the engine."""
    from qwen2 import LLM, SamplingParams
    from qwen2.post.checks.checkers import make_checker
    from qwen2.post.synth.prompts import read_prompts
    from qwen2.post.synth.sampling import EngineSampler

    path = Path(args.file)
    found = read_prompts([path], make_checker("number")).found
    llm = LLM(args.model, threads=args.threads, max_batch=batch)
    sampler = EngineSampler(llm, SamplingParams(**SAMPLING, max_tokens=args.max_tokens), digest="")  # type: ignore[arg-type]
    list(sampler.sample(found[:1], 2, 1))
    llm.engine.clear_cache()
    start, answers, tokens = time.perf_counter(), 0, 0
    for _, listed in sampler.sample(found, args.k, 0):
        answers += len(listed)
        tokens += sum(one.tokens for one in listed if not isinstance(one, str))
    return {"answers": answers, "tokens": tokens, "seconds": time.perf_counter() - start}


def theirs(args: argparse.Namespace, precision: str, batch: int) -> dict[str, float]:
    """The same of transformers, `batch` answers at a time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qwen2.weights.model import load

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = load(args.model, dtype=precision)
    config = AutoConfig.for_model(**model.config.to_hf())
    dtype = getattr(torch, precision)
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = dict(model.network.tensors())
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])  # where it is tied, one tensor is both
    peer.load_state_dict(weights, assign=True)
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config)
    peer.eval()
    rows = [json.loads(line) for line in Path(args.file).read_text(encoding="utf-8").splitlines()]
    ids = sorted((model.template.render([{"role": "user", "content": row["prompt"]}]).ids for row in rows), key=len)
    ends, pad = sorted(set(model.generation.eos) | set(model.config.eos)), model.generation.eos[-1]
    options = {**SAMPLING, "do_sample": True, "max_new_tokens": args.max_tokens, "eos_token_id": ends, "pad_token_id": pad}
    group = max(1, batch // args.k)

    @torch.inference_mode()
    def generate(part: list[list[int]], k: int, most: int) -> int:
        width = max(map(len, part))
        tokens = torch.tensor([[pad] * (width - len(one)) + list(one) for one in part])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in part])
        whole = peer.generate(tokens, attention_mask=mask, num_return_sequences=k, **{**options, "max_new_tokens": most})[:, width:]
        return sum(next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in whole.tolist())

    generate(ids[:1], 2, 4)
    start, tokens = time.perf_counter(), 0
    for i in range(0, len(ids), group):
        tokens += generate(ids[i : i + group], args.k, args.max_tokens)
    return {"answers": len(ids) * args.k, "tokens": tokens, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder:0.5b")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours", type=int, nargs="*", default=[16, 32], metavar="BATCH", help="our answers at a time; none: not run")
    parser.add_argument("--batches", type=int, nargs="*", default=[16, 32, 64], metavar="BATCH", help="the same of transformers")
    parser.add_argument("--precisions", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, help="where results are kept; left out: bench/results/")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--file", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, _, batch = args.one.partition(":")
        print(json.dumps(ours(args, int(batch)) if kind == "ours" else theirs(args, kind, int(batch))))
        return
    if min(args.k, args.prompts, args.max_tokens, args.threads, *args.ours, *args.batches) < 1:
        parser.error("--k, --prompts, --max-tokens, --threads, --ours and --batches: at least 1")
    rows = [f"ours:{batch}" for batch in args.ours]
    rows += [f"{precision}:{batch}" for precision in args.precisions for batch in args.batches]
    results = Results("reject", processor(), table, args.out)  # waits until the machine is idle
    asked = f"{args.model}, {args.prompts} prompts, k = {args.k}, at most {args.max_tokens} tokens, {args.threads} threads"
    with tempfile.TemporaryDirectory() as folder:
        args.file = str(Path(folder) / "prompts.jsonl")
        Path(args.file).write_text("".join(json.dumps(row) + "\n" for row in prompts_of(args.prompts)), encoding="utf-8")
        for row in rows:
            results.add(f"{row}, {asked}", {"row": row, "asked": asked, **measured(args, row)})
    print(results.text())


def measured(args: argparse.Namespace, row: str) -> dict[str, float]:
    """One row, in a process of its own."""
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("model", "k", "max_tokens", "threads", "file")]
    done = subprocess.run([sys.executable, __file__, *flags, "--one", row], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{row}: {rate(found):.2f} answers/s", file=sys.stderr, flush=True)
    return found


def rate(found: Mapping[str, Any]) -> float:
    return float(found["answers"] / found["seconds"])


def table(kept: dict[str, Any]) -> list[str]:
    """All rows there are, as lines of Markdown: those of equal prompts and sampling together."""
    lines = ["# Rejection sampling beside transformers' generate"]
    for asked in dict.fromkeys(one["asked"] for one in kept.values()):
        rows = [one for one in kept.values() if one["asked"] == asked]
        lines += ["", asked, "", "| what:answers at a time | answers/s | tokens/s | tokens an answer |", "|---|---|---|---|"]
        for one in rows:
            tokens = f"{one['tokens'] / one['seconds']:.0f} | {one['tokens'] / one['answers']:.1f}"
            lines.append(f"| {one['row']} | {rate(one):.2f} | {tokens} |")
        sides = [[one for one in rows if one["row"].startswith("ours") == is_ours] for is_ours in (True, False)]
        if all(sides):
            best, peer = (max(side, key=rate) for side in sides)
            ratio = f"{rate(best) / rate(peer):.2f} (asked: {ASKED})"
            lines += ["", f"{best['row']} / {peer['row']}, the quickest of {len(sides[0])} and {len(sides[1])} rows: {ratio}"]
    return lines


if __name__ == "__main__":
    main()
