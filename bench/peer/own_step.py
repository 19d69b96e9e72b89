"""Our training step on random tokens, one process a run: its speed and its memory, as JSON on the last line.

What a step of `train/loop.py` does: forward, chunked cross-entropy, backward, clipping, the fused AdamW. Left out: reading data and
writing lines, as in the peer's run.

Read by bench/train.py:  python own_step.py '{"config": {...}, "batch": 8, ...}'
"""

from __future__ import annotations

import json
import resource
import sys
import time
from contextlib import nullcontext

import torch

from qwen2 import kernels
from qwen2.config import ModelConfig
from qwen2.model import Qwen2, load_balancing_loss, packed_attend
from qwen2.train.loss import cross_entropy
from qwen2.train.memory import keep_freed
from qwen2.train.optim import clip, make_adamw, set_rate


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    kernels.select_isa(asked["isa"])
    keep_freed()
    before = resident()
    torch.manual_seed(0)
    config = ModelConfig.from_hf(asked["config"])
    network = Qwen2(config).init_weights()
    batch, length = asked["batch"], asked["length"]
    optimizer = make_adamw(network, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1)
    set_rate(optimizer, 3e-4)
    ids = torch.randint(0, config.vocab, (asked["steps"] + asked["warmup"], batch * length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).repeat(batch)
    parameters, ends = list(network.parameters()), []
    for tokens in ids:
        labels = tokens.view(batch, length).roll(-1, dims=1).clone()
        labels[:, -1] = -100
        router: list[torch.Tensor] | None = [] if config.moe else None
        with torch.autocast("cpu", torch.bfloat16) if asked["precision"] == "bf16" else nullcontext():
            hidden = network(tokens, packed_attend(config, positions, (length,) * batch), router)
            total, count, _ = cross_entropy(network, hidden, labels.flatten())
            loss = total / count
            if router and config.moe:
                loss = loss + config.moe.aux_coef * load_balancing_loss(router, config.moe)
        del hidden, total, router
        loss.backward()
        clip(parameters, torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends.append(time.perf_counter())
    seconds = [b - a for a, b in zip(ends[asked["warmup"] - 1 :], ends[asked["warmup"] :], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = sum(parameter.numel() for parameter in parameters)
    print(json.dumps({"seconds": seconds, "peak": peak - before, "weights": weights, "version": f"kernels for {kernels.isa()}"}))


if __name__ == "__main__":
    main()
