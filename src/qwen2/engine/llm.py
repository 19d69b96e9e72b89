"""The public face: a model that chats, completes, scores and embeds.

Every method is a translation into requests of the one engine; the non-streaming answer is the stream, folded. Text given to
`generate` and `stream` is plain text: control tokens in it stay text. Who needs them passes ids (`llm.tokenizer.encode_trusted`).

    llm = LLM("qwen2.5-coder:0.5b")                              # a name, a folder or a file
    llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(temperature=0)).text
"""

# N tokens of a text, D hidden, V rows of the output head

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch

from qwen2 import kernels
from qwen2.engine import calls
from qwen2.engine.asked import Asked
from qwen2.engine.calls import ToolChoice
from qwen2.engine.engine import Engine
from qwen2.engine.logprobs import TextLogprobs, not_finite
from qwen2.engine.progress import Progress
from qwen2.engine.request import Chunk, Continuation, Output, Request, SamplingParams, shown
from qwen2.engine.speculative import MOST
from qwen2.model.adapted import AdaptedRows
from qwen2.tokenizer import PlainCalls
from qwen2.weights.model import Model, load

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.model.adapted import ServedAdapter
    from qwen2.tokenizer.template import Rendered

Conversation = Sequence[Mapping[str, Any]]  # messages as OpenAI shapes them: role, content, tool_calls, tool_call_id, name
Tools = Sequence[Mapping[str, Any]]  # functions as OpenAI shapes them
Prompt = str | Sequence[int]
AUTO = ToolChoice()


