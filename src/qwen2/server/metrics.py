"""What Prometheus reads: who runs and waits, what the cache holds, how long tokens take.

curl http://127.0.0.1:11434/metrics
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from qwen2 import kernels

if TYPE_CHECKING:
    from qwen2.engine.request import Chunk, Request
    from qwen2.server.models import Models

FIRST = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300)
NEXT = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 5)


class Metrics:
    """Of one server."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        label = ["model"]
        self.requests = Counter("qwen2_requests", "Answers and texts embedded, by their end.", ["model", "reason"], registry=self.registry)
        self.responses = Counter(
            "qwen2_http_responses", "Responses, by the route's path and their status.", ["path", "status"], registry=self.registry
        )
        self.prompt = Counter("qwen2_prompt_tokens", "Tokens of prompts.", label, registry=self.registry)
        self.cached = Counter("qwen2_cached_tokens", "Tokens of prompts that were not read again.", label, registry=self.registry)
        self.written = Counter("qwen2_completion_tokens", "Tokens written.", label, registry=self.registry)
        self.first = Histogram(
            "qwen2_time_to_first_token_seconds", "From the request to its first token.", label, buckets=FIRST, registry=self.registry
        )
        self.next = Histogram(
            "qwen2_time_per_token_seconds", "Between tokens of an answer, its mean.", label, buckets=NEXT, registry=self.registry
        )
        self.registry.register(_Engines(models))

    def saw(self, model: str, request: Request, chunk: Chunk) -> None:
        """Count a chunk."""
        if chunk.token_ids:
            self.written.labels(model).inc(len(chunk.token_ids))
        output = chunk.output
        if output is None:
            return
        self.requests.labels(model, output.finish_reason).inc()
        if chunk.index == 0:
            self.prompt.labels(model).inc(output.usage.prompt_tokens)
            self.cached.labels(model).inc(output.usage.cached_tokens)
            if request.first_token is not None:
                self.first.labels(model).observe(request.first_token - request.made)
        if output.usage.completion_tokens > 1:
            self.next.labels(model).observe(output.timings.decode_seconds / (output.usage.completion_tokens - 1))

    def embedded(self, model: str, request: Request) -> None:
        """Count a text that was read for its vector."""
        self.requests.labels(model, "embedded").inc()
        self.prompt.labels(model).inc(len(request.prompt))

    def left(self, model: str, answers: int, requests: Iterable[Request] = (), reason: str = "gone") -> None:
        """Count answers that came to no end, "gone" with their client or by an "error", and what was read of their prompts."""
        self.requests.labels(model, reason).inc(answers)
        for request in requests:
            if request.first_token is not None:
                self.prompt.labels(model).inc(len(request.prompt))
                self.cached.labels(model).inc(request.cached_tokens)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)


class _Engines:
    """What is read off the engines when it is asked for."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def collect(self) -> Iterator[Metric]:
        loaded = list(self.models.loaded.values())
        engines = {id(one.llm.engine): one for one in reversed(loaded)}.values()  # of those that share one, under the name loaded first
        own = {
            "qwen2_running": ("Answers being written or read.", lambda e: list(e.scheduler.running)),
            "qwen2_waiting": ("Answers that wait for their turn.", lambda e: [*e.scheduler.waiting, *e.inbox]),
        }
        gauges = {
            "qwen2_cache_blocks_used": ("Blocks of the cache that are in use or can be found.", lambda e: e.cache.pool.taken),
            "qwen2_cache_blocks_idle": ("Those of them that nobody is using.", lambda e: len(e.cache.idle)),
            "qwen2_cache_blocks_limit": ("Blocks that there may be.", lambda e: e.cache.pool.limit),
            "qwen2_cache_bytes": ("Memory of the blocks in use.", lambda e: e.cache_bytes),
        }
        counts = {
            "qwen2_prefix_tokens_asked": ("Tokens of prompts that were looked for in the cache.", lambda e: e.cache.asked),
            "qwen2_prefix_tokens_hit": ("Those that were found.", lambda e: e.cache.hits),
            "qwen2_preemptions": ("Answers that gave way.", lambda e: e.scheduler.preemptions),
            "qwen2_guessed_tokens": ("Tokens that were guessed.", lambda e: e.guessed),
            "qwen2_guessed_right_tokens": ("Those that were right.", lambda e: e.guessed_right),
            "qwen2_drafted_tokens": ("Guessed tokens that a smaller model wrote ahead.", lambda e: e.drafted),
            "qwen2_drafted_right_tokens": ("Those that were right.", lambda e: e.drafted_right),
        }
        yield GaugeMetricFamily("qwen2_models_loaded", "Models in memory.", value=len(loaded))
        yield GaugeMetricFamily("qwen2_scraped_seconds", "When this was read.", value=time.time())
        yield CounterMetricFamily("qwen2_kernel_seconds", "How long kernels have run, of all models.", value=kernels.busy_seconds())
        for name, (text, answers) in own.items():
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            for one in loaded:
                gauge.add_metric([one.name], sum(answer.request.asker == one.llm.asker for answer in answers(one.llm.engine)))
            yield gauge
        for name, (text, read) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            for one in engines:
                gauge.add_metric([one.name], read(one.llm.engine))
            yield gauge
        for name, (text, read) in counts.items():
            counter = CounterMetricFamily(name, text, labels=["model"])
            for one in engines:
                counter.add_metric([one.name], read(one.llm.engine))
            yield counter
