"""The engines that are compared, each behind the same four calls: load, measure, streams, versions.

`measure` reads a prompt and then writes tokens one by one, greedily and past any end token; it returns the seconds of both. Each
engine runs as its users would run it at its best: llama.cpp with flash attention on and off, no sampling but argmax, logits for the
last token only; transformers in a plain loop, without the costs of its `generate`. Left out: anything that compares answers.

Read by worker.py, in that engine's own interpreter.
"""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

Ids = list[int]


class Engine(Protocol):
    """What a worker needs of an engine. `variant` names one of several ways to run it; most have one, the empty name."""

    def load(self) -> None: ...
    def measure(self, ids: Ids, tokens: int, variant: str) -> tuple[float, float]: ...
    def streams(self, prompts: list[Ids], tokens: int, variant: str) -> tuple[int, float]: ...
    def versions(self) -> dict[str, str]: ...
    def notes(self) -> str: ...


class Ours:
    """qwen2 through its Python face."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch

        import qwen2

        self.qwen2, self.torch, self.options = qwen2, torch, options
        self.make = qwen2.LLM  # imported here, when it is first named: no engine's imports count as loading

    def load(self) -> None:
        options = {name: self.options[name] for name in ("threads", "isa", "context")}
        self.llm = self.make(self.options["model"], **options, guesses=0)  # answers to random prompts repeat themselves

    def _params(self, tokens: int) -> Any:
        return self.qwen2.SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=tokens, ignore_eos=True)

    def measure(self, ids: Ids, tokens: int, variant: str) -> tuple[float, float]:
        start = time.perf_counter()
        output = self.llm.generate([ids], self._params(tokens + 1), progress=False)[0]
        seconds = time.perf_counter() - start
        if output.usage.cached_tokens or len(output.token_ids) != tokens + 1:
            raise RuntimeError(
                f"{output.usage.cached_tokens} tokens came from a cache, {len(output.token_ids)} of {tokens + 1} were written"
            )
        self.llm.engine.clear_cache()
        return seconds - output.timings.decode_seconds, output.timings.decode_seconds

    def streams(self, prompts: list[Ids], tokens: int, variant: str) -> tuple[int, float]:
        """Counted from the step that gave the last prompt its first token to the first answer's end: all run together there."""
        requests = [self.llm.engine.request(ids, self._params(tokens + 1)) for ids in prompts]
        waiting, written, begin, end = {r.id for r in requests}, 0, 0.0, 0.0
        for request, chunk in self.llm.engine.run(requests):
            if waiting:
                waiting.discard(request.id)
                begin = time.perf_counter()
            elif not end:
                written += len(chunk.token_ids)
                end = time.perf_counter() if chunk.output is not None else 0.0
        self.llm.engine.clear_cache()
        return written, end - begin

    def versions(self) -> dict[str, str]:
        return {"qwen2": self.qwen2.__version__, "torch": self.torch.__version__}

    def notes(self) -> str:
        from qwen2 import kernels

        return kernels.report().strip().splitlines()[0]