class LLM:
    """A loaded model and its engine. `context` narrows the window, which is the model's own by default.

    `isa` is the kernels' instruction set, the best one where it is None; models of different sets live side by side. `threads` are the
    process's: the number asked for last. Where a model cannot be loaded, others go on as before.
    `cache_bytes` bounds the keys and values of all texts together, `keep_bytes` those of texts that have ended (engine.py); left out,
    half of what the machine has free beside the weights bounds them (`free_bytes` says otherwise), one window is always allowed, and
    `llm.engine.cache_limit_bytes` tells. What a text is does not depend on it. `home` is the folder of the store in which a name is
    looked for.
    `draft` is a smaller model of the same tokens that guesses what comes, so that no text changes and most come sooner (draft.py).
    `adapter` is the folder of a LoRA adapter as PEFT writes it, which the weights stay free of; where it says how chats are written and
    what ends them, that counts (docs/adapters.md).
    """

    def __init__(
        self,
        model: str | Path | Model,
        device: str = "cpu",
        dtype: str = "auto",
        threads: int | None = None,
        context: int | None = None,
        max_batch: int = 16,
        cache_bits: int = 16,
        isa: str | None = None,
        cache_bytes: int | None = None,
        keep_bytes: int | None = None,
        guesses: int = MOST,
        home: Path | None = None,
        draft: str | Path | Model | None = None,
        free_bytes: int | None = None,
        adapter: str | Path | None = None,
    ) -> None:
        if isa is not None and device.partition(":")[0] != "cpu":
            raise ValueError(f"isa {isa!r} with device {device!r}: only a CPU has kernels; leave one of them out")
        for name, value in (("threads", 1 if threads is None else threads), ("context", 1 if context is None else context)):
            _at_least_one(name, value)
        _at_least_one("max_batch", max_batch)
        loaded = partial(load, dtype=dtype, device=device, home=home, packed=True)
        with kernels.kept_on_failure():
            if threads is not None:
                kernels.set_threads(threads)
            if isinstance(model, Model):
                _check_isa(isa, model)
            else:
                kernels.select_isa(isa)
            self.model = model if isinstance(model, Model) else loaded(model)
            self.draft = draft if draft is None or isinstance(draft, Model) else loaded(draft)
            if self.draft is not None and self.draft.adapter is not None:
                raise ValueError(f"draft {self.draft.name} has an adapter: take the model that it was made from")
            own = self.model.config.window
            if context is not None and context > own:
                raise ValueError(f"context {context:,}: the model's window is {own:,}; leave context out or take at most that")
            self.window = own if context is None else context
            self.engine = Engine(
                self.model,
                self.window,
                max_batch,
                cache_bits=cache_bits,
                cache_bytes=cache_bytes,
                keep_bytes=keep_bytes,
                guesses=guesses,
                draft=self.draft,
                free_bytes=free_bytes,
            )
            self.model, self.adapter = self._with_adapter(self.model, adapter)
        if threads is not None:
            torch.set_num_threads(threads)
        self.tokenizer, self.template, self.generation = self.model.tokenizer, self.model.template, self.model.generation
        self.asker = 0  # which of the models on this engine it is

    def beside(self, model: Model | None = None, adapter: str | Path | None = None) -> LLM:
        """Another model of the same weights on the same engine: one batch, one cache, settings and an adapter of its own.

        `model` is what `Model.made_as` gave, or left out, this one's without its adapter. Raises ValueError for one of other weights.
        """
        model = self.model.with_adapter(None) if model is None else model
        if model.network is not self.model.network:
            raise ValueError(f"{model.name} has weights of its own: only a model of the same ones can be beside {self.model.name}")
        other = copy(self)
        other.model, other.adapter = self._with_adapter(model, adapter)
        other.tokenizer, other.template, other.generation = other.model.tokenizer, other.model.template, other.model.generation
        other.asker = next(self.engine.askers)
        return other

    def _with_adapter(self, model: Model, folder: str | Path | None) -> tuple[Model, ServedAdapter | None]:
        """The model with this adapter, or else its own, and with what its folder says of chats (weights/adapter_texts.py)."""
        if folder is not None and model.adapter is not None:
            raise ValueError(f"adapter {folder}: {model.name} has one already, {model.adapter}: take the model that it was made from")
        folder = model.adapter if folder is None else Path(folder).expanduser()
        return (model, None) if folder is None else (model.with_adapter(folder), self.engine.adapters.load(folder))

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(self.generation.eos) | frozenset(self.model.config.eos)

    # --- text

    def chat(
        self, messages: Conversation, params: SamplingParams | None = None, tools: Tools | None = None, tool_choice: ToolChoice = AUTO
    ) -> Output:
        """The answer to a conversation. With `tools`, calls in it are in `Output.tool_calls`, the rest in `Output.content`.

        Calls of a tool whose function is `strict` have arguments of its schema; `tool_choice` may force calls (calls.py).
        """
        if not _is_conversation(messages):
            raise ValueError(f"messages {shown(messages)}: must be a list of messages; for a text or ids use generate or stream")
        return _fold(self.stream(messages, params, tools, tool_choice))

    def stream(
        self,
        prompt: Conversation | Prompt,
        params: SamplingParams | None = None,
        tools: Tools | None = None,
        tool_choice: ToolChoice = AUTO,
    ) -> Iterator[Chunk]:
        """The answer to a conversation, or what goes on from a text or from ids, piece by piece; the last piece has the output.

        With `tools` the pieces also come parsed, in `Chunk.deltas`. Bad input raises here, not at the first piece. Closing the
        iterator stops the answer and frees its memory.
        """
        return self._stream(self.ask(prompt, params, tools, tool_choice))

    def ask(
        self,
        prompt: Conversation | Prompt,
        params: SamplingParams | None = None,
        tools: Tools | None = None,
        tool_choice: ToolChoice = AUTO,
        in_pieces: bool = False,
        go_on: bool = False,
    ) -> Asked:
        """The same, not yet begun: a request for the engine, and how its chunks are to be read. Raises ValueError for bad input.

        `in_pieces`: the deltas of calls that are forced or strict have their arguments as they are written (parse.py),
        and forced ones no content beside them. `go_on`: where
        the last message is the assistant's it is the beginning of the answer, which goes on from it.
        """
        if not _is_conversation(prompt):
            if tools or tool_choice.forced:
                raise ValueError("tools need a conversation: pass messages instead of a text or ids")
            return Asked(self._request(self._ids(cast("Prompt", prompt)), params))
        goes_on = len(prompt) > 0 and prompt[-1].get("role") == "tool"
        is_begun = go_on and len(prompt) > 0 and prompt[-1].get("role") == "assistant"
        most = self.window
        ids = self.render_open(prompt, tools, most).ids if is_begun else self.render(prompt, tools, most=most).ids
        params = _checked(params)
        choice = tool_choice if params.constraint is None else replace(tool_choice, parallel=True)  # a form has no second call
        held = calls.constraint(tools, choice, self.template.calls, goes_on)
        if not tools:
            return Asked(self._request(ids, params))
        if held is not None and params.constraint is not None:
            raise ValueError("an answer cannot be held to a form and to calls: leave the form out, or strict and tool_choice")
        is_free = params.constraint is None and not choice.forced and not is_begun
        stop = self.generation.stop if params.stop is None else params.stop
        params = replace(params, stop=(*stop, *self.template.stop), constraint=held or params.constraint)
        request = self._request(ids, params)
        functions = {tool["function"]["name"]: tool["function"] for tool in tools}
        fits = None if held is None or request.form is None else calls.fits(functions, request.form, cast("str", self.template.calls))
        parsers = [
            self.template.parser(
                in_pieces and held is not None, PlainCalls(list(functions), not choice.parallel, fits) if is_free else None
            )
            for _ in range(request.params.n)
        ]
        return Asked(request, parsers, only_calls=in_pieces and choice.forced)

    def render(
        self, messages: Conversation, tools: Tools | None = None, add_generation_prompt: bool = True, most: int | None = None
    ) -> Rendered:
        """A conversation as the model reads it, with what the model itself has before it (its Modelfile's SYSTEM and MESSAGEs).

        `most` is how many tokens it may have: what is certain to have more is a ValueError before it is encoded.
        """
        return self.template.render(self.model.made.conversation(messages), tools, add_generation_prompt, most)

    def render_open(self, messages: Conversation, tools: Tools | None = None, most: int | None = None) -> Rendered:
        """The same with the last message, an assistant's, left open, so that the model goes on with it."""
        return self.template.render_open(self.model.made.conversation(messages), tools, most)

    def _stream(self, asked: Asked) -> Iterator[Chunk]:
        for _, chunk in self.engine.run([asked.request]):
            yield asked.read(chunk)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, progress: bool | None = None
    ) -> list[Output]:
        """What goes on from each prompt (text or ids), in their order. A progress bar shows on a terminal when it takes long."""
        listed = self._listed(prompts)
        requests = [self._request(self._ids(prompt), params) for prompt in listed]
        last: dict[int, list[Chunk]] = {request.id: [] for request in requests}
        with Progress(len(requests), progress) as bar:
            for request, chunk in self.engine.run(requests):
                if chunk.output is not None:
                    last[request.id].append(chunk)
                bar.advance(len(chunk.token_ids), chunk.output is not None and len(last[request.id]) == request.params.n)
        return [_fold(last[request.id]) for request in requests]

    def abort(self) -> None:
        """End everything that runs, from any thread; answers so far come back with finish_reason "abort". Not what is beside it."""
        self.engine.abort_all(self.asker)

    # --- numbers

    def score(self, texts: Prompt | Sequence[Prompt]) -> list[list[float | None]]:
        """Natural log-probability of every token of every text given those before it; the first has none.

        `llm.tokenizer.encode(text)` names the tokens; models that begin every text with a token of their own have one more.
        """
        listed = [self._ids(prompt) for prompt in self._listed(texts)]
        readers = [self.engine.text_logprobs(ids, adapter=self.adapter) for ids in listed]
        self._read(listed, readers)
        return [[None, *(each.logprob for each in reader.found)] for reader in readers]

    def continuations(self, pairs: Iterable[tuple[Prompt, Prompt]]) -> list[Continuation]:
        """How likely each second part is behind its first; beginnings that pairs have in common are read once.

        Two texts are encoded together and parted where the first one ends, so that nothing is encoded otherwise than in a text;
        white space at its end goes to the second part, whose tokens begin with it.
        """
        requests, readers = list[Request](), list[TextLogprobs]()
        for pair in pairs:
            ids, count = self._parted(*pair)
            self.engine.check_ids("continuation", ids[count:])
            readers.append(self.engine.text_logprobs(ids, first=count - 1, adapter=self.adapter))
            requests.append(self._reading(ids[:-1], readers[-1], count - 1))  # nothing is to follow the last one
        self._run(requests)
        return [Continuation(tuple(reader.found)) for reader in readers]

    def _parted(self, prompt: Prompt, continuation: Prompt) -> tuple[list[int], int]:
        """The ids of both, and how many are the prompt's."""
        if len(continuation) == 0:
            raise ValueError("continuation is empty: there is nothing to be likely")
        if isinstance(prompt, str) and isinstance(continuation, str):
            whole = list(self._ids(prompt + continuation))
            count = min(len(self._ids(prompt.rstrip())), len(whole) - 1)
            if count < 1:
                raise ValueError(f"{shown(prompt + continuation)} is one token: give prompt and continuation as ids, or more of a prompt")
            return whole, count
        first = self._ids(prompt)
        return [*first, *(self.tokenizer.encode(continuation) if isinstance(continuation, str) else continuation)], len(first)

    def embed(self, texts: Prompt | Sequence[Prompt]) -> Tensor:
        """(n, D) float32: the mean of the final hidden states over a text's tokens, of length 1."""
        requests, vectors = self.embedding_requests(self._listed(texts))
        self._run(requests)
        return vectors()

    def embedding_requests(self, texts: Sequence[Prompt]) -> tuple[list[Request], Callable[[], Tensor]]:
        """Requests that read the texts, and what gives the vectors (n, D) when all have ended."""
        listed = [self._ids(text) for text in texts]
        sums = torch.zeros(len(listed), self.model.config.hidden)

        def add(total: Tensor, hidden: Tensor) -> None:  # (D,), (n, D)
            for row in hidden.float().cpu():  # in one order, into however many chunks a text is cut
                total += row

        def vectors() -> Tensor:
            means = _finite(sums, "hidden states", self.model.network.dtype)
            return torch.nn.functional.normalize(means, dim=-1)  # the mean and the sum have one direction

        return [self._reading(ids, partial(add, total)) for ids, total in zip(listed, sums, strict=True)], vectors

    def logits(self, prompt: Prompt) -> Tensor:
        """(T, V) float32: what the model says after every token, with the vocabulary's padding rows, for those who look inside."""
        ids = self._ids(prompt)
        logits = torch.empty(len(ids), self.model.config.vocab)
        filled = 0

        def read(hidden: Tensor) -> None:
            nonlocal filled
            logits[filled : filled + len(hidden)] = self.model.network.logits(hidden, AdaptedRows.of_head([(self.adapter, len(hidden))]))
            filled += len(hidden)

        self._read([ids], [read])
        return logits

    def _read(self, listed: Sequence[Sequence[int]], readers: Sequence[Callable[[Tensor], None]]) -> None:
        self._run([self._reading(ids, reader) for ids, reader in zip(listed, readers, strict=True)])

    def _reading(self, ids: Sequence[int], reader: Callable[[Tensor], None], read_from: int = 0) -> Request:
        return self.engine.reading(ids, reader, read_from, self.asker, self.adapter)

    def _run(self, requests: Sequence[Request]) -> None:
        for request, chunk in self.engine.run(requests):
            if chunk.finish_reason == "abort":
                raise RuntimeError(f"reading {len(request.prompt):,} tokens was aborted, by abort() or in another thread; ask again")

    # --- prompts

    def _request(self, ids: Sequence[int], params: SamplingParams | None) -> Request:
        return self.engine.request(ids, _checked(params), self.generation, self.asker, self.adapter, self.ends)

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        """Ids of a text, with the token that this model begins every text with, if it has one; ids as they are."""
        if not isinstance(prompt, str):
            return prompt
        if not prompt:
            raise ValueError("prompt is empty: a model needs at least one token to go on from")
        self.tokenizer.check_fits([prompt], self.window)
        ids = self.tokenizer.encode(prompt)
        return [cast("int", self.tokenizer.bos), *ids] if self.begins_texts else ids

    @property
    def begins_texts(self) -> bool:
        """Whether this model begins every text with a token of its own."""
        return self.tokenizer.add_bos and self.tokenizer.bos is not None

    def _listed(self, prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
        """One prompt as a list of one."""
        return [prompts] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)) else prompts  # type: ignore[list-item, return-value]


