"""Many answers to many prompts: the engine's batch stays full across prompts, and a prompt's answers come together when all are there.

Requests are made as the engine takes them, about two batches ahead; the k samples of a prompt share its reading, prompts that begin
alike share that. The slowest answer of a prompt delays its own prompt only. A seed per prompt, made of the run's seed and the prompt
itself, makes the answers the same in whatever order, batch or sitting they are sampled.

    for prompt, answers in EngineSampler(llm, params).sample(prompts, k=16, seed=0): ...
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from qwen2.engine.request import SamplingParams
from qwen2.post.synth.prompts import Prompt
from qwen2.tokenizer import PlainCalls, fold
from qwen2.weights.adapter_texts import TEXTS
from qwen2.weights.partial import file_digest

if TYPE_CHECKING:
    from qwen2.engine.llm import LLM
    from qwen2.engine.request import Output, Request
    from qwen2.post.rows.records import Tools
    from qwen2.weights.model import Model

WEIGHTS = ("*.safetensors", "*.gguf", "config.json", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json")
PER_ANSWER = {"seed", "n", "context", "logprobs", "prompt_logprobs"}  # of the parameters, what is not the run's


@dataclass(frozen=True)
class Sampled:
    """One answer. `finish` is "stop", or "length" where it was cut off."""

    text: str
    tokens: int
    finish: str


Answers = list[Sampled]


class Sampler(Protocol):
    """Who answers. `name` and `digest` say which model, `params` every sampling parameter that was used."""

    name: str
    digest: str
    params: dict[str, Any]

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A prompt's messages with what the model itself has before them."""

    def message(self, text: str, tools: Tools | None) -> dict[str, Any]:
        """What it wrote as an assistant's message: where there are tools, with its calls."""

    def sample(self, prompts: Iterable[Prompt], k: int, seed: int) -> Generator[tuple[Prompt, Answers | str], None, None]:
        """Each prompt with its k answers, in whatever order they are ready; with a reason where it cannot be asked."""


class EngineSampler:
    """A loaded model. Raises ValueError where k answers would all be the same one."""

    def __init__(self, llm: LLM, params: SamplingParams, name: str | None = None, digest: str | None = None) -> None:
        self.llm, self.asked = llm, params
        resolved = replace(params, seed=0).resolve(llm.generation)
        self.greedy = resolved.temperature == 0
        known = {f.name: _plain(getattr(resolved, f.name)) for f in fields(resolved) if f.name not in PER_ANSWER}
        self.params = {name: value for name, value in known.items() if value not in (None, False, [], {}) or isinstance(value, int | float)}
        beside = "" if llm.adapter is None or llm.model.made.adapter else f" with the adapter {llm.adapter.name}"
        self.name = f"{llm.model.name}{beside}" if name is None else name
        self.digest = digest_of(llm) if digest is None else digest

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with its Modelfile's SYSTEM and MESSAGEs, as `LLM.render` reads them."""
        return [dict(message) for message in self.llm.model.made.conversation(messages)]

    def message(self, text: str, tools: Tools | None) -> dict[str, Any]:
        """The text as it is; with tools, what of it is content and what are calls, as `LLM.chat` tells them apart."""
        if not tools:
            return {"role": "assistant", "content": text}
        parser = self.llm.template.parser(plain=PlainCalls([tool["function"]["name"] for tool in tools]))
        read = fold([*parser.push(text), *parser.flush()])
        called = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in read.tool_calls]
        return {"role": "assistant", "content": read.content} | ({"tool_calls": called} if called else {})

    def sample(self, prompts: Iterable[Prompt], k: int, seed: int) -> Generator[tuple[Prompt, Answers | str], None, None]:
        """The same as of any sampler; a prompt that does not fit the window is refused. ValueError, at once, for k equal answers."""
        if self.greedy and k > 1:
            cure = "give it a temperature, as in --temperature 1"
            raise ValueError(f"k {k} at temperature 0, this model's own default or what you gave: all answers would be alike; {cure}")
        return self._sample(prompts, k, seed)

    def _sample(self, prompts: Iterable[Prompt], k: int, seed: int) -> Generator[tuple[Prompt, Answers | str], None, None]:
        asked: dict[int, tuple[Prompt, list[Output | None], list[int]]] = {}
        refused: deque[tuple[Prompt, str]] = deque()

        def requests() -> Iterator[Request]:
            for prompt in prompts:
                try:
                    request = self.llm.ask(prompt.messages, replace(self.asked, n=k, seed=seed_of(seed, prompt.key)), prompt.tools).request
                except ValueError as error:
                    refused.append((prompt, str(error)))
                    continue
                asked[request.id] = prompt, [None] * k, [k]
                yield request

        with closing(self.llm.engine.run(requests())) as running:
            for request, chunk in running:
                yield from _taken(refused)
                if chunk.output is None:
                    continue
                prompt, outputs, missing = asked[request.id]
                outputs[chunk.index] = chunk.output
                missing[0] -= 1
                if chunk.finish_reason == "abort":
                    raise ValueError(f"{prompt.where}: its answers were broken off by another thread; run this again to go on")
                if not missing[0]:
                    del asked[request.id]
                    yield prompt, [_sampled(output) for output in outputs if output is not None]
        yield from _taken(refused)


def _taken(refused: deque[tuple[Prompt, str]]) -> Iterator[tuple[Prompt, str]]:
    while refused:
        yield refused.popleft()


def _sampled(output: Output) -> Sampled:
    return Sampled(output.text, len(output.token_ids), output.finish_reason)


def _plain(value: Any) -> Any:
    """A parameter as JSON has it."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return {str(key): item for key, item in value.items()}
    return value if value is None or isinstance(value, str | int | float) else repr(value)


def seed_of(seed: int, key: str) -> int:
    """The seed of a prompt's first sample, of 62 bits; sample i has this one plus i."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest(), "little") >> 2


def digest_of(llm: LLM) -> str:
    """What a model is, in 16 hex digits: its files' contents, its adapter's, and what its Modelfile makes of them.

    Reads all of its weights once. Raises ValueError for a model that is in no file.
    """
    path, digest = Path(llm.model.path), hashlib.sha256()
    files = [path] if path.is_file() else sorted({found for pattern in WEIGHTS for found in path.glob(pattern)})
    if not files:
        raise ValueError(f"{path}: no weights here to tell the model by; save it first, and sample from its folder")
    for file in files:
        digest.update(f"{'' if path.is_file() else file.name} {file_digest(file).hexdigest()}\n".encode())
    if made := replace(llm.model.made, adapter=None):  # which is a path, where others may come to lie
        digest.update(repr(made).encode())
    if llm.adapter is not None:
        digest.update(f"adapter {llm.adapter.digest}\n".encode())
        texts = [llm.model.adapter / name for name in TEXTS] if llm.model.adapter is not None else []  # how chats are written and end
        for file in filter(Path.exists, texts):
            digest.update(f"{file.name} {file_digest(file).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def digest_of_weights(model: Model) -> str:
    """The same of a model that exists in memory only, such as a run's checkpoint with an adapter merged into it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.network.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
