"""A Modelfile: what makes a model of one's own out of another, as Ollama writes it down.

    FROM qwen2.5-coder:0.5b
    SYSTEM You answer in one sentence.
    PARAMETER temperature 0.2
    MESSAGE user Is the sky blue?
    ADAPTER ./my-adapter

Keywords in any case, `#` begins a comment, texts of several lines stand between three quotes (or one). A TEMPLATE is Jinja here.
Whatever is wrong is a ValueError that begins with the number of the line. Left out: making the model (create.py).

    parse(text).system
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from qwen2 import __version__
from qwen2.weights.parameters import Value, as_defaults, read_parameter, read_parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwen2.config import GenerationDefaults

KEYWORDS = ("FROM", "SYSTEM", "PARAMETER", "TEMPLATE", "LICENSE", "MESSAGE", "REQUIRES", "ADAPTER")
REFUSED = {
    "RENDERER": "how a conversation is written down is the template's to say: leave the line out, or write a TEMPLATE in Jinja",
    "PARSER": "how calls are read follows from the model's template: leave the line out",
}
ROLES = ("system", "user", "assistant")
LARGEST = 4 << 20  # characters of a Modelfile
MOST_MESSAGES = 1024
TRIPLE = '"""'
VERSION = re.compile(r"v?(\d{1,6})(?:\.(\d{1,6}))?(?:\.(\d{1,6}))?", re.ASCII)
# Go's {{ .Prompt }}, {{ $x := ... }}, {{ if ... }}, {{ end }}, none of which Jinja would write so
GO = re.compile(r"\{\{-?\s*(?:\.|\$|/\*|(?:if|range|with|template|define|block)\s+[^\s(\[}|,=]|(?:end|else)\s*-?\}\})")
GO_TEMPLATE = (
    "this is a template in Go's language, and conversations are rendered here by the model's own Jinja: leave TEMPLATE out to use it, "
    "or write Jinja, as in {% for message in messages %}{{ message.content }}{% endfor %}"
)


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says; None or empty: nothing. `source` is FROM; a message is (role, content); `adapter` a folder as it was named."""

    source: str = ""
    system: str | None = None
    template: str | None = None
    parameters: Mapping[str, Value] = field(default_factory=dict)
    messages: tuple[tuple[str, str], ...] = ()
    licence: tuple[str, ...] = ()
    requires: str | None = None
    adapter: str | None = None

    def __bool__(self) -> bool:
        """Whether it changes anything of what it is made from."""
        return self != Modelfile(self.source)

    def over(self, base: Modelfile) -> Modelfile:
        """This one for a model that is made from another made one: what is not said here is as it was there."""
        return Modelfile(
            self.source,
            base.system if self.system is None else self.system,
            base.template if self.template is None else self.template,
            {**base.parameters, **self.parameters},
            self.messages or base.messages,
            self.licence or base.licence,
            base.requires if self.requires is None else self.requires,
            base.adapter if self.adapter is None else self.adapter,
        )

    def defaults(self, generation: GenerationDefaults) -> GenerationDefaults:
        """Sampling defaults of a checkpoint with the PARAMETERs in their place."""
        return as_defaults(self.parameters, generation)

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Messages with the model's SYSTEM, unless they begin with one of their own, and its MESSAGEs before them."""
        if not messages:  # refused where it is rendered
            return []
        own = [messages[0]] if isinstance(messages[0], Mapping) and messages[0].get("role") == "system" else []
        system = own if own or self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *({"role": role, "content": content} for role, content in self.messages), *messages[len(own) :]]

    def to_json(self) -> dict[str, Any]:
        """Plain values, what says nothing left out."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {}, ())}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Modelfile:
        """What `to_json` gave, or the same fields from a request, checked; ValueError names the field."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}")
        for name in ("system", "template", "adapter"):
            if name in values and not isinstance(values[name], str):
                raise ValueError(f"{name}: must be a text")
        if "template" in values:
            check_template(values["template"])
        messages = tuple((role, content) for role, content in values.get("messages", ()))
        for role, content in messages:
            if role not in ROLES or not isinstance(content, str):
                raise ValueError(f"messages: a role is one of {', '.join(ROLES)}, a content a text")
        if len(messages) > MOST_MESSAGES:
            raise ValueError(f"messages: {len(messages):,} are more than the {MOST_MESSAGES:,} that a model may have")
        if "requires" in values:
            check_version(values["requires"])
        licence = values.get("licence", ())
        lists = {"messages": messages, "licence": (licence,) if isinstance(licence, str) else tuple(licence)}
        return cls(**{**values, **lists, "parameters": read_parameters(values.get("parameters", {}))})

    def text(self, source: str, *notes: str, adapter: str | None = None) -> str:
        """A Modelfile that makes the same model out of that one, a name or a path. `notes` are comments.

        `adapter` is the folder of the model's own, where what it is made out of has not got it.
        """
        said = [f"# {note}" for note in notes]
        lines = [f"# Made from {self.source}." if self.source else "# As published.", *said, f"FROM {source}"]
        lines += [] if adapter is None else [f"ADAPTER {adapter}"]
        parts = [("TEMPLATE", self.template), ("SYSTEM", self.system)]
        lines += [f"{keyword} {_quoted(text)}" for keyword, text in parts if text is not None]
        for parameter, value in self.parameters.items():
            for one in value if isinstance(value, tuple) else (value,):
                lines.append(f"PARAMETER {parameter} {spelled(one)}")
        lines += [f"MESSAGE {role} {_quoted(content)}" for role, content in self.messages]
        lines += [f"LICENSE {_quoted(text)}" for text in self.licence]
        lines += [f"REQUIRES {self.requires}"] if self.requires is not None else []
        texts = [self.system, self.template, *(content for _, content in self.messages), *self.licence]
        if any(text is not None and _breaks(text) for text in texts):
            lines.insert(1, "# A text below has a line that ends with three quotes, where a Modelfile ends it: qwen2 cp keeps all of it.")
        return "\n".join(lines) + "\n"


