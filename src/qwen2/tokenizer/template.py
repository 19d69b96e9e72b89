"""How a conversation becomes ids for one model, and model text a message again. Training, serving and evaluation all render here.

Three styles: Qwen2's and Qwen2.5's own formats, written by us (`styles.py`), and any other checkpoint's Jinja in a sandbox. A
checkpoint whose Jinja text is one of the two is rendered by ours, which gives the same text and ids.

What users, documents and tools say never becomes a control token, in any style. So where a message contains `<|im_end|>` the ids
differ from the reference's, and they are meant to.

Two more differences are meant. Where an answer begins, text is cut (see `_encode`). And arguments of a call that are given as JSON
text stay in the built-in styles as they are, for they are what the model sampled: rendered again they are the same tokens, also
with two spaces or `\\u00f6`. A checkpoint's Jinja gets an object and writes it in its own way, as the reference does.

    template = ChatTemplate.of(tokenizer)
    ids = template.render([{"role": "user", "content": "Hello"}]).ids
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from qwen2.tokenizer import styles
from qwen2.tokenizer.jinja import Conversation
from qwen2.tokenizer.messages import Message, Turn, read_messages, read_tools
from qwen2.tokenizer.parse import DIALECTS, HERMES, QWEN2, Dialect, StreamParser, fold
from qwen2.tokenizer.plain import PlainCalls
from qwen2.tokenizer.sandbox import JinjaSandbox, Limits
from qwen2.tokenizer.styles import CHAT_CONTROL, QWEN2_5_SYSTEM, QWEN2_JINJA, QWEN2_SYSTEM, Span
from qwen2.tokenizer.tokenizer import Tokenizer

Style = Literal["qwen2", "qwen2.5", "jinja"]

# sha256 of the template of Qwen2.5-Instruct with SYSTEM for its default system prompt
QWEN2_5_JINJA_SHA256 = "b2a0cf3d24cbbc355a3ab059d86f665f761a891d707d249a61dab172d880e28f"


class Rendered:
    """A conversation as ids. `text` is the same as characters; `mask` is True exactly on the tokens that an assistant sampled."""

    def __init__(self, ids: list[int], text: str, mask: list[bool] | Callable[[], list[bool]]) -> None:
        self.ids = ids
        self.text = text
        self._mask = mask

    @property
    def mask(self) -> list[bool]:
        """Content, calls and the end of the turn. With a Jinja template it costs two renderings a turn, on the first use, and is a
        ValueError if the template writes the past differently as the conversation grows."""
        if callable(self._mask):
            self._mask = self._mask()
        return self._mask


class ChatTemplate:
    """The chat format of one model."""

    def __init__(self, tokenizer: Tokenizer, style: Style, default_system: str | None = None, source: str | None = None) -> None:
        if style not in get_args(Style):
            raise ValueError(f"unknown chat style {style!r}; styles are {', '.join(get_args(Style))}")
        if style == "jinja" and source is None:
            raise ValueError("the style 'jinja' needs a chat template, and this model has none; use 'qwen2' or 'qwen2.5'")
        self.tokenizer = tokenizer
        self.style = style
        self.source = source
        defaults = {"qwen2": QWEN2_SYSTEM, "qwen2.5": QWEN2_5_SYSTEM, "jinja": None}
        self.default_system = defaults[style] if default_system is None else default_system
        self._dialect = _dialect(style, source)
        self.stop = self._dialect.stops if self._dialect else ()  # stop strings, for requests with tools
        self._sandbox = JinjaSandbox()

    @classmethod
    def of(cls, tokenizer: Tokenizer, style: Style | None = None, limits: Limits | None = None, source: str | None = None) -> ChatTemplate:
        """The format that the checkpoint's own template describes; Qwen2's if it has none. `style` or another `source` overrides."""
        source = tokenizer.chat_template if source is None else source
        known, system = _recognise(source) if source is not None else ("qwen2", QWEN2_SYSTEM)
        if style is not None and style != known:
            known, system = style, None
        template = cls(tokenizer, known, system, source)
        if limits is not None:
            template._sandbox = JinjaSandbox(limits)
        return template

    @property
    def jinja(self) -> str | None:
        """The format as Jinja text, for a checkpoint or to be read: the model's own, else Qwen2's; None if neither says it."""
        if self.source is None and self.style == "qwen2":
            return QWEN2_JINJA.replace("SYSTEM", self.default_system or "")
        return self.source

    # --- conversation to ids

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        most: int | None = None,
    ) -> Rendered:
        """Ids of a conversation, with the opening of the assistant's next turn if `add_generation_prompt`.

        `most`: what cannot have so few tokens is a ValueError before anything is encoded.
        """
        turns, functions = read_messages(messages), read_tools(tools)
        if self.style == "jinja":
            return self._render_jinja(turns, functions, add_generation_prompt, most)
        missing = [token for token in CHAT_CONTROL if token not in self.tokenizer.control]
        if missing:
            raise ValueError(f"the chat style {self.style!r} needs the control token {missing[0]!r}, which this vocabulary lacks")
        write = styles.qwen2 if self.style == "qwen2" else styles.qwen2_5
        spans = write(turns, functions, self.default_system or "", add_generation_prompt)
        if most is not None:
            self.tokenizer.check_fits((span.text for span in spans if not span.ours), most)
        ids, mask = _encode(self.tokenizer, spans)
        return Rendered(ids, "".join(span.text for span in spans), mask)

    def render_open(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, most: int | None = None
    ) -> Rendered:
        """Ids of a conversation whose last message, an assistant's, is the beginning of an answer: its turn is not ended."""
        turns = read_messages(messages)
        if turns[-1].role != "assistant" or turns[-1].calls:
            raise ValueError("only a last message of the assistant's, without calls, can be gone on from")
        whole = self.render(messages, tools, add_generation_prompt=False, most=most)
        ids, mask = list(whole.ids), list(whole.mask)
        while mask and not mask[-1]:  # what stands between turns
            mask.pop()
            ids.pop()
        if ids and ids[-1] in self.tokenizer.control.values():
            mask.pop()
            ids.pop()
        return Rendered(ids, self.tokenizer.decode(ids), mask)

    def _render_jinja(self, turns: list[Turn], functions: list[dict[str, Any]], prompt: bool, most: int | None) -> Rendered:
        assert self.source is not None
        if functions and not self.takes_tools:
            raise ValueError("this model's chat template has no place for tools")
        messages = [_as_reference(turn) for turn in turns]
        conversation = Conversation.of(self.tokenizer, self._sandbox, self.source, messages, functions)
        whole, pieces = conversation.pieces(prompt)
        if most is not None:
            self.tokenizer.check_fits((text for text, id in pieces if id is None), most)
        ids: list[int] = []
        for text, id in pieces:
            ids += self.tokenizer.encode(text) if id is None else [id]
        return Rendered(ids, conversation.shown(whole), lambda: conversation.mask(whole, pieces))

    @property
    def takes_tools(self) -> bool:
        """Whether there is a place for tools in it."""
        return self.style != "jinja" or re.search(r"\btools\b", self.source or "") is not None

    # --- model text to message

    @property
    def calls(self) -> str | None:
        """How this model writes calls, one of `parse.DIALECTS`; None if its template does not say."""
        return next((name for name, dialect in DIALECTS.items() if dialect is self._dialect), None)

    def parser(self, in_pieces: bool = False, plain: PlainCalls | None = None) -> StreamParser:
        """For the text of one answer to a request with tools; see `parse.py` for how to feed it, and for when pieces are allowed.

        `plain`: calls that may also be plain JSON.
        """
        return StreamParser(self._dialect, in_pieces, plain)

    def parse(self, text: str) -> Message:
        """A whole answer: content and tool calls."""
        parser = self.parser()
        return fold([*parser.push(text), *parser.flush()])