def _is_conversation(prompt: Conversation | Prompt) -> TypeGuard[Conversation]:
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and (len(prompt) == 0 or isinstance(prompt[0], Mapping))


def _fold(chunks: Iterable[Chunk]) -> Output:
    """A stream as one output: what its last pieces carry, sample 0 first."""
    outputs = sorted(((chunk.index, chunk.output) for chunk in chunks if chunk.output is not None), key=lambda pair: pair[0])
    assert outputs, "every stream ends with an output"
    return replace(outputs[0][1], others=tuple(output for _, output in outputs[1:]))


def _checked(params: object) -> SamplingParams:
    """The parameters, or the model's own where there are none."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params is a {type(params).__name__}: pass SamplingParams(...), or SamplingParams.from_dict of a dict")
    return params


def _finite(values: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    if not bool(values.isfinite().all()):
        raise FloatingPointError(f"the model's {what} are not finite: {not_finite(dtype)}")
    return values


def _check_isa(asked: str | None, model: Model) -> None:
    """ValueError where a loaded model's weights are laid out for another set than the one that is asked for."""
    own = kernels.isa_of(model.network.lanes)
    if asked is not None and asked != (own or "none"):
        is_for = "computed with in torch" if own is None else f"packed for {own}"
        raise ValueError(f"isa {asked!r}: {model.name} is {is_for} already; leave isa out, or give the model's name or path instead")


def _at_least_one(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} {value!r}: must be a whole number of at least 1")
