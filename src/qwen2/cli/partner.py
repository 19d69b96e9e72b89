"""Whom a conversation is held with: a model of this process, or one of a server (remote.py). Both are told alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from qwen2.engine.about import About, about, peak_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qwen2.engine.llm import LLM
    from qwen2.engine.request import Chunk, SamplingParams

    Messages = Sequence[Mapping[str, str]]


class Partner(Protocol):
    """A model that answers. `load_seconds` is what loading it took."""

    about: About
    load_seconds: float

    def stream(self, messages: Messages, params: SamplingParams) -> Iterator[Chunk]:
        """The answer, piece by piece; the last has the output. Bad input raises here."""
        ...

    def abort(self) -> None:
        """End the answer that is being written; its last piece still comes. From any thread."""
        ...

    def count(self, messages: Messages) -> int:
        """Tokens of a conversation."""
        ...

    def memory(self) -> str:
        """What it took, for people."""
        ...

    def notes(self) -> list[str]:
        """Further lines for --verbose."""
        ...


class Local:
    """A model of this process."""

    def __init__(self, llm: LLM, load_seconds: float = 0.0) -> None:
        self.llm, self.about, self.load_seconds = llm, about(llm), load_seconds

    def stream(self, messages: Messages, params: SamplingParams) -> Iterator[Chunk]:
        """As the engine gives it."""
        return self.llm.stream(messages, params)

    def abort(self) -> None:
        """Ends everything that this process asked for."""
        self.llm.abort()

    def count(self, messages: Messages) -> int:
        """As it is read."""
        return len(self.llm.render(messages, add_generation_prompt=False).ids)

    def memory(self) -> str:
        """Of this process."""
        return peak_memory(self.llm.model.device.type)

    def notes(self) -> list[str]:
        """How often the smaller model was right."""
        engine, draft = self.llm.engine, self.llm.draft
        return [] if draft is None else [f"draft     {draft.name}: {engine.drafted_right:,} of {engine.drafted:,} guesses were right"]


class Completing(Local):
    """A model of this process that goes on with the last message as a text, without a chat template: what base models learned."""

    def stream(self, messages: Messages, params: SamplingParams) -> Iterator[Chunk]:
        """How the text goes on."""
        return self.llm.stream(messages[-1]["content"], params)