def _recognise(source: str) -> tuple[Style, str | None]:
    """The built-in style that a Jinja text describes, with its default system prompt."""
    one_line = source.strip().replace("\r\n", "\n").replace("\n", "\\n")  # in Qwen2's file the breaks are inside the literals
    pattern = re.escape(QWEN2_JINJA).replace("SYSTEM", r"([^'\\{}]*)")
    found = re.fullmatch(pattern, one_line)
    if found:
        return "qwen2", found[1]
    found = re.search(r"'<\|im_start\|>system\\n([^'\\{}]+)<\|im_end\|>\\n'", source)
    if found and hashlib.sha256(source.strip().replace(found[1], "SYSTEM").encode()).hexdigest() == QWEN2_5_JINJA_SHA256:
        return "qwen2.5", found[1]
    return "jinja", None


def _dialect(style: Style, source: str | None) -> Dialect | None:
    if style != "jinja":
        return QWEN2 if style == "qwen2" else HERMES
    if source is not None and HERMES.open in source:
        return HERMES
    return QWEN2 if source is not None and "✿FUNCTION✿" in source else None


def _encode(tokenizer: Tokenizer, spans: Iterable[Span]) -> tuple[list[int], list[bool]]:
    """Ids and mask. Neighbouring text is encoded together, as in the reference, except across the border of what is sampled.

    There the reference may differ: an answer that begins with a line break merges with the header's into one token, which a
    model that is prompted with the header can never sample. Cut at the border, training and serving see the same ids.
    """
    ids: list[int] = []
    mask: list[bool] = []
    text, sampled = "", False

    def add(new: list[int], flag: bool) -> None:
        ids.extend(new)
        mask.extend([flag] * len(new))

    for span in spans:
        for piece in tokenizer.split_control(span.text) if span.ours else [span.text]:
            is_control = span.ours and piece in tokenizer.control
            if is_control or span.sampled != sampled:
                add(tokenizer.encode(text), sampled)
                text, sampled = "", span.sampled
            if is_control:
                add([tokenizer.control[piece]], span.sampled)
            else:
                text += piece
    add(tokenizer.encode(text), sampled)
    return ids, mask


def _as_reference(turn: Turn) -> dict[str, Any]:
    """A turn as templates expect it: arguments as an object."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}} | ({"id": id} if id else {})
            for call, id in zip(turn.calls, turn.call_ids, strict=True)
        ]
    optional = {"name": turn.name, "tool_call_id": turn.tool_call_id}
    return message | {key: value for key, value in optional.items() if value is not None}
