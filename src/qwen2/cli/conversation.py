"""A conversation as it is kept: who said what, the system prompt, the sampling parameters; as JSON in a file.

The file's `messages` are OpenAI-shaped, so other programs read them. An answer that Ctrl-C ended is marked there, and goes to the
model as far as it came. What is left out: tool calls, which a conversation by hand has none of.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen2.engine.request import SamplingParams

FORMAT = "qwen2 conversation 1"
LARGEST = 64 << 20  # bytes of a file that may be a conversation
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Turn:
    """What one side said; `stopped` marks an answer that Ctrl-C ended."""

    role: str
    content: str
    stopped: bool = False


@dataclass
class Conversation:
    """Everything that /save keeps."""

    model: str
    system: str | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    turns: list[Turn] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """As the engine takes them."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *({"role": turn.role, "content": turn.content} for turn in self.turns)]

    def save(self, path: Path) -> None:
        """Write the file as a whole or not at all. A file that is there and no conversation is left alone."""
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"{path.absolute().parent}: no such folder")
        if path.exists():
            read_conversation(path)
        standard = asdict(SamplingParams())
        values = {
            "format": FORMAT,
            "model": self.model,
            "system": self.system,
            "parameters": {name: value for name, value in asdict(self.params).items() if value != standard[name]},
            "messages": [{"role": t.role, "content": t.content, **({"stopped": True} if t.stopped else {})} for t in self.turns],
        }
        try:
            handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None  # its name, not the draft's
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(values, file, ensure_ascii=False, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise


def read_conversation(path: Path) -> Conversation:
    """Read what `save` wrote. ValueError in one line for anything else."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes is no conversation, the limit is {LARGEST:,}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not a saved conversation (no JSON)") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f'{path}: not a saved conversation (no "format": "{FORMAT}")')
    unknown = sorted(set(values) - {"format", "model", "system", "parameters", "messages"})
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}")
    model, system, parameters = values.get("model"), values.get("system"), values.get("parameters", {})
    if not isinstance(model, str) or not isinstance(system, str | None) or not isinstance(parameters, dict):
        raise ValueError(f"{path}: model and system are texts, parameters an object")
    messages = values.get("messages")
    if not isinstance(messages, list):
        raise ValueError(f"{path}: messages is no list")
    turns = [_read_turn(message, f"{path}: messages[{k}]") for k, message in enumerate(messages)]
    return Conversation(model, system, _read_params(path, parameters), turns)


def _read_turn(message: object, at: str) -> Turn:
    if not isinstance(message, Mapping) or not set(message) <= {"role", "content", "stopped"}:
        raise ValueError(f"{at}: must be an object with role, content and perhaps stopped")
    role, content, stopped = message.get("role"), message.get("content"), message.get("stopped", False)
    if role not in ROLES or not isinstance(content, str) or not isinstance(stopped, bool):
        raise ValueError(f"{at}: role must be user or assistant, content a text, stopped true or false")
    return Turn(str(role), content, stopped)


def _read_params(path: Path, parameters: dict[str, Any]) -> SamplingParams:
    try:
        if isinstance(parameters.get("logit_bias"), dict):  # JSON's keys are texts
            parameters["logit_bias"] = {int(token): bias for token, bias in parameters["logit_bias"].items()}
        return SamplingParams.from_dict(parameters)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
