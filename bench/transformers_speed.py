"""Our plain torch path beside transformers: prefill, decode, memory, time to the first token; one run, same weights, fp32.

Both run in this process on the same tensors, alternating, with a fresh prompt each round; the figures are medians. Memory and the
first token are taken from processes of their own. What is left out: llama.cpp, which the quantized kernels are measured against.

    python bench/transformers_speed.py [--model qwen2.5-coder:0.5b] [--threads 2] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qwen2 import LLM, SamplingParams
from qwen2.weights.model import load

RESULTS = Path(__file__).parent / "results"
PROMPT, ANSWER = 512, 64
PEAK = """
import json, resource, sys
from qwen2 import LLM, SamplingParams
from qwen2.weights.model import load
llm = LLM(load(sys.argv[1], dtype="float32"), threads=int(sys.argv[2]))
weights = llm.model.config.parameters() * 4
llm.generate([list(range(1000, 1512))], SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"weights": weights, "cache": llm.engine.cache.nbytes, "peak": peak}))
"""


def machine() -> str:
    """The CPU's name and the flags that matter, as Linux tells them."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    text = path.read_text()
    flags = re.search(r"^flags\s*:(.*)$", text, re.M)
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
    known = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
    return f"{name[1] if name else platform.processor()} ({', '.join(f for f in known if flags and f in flags[1].split())})"


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def reference(llm: LLM) -> Any:
    """transformers' model around our tensors."""
    config = AutoConfig.for_model(**llm.model.config.to_hf())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dict(llm.model.network.tensors()), assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def ours(llm: LLM, ids: list[int]) -> tuple[float, float]:
    """Tokens per second of prefill and decode."""
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=ANSWER + 1, ignore_eos=True)
    stream = llm.stream(ids, params)
    prefill = timed(lambda: next(stream))
    decode = timed(lambda: list(stream))
    llm.engine.clear_cache()
    return PROMPT / prefill, ANSWER / decode


@torch.inference_mode()
def theirs(model: Any, ids: list[int]) -> tuple[float, float]:
    """The same of transformers' own `generate` (its first token is the prefill)."""
    prompt = torch.tensor([ids])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prefill = timed(lambda: model.generate(prompt, max_new_tokens=1, min_new_tokens=1, **options))
    whole = timed(lambda: model.generate(prompt, max_new_tokens=ANSWER + 1, min_new_tokens=ANSWER + 1, **options))
    return PROMPT / prefill, ANSWER / (whole - prefill)


def first_token(model: str, threads: int, rounds: int = 3) -> float:
    """Seconds from the call of `qwen2 run` to the first character of its answer."""
    command = [sys.executable, "-m", "qwen2", "run", model, "Hi", "--max-tokens", "1", "--threads", str(threads)]

    def once() -> float:
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            return time.perf_counter() - start

    return statistics.median(once() for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder:0.5b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    start = first_token(args.model, args.threads)
    command = [sys.executable, "-c", PEAK, args.model, str(args.threads)]
    memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    llm = LLM(load(args.model, dtype="float32"), threads=args.threads)
    peer = reference(llm)
    generator = torch.Generator().manual_seed(0)
    rounds = []
    for _ in range(args.rounds + 1):  # the first warms up
        ids = torch.randint(1000, 100_000, (PROMPT,), generator=generator).tolist()
        rounds.append((*ours(llm, ids), *theirs(peer, ids)))
    medians = [statistics.median(column) for column in zip(*rounds[1:], strict=True)]
    limit = 1.1 * memory["weights"] + memory["cache"]
    lines = [
        f"# Plain torch path beside transformers {version('transformers')}, torch {torch.__version__}",
        f"{machine()}; {args.threads} threads; {args.model}, float32; prompt {PROMPT}, answer {ANSWER}; medians of {args.rounds}",
        f"command: python bench/transformers_speed.py --model {args.model} --threads {args.threads} --rounds {args.rounds}",
        "",
        "| | qwen2 | transformers | ratio | asked |",
        "|---|---|---|---|---|",
        f"| prefill, tok/s | {medians[0]:.1f} | {medians[2]:.1f} | {medians[0] / medians[2]:.2f} | 1.0 |",
        f"| decode, tok/s | {medians[1]:.1f} | {medians[3]:.1f} | {medians[1] / medians[3]:.2f} | 1.2 |",
        "",
        f"Peak memory, loading included: {memory['peak'] / 2**20:,.0f} MiB; 1.1 x weights + cache: {limit / 2**20:,.0f} MiB "
        f"(weights {memory['weights'] / 2**20:,.0f}, cache {memory['cache'] / 2**20:,.0f}).",
        f"`qwen2 run` from the call to the first character: {start:.1f} s (asked: 10 s).",
    ]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    isa = "avx512" if "avx512f" in machine() else "avx2"
    (RESULTS / f"transformers_speed_{isa}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