UNCHANGED = Modelfile()


def spelled(value: float | int | bool | str) -> str:
    """A parameter's value as a Modelfile has it."""
    if isinstance(value, str):
        return _quoted(value) if '"' in value or "\n" in value else f'"{value}"'
    return str(value).lower()


def _quoted(text: str) -> str:
    return f"{TRIPLE}{text}{TRIPLE}"


def _breaks(text: str) -> bool:
    return any(line.rstrip().endswith(TRIPLE) for line in text.split("\n")[:-1])


def check_template(text: str) -> None:
    """ValueError for a template of Go's language, and for none."""
    if GO.search(text):
        raise ValueError(f"TEMPLATE: {GO_TEMPLATE}")
    if not text.strip():
        raise ValueError("TEMPLATE is empty: leave it out to use the model's own")


def check_version(text: object) -> None:
    """ValueError where this program is older than what is required."""
    found = VERSION.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"REQUIRES {str(text)[:40]!r}: must be a version such as {__version__}")
    ours = VERSION.match(__version__)
    assert ours is not None, "our own version is one"
    if [int(part or 0) for part in found.groups()] > [int(part or 0) for part in ours.groups()]:
        raise ValueError(
            f"REQUIRES {text}: this is qwen2 {__version__}; take a newer one, or leave the line out if a version of Ollama is meant"
        )


# --------------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Statement:
    """One of a Modelfile's; `word` is what PARAMETER and MESSAGE have before their value."""

    line: int
    keyword: str
    word: str
    value: str


def parse(text: str) -> Modelfile:
    """Read a Modelfile. ValueError in one line that begins with the number of the line, as in "line 3: ..."."""
    if len(text) > LARGEST:
        raise ValueError(f"line 1: a Modelfile of {len(text):,} characters; the limit is {LARGEST:,}")
    found = Modelfile()
    first: dict[str, int] = {}
    last = 1
    for statement in statements(text):
        last = statement.line
        once = f"{statement.keyword} {statement.word}".strip() if statement.keyword == "PARAMETER" else statement.keyword
        if once in first and once not in ("LICENSE", "MESSAGE", "PARAMETER stop"):
            _fail(statement.line, f"{once} again: line {first[once]} has one already")
        first.setdefault(once, statement.line)
        try:
            found = _with(found, statement)
        except ValueError as error:
            _fail(statement.line, str(error))
    if not found.source:
        _fail(last, "there is no FROM: a Modelfile begins with what the model is made from, as in FROM qwen2.5-coder:0.5b")
    return found


