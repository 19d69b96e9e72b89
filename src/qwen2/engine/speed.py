"""How fast a loaded model is here, and how fast it could be: prefill, decode, and the machine's own ceilings.

Prompts are random and new each time, so that no cache helps; answers go on past any end token, and the model must not guess
(`guesses=0`), since what a random prompt is answered with repeats itself. The ceilings are measured by the
kernels' own instructions (kernels/ceilings.h): what all threads together read from memory, and how many bytes they multiply, or how
many floats where most of the weights are floats.
What is left out: other engines (bench/peers.py) and quality (bench/quality.py).

    measure_decode(llm, depth=4096, streams=1, tokens=64, random=Random(0)).rate
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from qwen2 import kernels
from qwen2.engine.request import SamplingParams
from qwen2.model.packed import PackedExperts
from qwen2.quant import FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from qwen2.engine.llm import LLM

BUFFER = 512 << 20  # bytes read for the ceiling: far more than the caches hold
ROUNDS = 1 << 20  # of multiplications, some milliseconds
TRIES = 8
SHORTEST = 8  # tokens of a prompt at depth 0


@dataclass
class Ceilings:
    """What the kernels' threads can do here at most; measured again and again between the figures that are held against it.

    Memory that others use too is not always equally fast: the median of the reads is what a median of speeds compares with.
    """

    reads: list[float] = field(default_factory=list)  # bytes a second
    floats: bool = False  # whether floats are multiplied, not bytes
    multiply: float = 0.0  # operations a second, a product and its addition being two; the best

    @property
    def read(self) -> float:
        return median(self.reads)

    def measure(self) -> None:
        """Some more tries. Only where kernels run."""
        native = kernels.library()
        assert native is not None, "there is a set of kernels in use"
        buffer = np.ones(BUFFER, dtype=np.uint8)
        self.reads += [BUFFER / _seconds(lambda: native.qwen2_read(buffer.ctypes.data, BUFFER)) for _ in range(TRIES)]
        for _ in range(TRIES):
            start = time.perf_counter()
            done = (native.qwen2_multiply_floats if self.floats else native.qwen2_multiply_bytes)(ROUNDS)
            self.multiply = max(self.multiply, done / (time.perf_counter() - start))


@dataclass(frozen=True)
class Prefill:
    """One prompt read."""

    tokens: int
    seconds: float
    operations: float  # of the weights' products and of attention

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Decode:
    """Some steps of some streams."""

    streams: int
    steps: int
    seconds: float
    nbytes: float  # weights and cache read in all steps
    operations: float  # of all steps
    outside: float  # share of the time in which no kernel ran: Python, torch, waiting

    @property
    def rate(self) -> float:
        return self.streams * self.steps / self.seconds


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def prompt(llm: LLM, length: int, random: Random) -> list[int]:
    """Random ids: of plain text, where the vocabulary is large."""
    low, high = (1000, min(100_000, llm.engine.vocab)) if llm.engine.vocab > 2000 else (0, llm.engine.vocab)
    return [random.randrange(low, high) for _ in range(length)]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=tokens, ignore_eos=True)


def measure_prefill(llm: LLM, length: int, random: Random) -> Prefill:
    """Read a new prompt of `length` tokens, up to its first answer token."""
    request = llm.engine.request(prompt(llm, length, random), greedy(1), adapter=llm.adapter)
    seconds = _seconds(lambda: list(llm.engine.run([request])))
    llm.engine.clear_cache()
    return Prefill(length, seconds, operations(llm, length))


def room(llm: LLM, depth: int, streams: int, tokens: int) -> int:
    """Tokens of the window that `measure_decode` takes: the first stream writes on until the last has begun."""
    start = max(SHORTEST, depth)
    return start + tokens + streams * (start // llm.engine.scheduler.chunk + 2)


def measure_decode(llm: LLM, depth: int, streams: int, tokens: int, random: Random) -> Decode:
    """`tokens` steps of `streams` answers at once, each behind a prompt of `depth` tokens of its own. A chunk is a token."""
    assert llm.engine.scheduler.guesses == 0, "a guess that is right is a token without its step"
    start = max(SHORTEST, depth)
    most = room(llm, depth, streams, tokens) - start
    requests = [llm.engine.request(prompt(llm, start, random), greedy(most), adapter=llm.adapter) for _ in range(streams)]
    waiting, written, begin, busy = {request.id for request in requests}, 0, 0.0, 0.0
    for request, _ in llm.engine.run(requests):
        if waiting:
            waiting.discard(request.id)
            begin, busy = time.perf_counter(), kernels.busy_seconds()
            continue
        written += 1
        if written == tokens * streams:
            break
    seconds, busy = time.perf_counter() - begin, kernels.busy_seconds() - busy
    llm.engine.clear_cache()
    assert written == tokens * streams, f"{written} tokens were written in {tokens} steps of {streams}"
    read = tokens * (weight_bytes(llm, streams) + streams * llm.engine.runner.token_bytes * (start + tokens / 2))
    each = llm.model.config.flops_per_token(start + tokens // 2)
    return Decode(streams, tokens, seconds, read, tokens * streams * each, max(0.0, 1 - busy / seconds))


def weight_bytes(llm: LLM, tokens: int) -> float:
    """Bytes of weights that a step of so many tokens reads; of routed experts those that are chosen if all are chosen alike."""
    network, moe = llm.model.network, llm.model.config.moe
    if moe is None:
        return network.weight_bytes()
    routed = sum(matrix.nbytes for experts in _experts(llm) for matrix in experts.packed_matrices())
    return network.weight_bytes() - routed * (1 - moe.active / moe.experts) ** tokens


def multiplies_floats(llm: LLM) -> bool:
    """Whether most of the packed weights are floats, whose products are of floats, not of bytes."""
    sizes = {True: 0, False: 0}
    for module in llm.model.network.modules():
        for matrix in getattr(module, "packed_matrices", tuple)():
            sizes[FORMATS[matrix.type].block == 1] += matrix.shape[0] * matrix.shape[1]
    return sizes[True] > sizes[False]


def _experts(llm: LLM) -> list[PackedExperts]:
    return [module for module in llm.model.network.modules() if isinstance(module, PackedExperts)]


def operations(llm: LLM, tokens: int) -> float:
    """Multiplications and additions of a prompt: every layer's matrices, attention to all before, and the head once.

    That is the model's own count; the kernels leave out what nobody reads of the last layer.
    """
    config = llm.model.config
    first, last = (config.flops_per_token(position, head=False) for position in (0, tokens - 1))  # attention grows evenly between
    return tokens * (first + last) / 2 + config.flops_per_token(0) - first
