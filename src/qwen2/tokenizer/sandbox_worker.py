"""The process in which a checkpoint's Jinja template runs. Started by path by `sandbox.py`; knows nothing of the rest of qwen2.

Jinja's sandbox keeps a template from reaching Python's objects. It does not bound time and memory: `'a' * 10**9`, `10**10**10` and
`'x'|center(10**9)` are single operations in C that no trace hook and no thread interrupts. Hence a process of its own: its address
space is limited where the system can (Linux; on macOS as far as the kernel honours it, on Windows only the operations below are
bounded), and a watchdog in C ends it after the time limit even if the parent is gone. The operations that ask for absurd
sizes are refused by name first, for the sake of a clear message.

Protocol: JSON lines. {"source", "context", "limits"} in, {"text"} or {"error"} out.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import signal
import sys
from typing import Any

if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != os.path.dirname(os.path.abspath(__file__))]

import jinja2
import jinja2.ext
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What a wrong operation in a template can raise and says itself what is wrong
MISTAKES = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, AssertionError)
# What one of Jinja's own objects can raise, as `cycler()` does, told with its class; what is left ends the process
FAILURES = (RuntimeError, StopIteration, OSError, NameError, ImportError, BufferError, EOFError, SystemError)
MAX_BITS = 4096  # of a number; what counts tokens or messages needs 32


class RefusedError(Exception):
    """What the template's author, or the sandbox, says no to."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text in some templates; it renders what it holds."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own protocol)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox; what it forbids is an error at once and not an empty string."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, largest: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
        self.largest = largest
        self.filters["tojson"] = to_json
        self.filters["center"] = self.center
        self.filters["indent"] = self.indent
        self.globals["raise_exception"] = refuse
        self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is not allowed")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * max(right, 0) > MAX_BITS:
                raise SecurityError(f"a power of more than {MAX_BITS} bits")
        elif operator == "*":
            self._check_product(left, right)
        return super().call_binop(context, operator, left, right)

    def _check_product(self, left: Any, right: Any) -> None:
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | bytes | list | tuple) and isinstance(count, int) and len(sequence) * count > self.largest:
                raise SecurityError(f"a repetition of more than {self.largest} elements")
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_BITS:
            raise SecurityError(f"a number of more than {MAX_BITS} bits")

    def center(self, value: str, width: int = 80) -> str:
        """The filter of this name, with its width bounded."""
        if width > self.largest:
            raise SecurityError(f"a width of more than {self.largest}")
        return str(value).center(width)

    def indent(self, value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        """The filter of this name, with its width bounded."""
        if isinstance(width, int) and width > 1000:
            raise SecurityError("an indentation of more than 1000")
        return jinja2.filters.do_indent(value, width, first, blank)


def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """The reference's `tojson`: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message: str) -> None:
    """`raise_exception` of the reference."""
    raise RefusedError(str(message))


def limit_memory(size: int) -> None:
    """Bound the address space where the system has a way to."""
    try:
        import resource
    except ImportError:  # Windows
        return
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ValueError, OSError):  # macOS may refuse
        return


def render(environment: Sandbox, templates: dict[str, jinja2.Template], job: dict[str, Any]) -> str:
    """One rendering; the output is counted while it grows."""
    source = job["source"]
    if source not in templates:
        templates.clear()
        templates[source] = environment.from_string(source)
    pieces, size = [], 0
    for piece in templates[source].generate(job["context"]):
        size += len(piece)
        if size > environment.largest:
            raise RefusedError(f"it wrote more than {environment.largest} characters")
        pieces.append(piece)
    return "".join(pieces)


def answer(environment: Sandbox, templates: dict[str, jinja2.Template], job: dict[str, Any]) -> dict[str, str]:
    """The rendering, or what went wrong in one line."""
    try:
        return {"text": render(environment, templates, job)}
    except MemoryError:
        return {"error": "it used more memory than it may"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except (RefusedError, jinja2.TemplateError, *MISTAKES) as error:
        return {"error": _line(str(error) or type(error).__name__)}
    except FAILURES as error:
        return {"error": _line(f"{type(error).__name__}: {error}")}


def _line(text: str) -> str:
    return " ".join(text.split())[:500]


def main() -> None:
    """Answer jobs until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the conversation
    limits = json.loads(sys.stdin.readline())
    limit_memory(limits["memory"])
    environment = Sandbox(limits["output"])
    templates: dict[str, jinja2.Template] = {}
    silence = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    print("{}", flush=True)
    for line in sys.stdin:
        faulthandler.dump_traceback_later(limits["seconds"] + 1, exit=True, file=silence)
        result = answer(environment, templates, json.loads(line))
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