def _with(found: Modelfile, statement: Statement) -> Modelfile:
    keyword, word, value = statement.keyword, statement.word, statement.value
    if keyword == "FROM":
        if not value.strip() or "\n" in value or "\0" in value:
            raise ValueError("FROM needs a model's name, or the path of a .gguf file or a folder")
        return replace(found, source=value.strip())
    if keyword == "ADAPTER":
        if not value.strip() or "\n" in value or "\0" in value:
            raise ValueError("ADAPTER needs the folder of a LoRA adapter, the one with adapter_config.json")
        return replace(found, adapter=value.strip())
    if keyword == "SYSTEM":
        return replace(found, system=value)
    if keyword == "TEMPLATE":
        check_template(value)
        return replace(found, template=value)
    if keyword == "LICENSE":
        return replace(found, licence=(*found.licence, value))
    if keyword == "REQUIRES":
        check_version(value)
        return replace(found, requires=value)
    if keyword == "PARAMETER":
        name = word.lower()
        read = read_parameter(name, value)
        before = found.parameters.get(name, ())
        both = (*before, *read) if isinstance(before, tuple) and isinstance(read, tuple) else read
        return replace(found, parameters={**found.parameters, name: both})
    if word.lower() not in ROLES:
        raise ValueError(f"MESSAGE {word[:40]}: the role is one of {', '.join(ROLES)}, as in MESSAGE user Hello")
    if len(found.messages) == MOST_MESSAGES:
        raise ValueError(f"more than {MOST_MESSAGES:,} messages")
    return replace(found, messages=(*found.messages, (word.lower(), value)))


def statements(text: str) -> Iterator[Statement]:
    """The statements of a text, quotes taken off."""
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    at = 0
    while at < len(lines):
        line, number, at = lines[at].lstrip(), at + 1, at + 1
        if not line.strip() or line.startswith("#"):
            continue
        keyword, word, rest = _words(line, number)
        quote = TRIPLE if rest.startswith(TRIPLE) else '"' if rest.startswith('"') else ""
        parts = [rest]
        closed = not quote or (len(rest.rstrip()) >= 2 * len(quote) and rest.rstrip().endswith(quote))
        while not closed:
            if at == len(lines):
                _fail(number, f"the text that {keyword} begins with {quote} has no end: close it with {quote} at the end of a line")
            parts.append(lines[at])
            closed = lines[at].rstrip().endswith(quote)
            at += 1
        value = "\n".join(parts).rstrip()
        yield Statement(number, keyword, word, value[len(quote) : len(value) - len(quote)] if quote else value)


def _words(line: str, number: int) -> tuple[str, str, str]:
    """A line's keyword, the word that follows some of them, and the rest."""
    given, *behind = line.split(None, 1)
    keyword = given.upper()
    if keyword in REFUSED:
        _fail(number, f"{keyword}: {REFUSED[keyword]}")
    if keyword not in KEYWORDS:
        close = get_close_matches(keyword, KEYWORDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(KEYWORDS)}"
        _fail(number, f"unknown keyword {given[:40]!r}: {hint} (a text of several lines stands between {TRIPLE})")
    word = ""
    if keyword in ("PARAMETER", "MESSAGE") and behind:
        word, *behind = behind[0].split(None, 1)
    if not behind or not behind[0].strip():
        form = {"PARAMETER": "NAME VALUE", "MESSAGE": "ROLE TEXT"}.get(keyword, "a value")
        _fail(number, f"{keyword} needs {form} behind it{'; an empty text is written ' + chr(34) * 2 if keyword == 'SYSTEM' else ''}")
    return keyword, word, behind[0]


def _fail(line: int, message: str) -> NoReturn:
    raise ValueError(f"line {line}: {message}")
