"""Rejection sampling beside transformers' generate: answers per second of k samples a prompt, same weights, prompts, sampling and ends.

Ours runs the file as it is (`post/synth/sampling.py`, the engine's batch kept full across prompts); transformers gets the same weights
widened, once per precision and batch size, and its best figure counts. Prompts are sorted by length for it, so that it pads little; a
group's next prompts wait for its slowest answer, as `generate` does. Each run is a process of its own, after a warm-up; prompts are
arithmetic in 25 languages (`post/synth/arithmetic.py`). Checking is left out of both: a number is read in microseconds.

    python bench/reject.py [--model qwen2.5-coder:0.5b] [--k 16] [--prompts 12] [--rows ours float32:32 bfloat16:32 ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peer.machine import command_line, processor

HERE = Path(__file__).parent
ROWS = ("ours:16", "ours:32", "float32:16", "bfloat16:16", "bfloat16:32", "bfloat16:64")
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
    peer.load_state_dict(dict(model.network.tensors()), assign=True)
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
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="ours:BATCH, float32:BATCH, bfloat16:BATCH")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--file", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, _, batch = args.one.partition(":")
        print(json.dumps(ours(args, int(batch)) if kind == "ours" else theirs(args, kind, int(batch))))
        return
    args.machine, results = processor(), HERE / "results"  # waits until the machine is idle
    results.mkdir(exist_ok=True)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        args.file = str(Path(folder) / "prompts.jsonl")
        Path(args.file).write_text("".join(json.dumps(row) + "\n" for row in prompts_of(args.prompts)), encoding="utf-8")
        for row in args.rows:
            found[row] = measured(args, row)
            write(results / f"reject_{args.machine['kind']}.md", report(args, found))
    print("\n".join(report(args, found)))


def write(path: Path, lines: list[str]) -> None:
    """After each row, so that a run that is broken off leaves what it found."""
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measured(args: argparse.Namespace, row: str) -> dict[str, float]:
    """One row, in a process of its own."""
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("model", "k", "max_tokens", "threads", "file")]
    done = subprocess.run([sys.executable, __file__, *flags, "--one", row], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{row}: {found['answers'] / found['seconds']:.2f} answers/s", file=sys.stderr, flush=True)
    return found


def report(args: argparse.Namespace, found: dict[str, dict[str, float]]) -> list[str]:
    rates = {row: one["answers"] / one["seconds"] for row, one in found.items()}
    best = {side: max((rate for row, rate in rates.items() if row.startswith("ours") == side), default=0.0) for side in (True, False)}
    machine = args.machine
    lines = [
        "# Rejection sampling beside transformers' generate",
        f"{machine['name']}; {args.threads} threads; {args.model}; {args.prompts} prompts, k = {args.k}, at most {args.max_tokens} tokens",
        f"command: {command_line()}",
        "",
        "| what:answers at a time | answers/s | tokens/s | tokens an answer |",
        "|---|---|---|---|",
    ]
    for row, one in found.items():
        lines.append(f"| {row} | {rates[row]:.2f} | {one['tokens'] / one['seconds']:.0f} | {one['tokens'] / one['answers']:.1f} |")
    if best[False] and best[True]:
        lines += ["", f"ours / transformers, the quicker row of each: {best[True] / best[False]:.2f} (asked: 2)"]
    return lines


if __name__ == "__main__":
    main()