class Transformers:
    """transformers on torch, scaled dot-product attention, in the type asked for."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        import transformers

        self.torch, self.transformers, self.options = torch, transformers, options
        torch.set_num_threads(options["threads"])
        torch.set_grad_enabled(False)

    def load(self) -> None:
        dtype = getattr(self.torch, self.options["dtype"])
        self.model = self.transformers.AutoModelForCausalLM.from_pretrained(self.options["folder"], dtype=dtype).eval()

    def _run(self, prompts: list[Ids], tokens: int) -> tuple[float, float]:
        start = time.perf_counter()
        out = self.model(input_ids=self.torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        chosen = out.logits[:, -1].argmax(-1, keepdim=True)  # (n, 1)
        read = time.perf_counter()
        for _ in range(tokens):
            out = self.model(input_ids=chosen, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            chosen = out.logits[:, -1].argmax(-1, keepdim=True)
        return read - start, time.perf_counter() - read

    def measure(self, ids: Ids, tokens: int, variant: str) -> tuple[float, float]:
        return self._run([ids], tokens)

    def streams(self, prompts: list[Ids], tokens: int, variant: str) -> tuple[int, float]:
        return len(prompts) * tokens, self._run(prompts, tokens)[1]

    def versions(self) -> dict[str, str]:
        return {"transformers": self.transformers.__version__, "torch": self.torch.__version__}

    def notes(self) -> str:
        return f"{self.options['dtype']}, capability {self.torch.backends.cpu.get_cpu_capability()}"


class CTranslate2:
    """CTranslate2 on a converted folder; the steps are told apart by its callback, which comes with every token."""

    def __init__(self, options: dict[str, Any]) -> None:
        import ctranslate2

        self.library, self.options = ctranslate2, options
        self.words = json.loads((Path(options["folder"]) / "vocabulary.json").read_text())

    def load(self) -> None:
        self.model = self.library.Generator(
            self.options["folder"], compute_type=self.options["compute"], inter_threads=1, intra_threads=self.options["threads"]
        )

    def _run(self, prompts: list[Ids], tokens: int) -> tuple[float, float]:
        times = []

        def step(result: Any) -> bool:
            times.append((result.step, time.perf_counter()))
            return False

        start = time.perf_counter()
        self.model.generate_batch(
            [[self.words[i] for i in ids] for ids in prompts],
            max_length=tokens + 1,
            min_length=tokens + 1,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=step,
        )
        last = max(number for number, _ in times)
        read = max(moment for number, moment in times if number == times[0][0])
        if last - times[0][0] != tokens:
            raise RuntimeError(f"{last - times[0][0] + 1} of {tokens + 1} tokens were written")
        return read - start, times[-1][1] - read

    def measure(self, ids: Ids, tokens: int, variant: str) -> tuple[float, float]:
        return self._run([ids], tokens)

    def streams(self, prompts: list[Ids], tokens: int, variant: str) -> tuple[int, float]:
        return len(prompts) * tokens, self._run(prompts, tokens)[1]

    def versions(self) -> dict[str, str]:
        return {"ctranslate2": self.library.__version__}

    def notes(self) -> str:
        return f"{self.options['compute']}, weights converted from the widened file"


class OpenVINO:
    """OpenVINO GenAI, which reads some GGUF files itself, or a converted folder; ids go in as a tensor."""

    def __init__(self, options: dict[str, Any]) -> None:
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.openvino, self.genai, self.options = numpy, openvino, openvino_genai, options

    def load(self) -> None:
        # held to a set, its default of bf16 on processors with AMX would run without AMX, at a third of the speed
        held = {"INFERENCE_PRECISION_HINT": "f32"} if self.options["isa"] else {}
        self.model = self.genai.LLMPipeline(self.options["folder"], "CPU", INFERENCE_NUM_THREADS=self.options["threads"], **held)

    def _run(self, prompts: list[Ids], tokens: int) -> tuple[float, float]:
        ids = self.numpy.array(prompts, dtype=self.numpy.int64)
        inputs = self.genai.TokenizedInputs(self.openvino.Tensor(ids), self.openvino.Tensor(self.numpy.ones_like(ids)))
        config = self.genai.GenerationConfig(max_new_tokens=tokens + 1, ignore_eos=True, do_sample=False, apply_chat_template=False)
        start = time.perf_counter()
        result = self.model.generate(inputs, config)
        seconds = time.perf_counter() - start
        if any(len(answer) != tokens + 1 for answer in result.tokens):
            raise RuntimeError(f"{[len(answer) for answer in result.tokens]} of {tokens + 1} tokens were written")
        first = result.perf_metrics.get_ttft().mean / 1000
        return first, seconds - first

    def measure(self, ids: Ids, tokens: int, variant: str) -> tuple[float, float]:
        return self._run([ids], tokens)

    def streams(self, prompts: list[Ids], tokens: int, variant: str) -> tuple[int, float]:
        return len(prompts) * tokens, self._run(prompts, tokens)[1]

    def versions(self) -> dict[str, str]:
        return {"openvino": self.openvino.__version__, "openvino-genai": version("openvino-genai")}

    def notes(self) -> str:
        return Path(self.options["folder"]).name


def llama_cpp(options: dict[str, Any]) -> Engine:
    """llama.cpp's engine, in a file of its own."""
    from llama import LlamaCpp

    return LlamaCpp(options)


ENGINES = {"ours": Ours, "llama.cpp": llama_cpp, "transformers": Transformers, "ctranslate2": CTranslate2, "openvino": OpenVINO}
