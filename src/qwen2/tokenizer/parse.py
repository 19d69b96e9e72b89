"""Model text back to content and tool calls, piece by piece or at once.

Feed it the text of a `Tokenizer.decoder()` that keeps control tokens, without the ids that end a text: in Qwen2.5 the brackets
`<tool_call>` are control tokens, and a decoder that skips them hides the calls. Use it where tools were offered; elsewhere model
text is content as it stands.

Content streams at once; only what could still become a marker waits. A call is given when it is complete. What looks like a call
and is none (not JSON, no name, cut off) comes back as content, word for word, with the reason; nothing here raises. Where a grammar
makes the form certain a call may also be given in pieces (`in_pieces`); one that is cut off then stays what it began as.
Calls that a model writes as plain JSON, without these brackets, are told apart first (`plain.py`).
The whole text parsed at once is the stream, folded, so both are equal wherever the stream is cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from reprlib import repr as shown

from qwen2.tokenizer.messages import NAME, Message, ToolCall, check_object, members
from qwen2.tokenizer.pieces import CallSoFar
from qwen2.tokenizer.plain import PlainCalls


@dataclass(frozen=True)
class Delta:
    """One step of a stream: more content, or a call, or content that failed to be a call (then `problem` says why).

    In pieces: the name of a call that `begins`, more of its `arguments`, and the whole that `ends`.
    """

    content: str = ""
    call: ToolCall | None = None
    problem: str | None = None
    begins: str | None = None
    arguments: str = ""
    ends: ToolCall | None = None


@dataclass(frozen=True)
class Dialect:
    """How a model writes calls."""

    open: str
    close: str | None  # None: the next `open`, a stop or the end closes a call
    stops: tuple[str, ...]  # what follows one is not the model's to write, and is dropped
    lead: tuple[str, ...]  # removed once from the very beginning, the longest that fits
    read: Callable[[str], ToolCall]  # what stands between open and close; ValueError with the reason
    write: tuple[str, str, str]  # between open and close: before the name, between name and arguments, after them


def fold(deltas: Iterable[Delta]) -> Message:
    """A whole stream as one message."""
    deltas = list(deltas)
    return Message(
        content="".join(delta.content for delta in deltas),
        tool_calls=[call for delta in deltas if (call := delta.call or delta.ends) is not None],
        problems=[delta.problem for delta in deltas if delta.problem is not None],
    )


# --- what stands inside a call


def read_hermes(body: str) -> ToolCall:
    """Qwen2.5: {"name": ..., "arguments": {...}}."""
    found = members(body.strip())
    missing = [key for key in ("name", "arguments") if key not in found]
    if missing:
        raise ValueError(f"the call has no {missing[0]}")
    name, arguments = _string(found["name"]), found["arguments"]
    return _call(name, _string(arguments) or arguments[1])  # some models wrap the object in a string


def read_qwen2(body: str) -> ToolCall:
    """Qwen2: ` name\\n✿ARGS✿: {...}`; what follows the last brace is a remark."""
    name, marker, arguments = body.partition("✿ARGS✿:")
    if not marker:
        raise ValueError("the call has no ✿ARGS✿")
    return _call(name.strip(), arguments[: arguments.rfind("}") + 1].strip() or arguments)


def _string(member: tuple[object, str]) -> str | None:
    value, text = member
    return str(value) if text.startswith('"') else None


def _call(name: str | None, arguments: str) -> ToolCall:
    if name is None or not NAME.fullmatch(name):
        raise ValueError(f"{shown(name)} is not the name of a tool" if name is not None else "the name is not text")
    check_object(arguments, "arguments")
    return ToolCall(name, arguments)


HERMES = Dialect("<tool_call>", "</tool_call>", stops=(), lead=(), read=read_hermes, write=('\n{"name": "', '", "arguments": ', "}\n"))
# A prompt that goes on after a result ends at `✿RETURN✿`, and the model writes the `: ` itself.
QWEN2 = Dialect("✿FUNCTION✿:", None, stops=("✿RESULT✿", "✿RETURN✿"), lead=(": ", ":"), read=read_qwen2, write=(" ", "\n✿ARGS✿: ", ""))
DIALECTS = {"hermes": HERMES, "qwen2": QWEN2}
BETWEEN = "\n"  # stands between two calls


# --- the stream


class StreamParser:
    """Push text as it comes, flush at the end. With no dialect everything is content. `plain`: calls that may be plain JSON."""

    def __init__(self, dialect: Dialect | None, in_pieces: bool = False, plain: PlainCalls | None = None) -> None:
        self._dialect, self._in_pieces, self._plain = dialect, in_pieces, plain
        self._so_far: CallSoFar | None = None
        self._text = ""  # not yet given out: a possible marker, or the body of the open call
        self._step: Callable[[list[Delta]], bool] = self._in_lead
        self._after_call = False  # space between calls is the format's, not content
        self._newline = ""  # the line break before `<tool_call>`, owed to the content if the call is none
        self._at = 0  # how far the body of the open call has been looked at
        self._in_string = False
        self._strings = True  # whether markers inside JSON strings are text; not once the JSON is broken

    def push(self, text: str) -> list[Delta]:
        """What this text adds."""
        if self._plain is not None:
            text = self._plain.push(text)
        return self._push(text)

    def _push(self, text: str) -> list[Delta]:
        if self._dialect is None:
            return [Delta(content=text)] if text else []
        self._text += text
        deltas: list[Delta] = []
        while self._step(deltas):
            pass
        return deltas

    def flush(self) -> list[Delta]:
        """The end: what was held back."""
        deltas: list[Delta] = []
        if self._plain is not None:
            calls, rest = self._plain.end()
            if calls:
                return [Delta(call=call) for call in calls]
            deltas += self._push(rest) if rest else []
        if self._dialect is None:
            return deltas
        if self._step == self._in_lead:
            self._text = self._text.removeprefix(":") if ":" in self._dialect.lead else self._text
            self._step = self._in_content
        if self._step == self._in_call:
            self._finish(deltas, len(self._text), "")
        elif self._step == self._in_content:
            self._give(deltas, len(self._text))
        self._text = ""
        self._step = self._done
        return deltas

    # Each step consumes what it can of self._text and says whether another step should follow.

    def _done(self, deltas: list[Delta]) -> bool:
        self._text = ""
        return False

    def _in_lead(self, deltas: list[Delta]) -> bool:
        assert self._dialect is not None
        longest = max(self._dialect.lead, key=len, default="")
        if len(self._text) < len(longest) and longest.startswith(self._text):
            return False
        for lead in self._dialect.lead:
            if self._text.startswith(lead):
                self._text = self._text[len(lead) :]
                break
        self._step = self._in_content
        return True

    def _in_content(self, deltas: list[Delta]) -> bool:
        assert self._dialect is not None
        if self._after_call:
            self._text = self._text.lstrip()
            self._after_call = not self._text
        markers = (self._dialect.open, *self._dialect.stops)
        found = _first(self._text, markers)
        if found is None:
            self._give(deltas, len(self._text) - _unfinished(self._text, (*markers, "\n" + self._dialect.open)))
            return False
        start, marker = found
        if marker != self._dialect.open:
            self._give(deltas, start)
            self._step = self._done
            return True
        self._newline = "\n" if self._text[:start].endswith("\n") else ""
        self._give(deltas, start - len(self._newline))
        self._open(len(self._newline) + len(marker))
        return True

    def _open(self, skip: int) -> None:
        self._text = self._text[skip:]
        self._at, self._in_string, self._strings = 0, False, True
        self._so_far = CallSoFar(self._dialect.write) if self._in_pieces and self._dialect else None
        self._step = self._in_call

    def _in_call(self, deltas: list[Delta]) -> bool:
        """Look for the end of the call: markers inside the JSON's strings are text."""
        assert self._dialect is not None
        if self._so_far is not None:
            name, arguments = self._so_far.look(self._text)
            deltas += [Delta(begins=name)] if name is not None else []
            deltas += [Delta(arguments=arguments)] if arguments else []
        ends = (self._dialect.close,) if self._dialect.close else (self._dialect.open, *self._dialect.stops)
        while True:
            if self._in_string:
                if not self._leave_string():
                    return False
                continue
            found = _first(self._text, (*ends, '"') if self._strings else ends, self._at)
            if found is None:
                self._at = max(self._at, len(self._text) - _unfinished(self._text, ends))
                return False
            start, marker = found
            if marker == '"':
                self._in_string, self._at = True, start + 1
                continue
            self._finish(deltas, start, marker)
            return True

    def _leave_string(self) -> bool:
        """Go on to the end of a JSON string; False: more text is needed. A raw line break means that the JSON is broken."""
        found = re.compile(r'["\\\x00-\x1f]').search(self._text, self._at)
        if found is None:
            self._at = len(self._text)
            return False
        if found[0] == "\\":
            if found.end() == len(self._text):
                self._at = found.start()
                return False
            self._at = found.end() + 1
            return True
        self._at = found.end()
        self._in_string = False
        self._strings = self._strings and found[0] == '"'
        return True

    def _finish(self, deltas: list[Delta], end: int, marker: str) -> None:
        """The call's body is the text up to `end`, where `marker` (or nothing, at the end of the text) closes it."""
        assert self._dialect is not None
        body = self._text[:end]
        closed = marker if marker == self._dialect.close else ""
        self._text = self._text[end + len(marker) :]
        begun = None if self._so_far is None else self._so_far.call
        try:
            call = self._dialect.read(body)
            deltas.append(Delta(call=call) if begun is None else Delta(ends=call))
            self._after_call = True
        except (ValueError, RecursionError) as error:
            problem = f"not a tool call: {error}"
            if begun is None:
                deltas.append(Delta(content=self._newline + self._dialect.open + body + closed, problem=problem))
            else:
                deltas.append(Delta(ends=begun, problem=problem if begun.cut else None))
        self._newline = ""
        if marker == self._dialect.open:
            self._open(0)
        else:
            self._step = self._done if marker in self._dialect.stops else self._in_content

    def _give(self, deltas: list[Delta], end: int) -> None:
        if end > 0:
            deltas.append(Delta(content=self._text[:end]))
        self._text = self._text[max(end, 0) :]


def _first(text: str, markers: tuple[str, ...], at: int = 0) -> tuple[int, str] | None:
    """The leftmost marker at or after `at`; one pass, whatever the number of markers (`re` keeps the compiled pattern)."""
    found = re.compile("|".join(map(re.escape, markers))).search(text, at)
    return (found.start(), found[0]) if found else None


def _unfinished(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of the text that may still become a marker."""
    longest = max(map(len, markers)) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0
