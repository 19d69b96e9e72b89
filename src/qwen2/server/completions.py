"""OpenAI's completions: what goes on from texts and ids, and with `echo` what a model thinks of them, as evaluation harnesses ask.

`echo` with `logprobs` and `max_tokens` 0 or 1 gives the log-probability of every token of the prompt, null for the first;
`prompt_logprobs`, vLLM's field, gives the same by token id and with ranks.
"""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from qwen2.server.answering import Answering
from qwen2.server.errors import ApiError
from qwen2.server.ollama import fill_in
from qwen2.server.openai import Json, first_come, listed, prompt_logprobs, respond, server_of, timings_of, usage_of
from qwen2.server.openai_schema import Completion

if TYPE_CHECKING:
    from qwen2.engine.asked import Asked
    from qwen2.engine.llm import LLM
    from qwen2.engine.request import Output, TokenLogprob

router = APIRouter()
OPENAIS_MOST = 16  # tokens, where a request does not say


@router.post("/v1/completions")
async def completions(body: Completion, request: Request) -> Response:
    """What goes on from one or several prompts."""
    server = server_of(request)
    server.check(body)
    prompts = listed(body.prompt)
    if not prompts or len(prompts) > server.settings.limits.inputs:
        raise ApiError(400, f"prompt has {len(prompts)} texts: 1 to {server.settings.limits.inputs} at once", field="prompt")
    if body.suffix and (body.echo or body.prompt_logprobs is not None):
        raise ApiError(400, "suffix goes without echo and prompt_logprobs", field="suffix")
    most = OPENAIS_MOST if body.max_tokens is None else body.max_tokens
    echoed = (body.logprobs, 0 if most == 0 else None) if body.echo else ()
    wanted = [top for top in (body.prompt_logprobs, *echoed) if top is not None]

    def ask(llm: LLM) -> list[Asked]:
        params = body.params(most, body.logprobs, body.form(), max(wanted, default=None))
        wholes = [fill_in(llm, prompt, body.suffix) for prompt in prompts] if body.suffix else prompts
        return first_come([llm.ask(whole, params) for whole in wholes], body.priority)

    answering = await server.answer(request, body.model, ask, answers=len(prompts) * body.samples)
    return await respond(request, body, answering, CompletionWriter(answering, body, prompts))


class CompletionWriter:
    """Answers as OpenAI's text objects; sample i of prompt p has the index p * n + i."""

    def __init__(self, answering: Answering, body: Completion, prompts: Sequence[Any]) -> None:
        self.answering, self.llm, self.body, self.prompts = answering, answering.llm, body, prompts
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self.places: dict[int, Places] = {}

    def head(self) -> Json:
        """What every object begins with."""
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.answering.name}

    async def stream(self, include_usage: bool) -> AsyncIterator[Json]:
        """Chunks as they come."""
        outputs: dict[int, Output] = {}
        begun: set[int] = set()
        async for prompt, chunk in self.answering:
            request = self.answering.asked[prompt].request
            index, text = prompt * request.params.n + chunk.index, chunk.text
            logprobs: list[TokenLogprob | None] = [*chunk.logprobs]
            if self.body.echo and index not in begun:
                text, logprobs = self._text(prompt) + text, [*self._echoed(request.prompt_logprobs()), *logprobs]
            begun.add(index)
            if chunk.output is not None:
                outputs[index] = chunk.output
            reason = None if chunk.output is None else chunk.output.finish_reason
            if text or reason or logprobs:
                told = self._logprobs(logprobs, prompt, index) if logprobs else None
                choice = {"index": index, "text": text, "logprobs": told, "finish_reason": reason}
                yield self.head() | {"choices": [choice]} | ({"usage": None} if include_usage else {})
        if include_usage:
            ordered = [outputs[index] for index in sorted(outputs)]
            yield self.head() | {"choices": [], "usage": usage_of(ordered, len(self.prompts)), "timings": timings_of(ordered)}

    def whole(self, groups: Sequence[Sequence[Output]]) -> Json:
        """The answers in one."""
        outputs = [output for group in groups for output in group]
        choices: list[Json] = []
        for prompt, group in enumerate(groups):
            for output in group:
                choices.append(self._choice(prompt, len(choices), output))
        return self.head() | {"choices": choices, "usage": usage_of(outputs, len(groups)), "timings": timings_of(outputs)}

    def _choice(self, prompt: int, index: int, output: Output) -> Json:
        text = self._text(prompt) + output.text if self.body.echo else output.text
        before = self._echoed(output.prompt_logprobs) if self.body.echo else ()
        told = None if output.logprobs is None else self._logprobs([*before, *output.logprobs], prompt, index)
        choice = {"index": index, "text": text, "logprobs": told, "finish_reason": output.finish_reason}
        if self.body.prompt_logprobs is None:
            return choice
        return choice | {"prompt_logprobs": prompt_logprobs(self.llm, output.prompt_logprobs, self.body.prompt_logprobs)}

    def _text(self, prompt: int) -> str:
        text = self.prompts[prompt]
        return text if isinstance(text, str) else self.llm.tokenizer.decode(text)

    def _echoed(self, found: Sequence[TokenLogprob | None] | None) -> Sequence[TokenLogprob | None]:
        return () if found is None or self.body.logprobs is None else found

    def _logprobs(self, logprobs: Sequence[TokenLogprob | None], prompt: int, index: int) -> Json:
        """As OpenAI has them; the token itself is among its likeliest, whether it is or not."""
        top, first = self.body.logprobs, self.answering.asked[prompt].request.prompt[0]
        places = self.places.setdefault(index, Places())
        tokens, offsets, likeliest = [], [], list[Json | None]()
        for each in logprobs:
            data = self.llm.tokenizer.token_bytes(first if each is None else each.token_id)
            tokens.append(data.decode("utf-8", errors="replace"))
            begins_text = each is None and isinstance(self.prompts[prompt], str) and self.llm.begins_texts
            offsets.append(places.next(b"" if begins_text else data))
            likeliest.append(None if each is None else self._likeliest(each, top or 0))
        values = [None if each is None else each.logprob for each in logprobs]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": likeliest, "text_offset": offsets}

    def _likeliest(self, each: TokenLogprob, top: int) -> Json:
        found: Json = {}
        for token, value in (*each.top[:top], (each.token_id, each.logprob)):  # parts of characters may look alike: the likelier stays
            found.setdefault(self.llm.tokenizer.token_bytes(token).decode("utf-8", errors="replace"), value)
        return found


class Places:
    """Where each token begins in a text, in characters; one that goes on with a character begins behind it."""

    def __init__(self) -> None:
        self._decoder, self._place = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def next(self, data: bytes) -> int:
        """Of the next token, whose bytes these are."""
        place = self._place
        self._place += len(self._decoder.decode(data))
        return place
