"""What a server is started with: where it listens, who may ask, and how much."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

MINUTE = 60.0
YEAR = 365 * 24 * 60 * MINUTE


@dataclass(frozen=True)
class Limits:
    """Above these a request is refused, with the limit named."""

    body_bytes: int = field(default=16 << 20, metadata={"help": "Of a request's body."})
    blob_bytes: int = field(default=1 << 40, metadata={"help": "Of a file that is uploaded, which the disk must have room for too."})
    queue: int = field(
        default=256,
        metadata={"help": "Requests that run or wait, and answers (prompts times n, texts to embed), of all clients; then 429."},
    )
    per_client: int = field(default=64, metadata={"help": "Requests that run or wait of one client."})
    samples: int = field(default=16, metadata={"help": "n of one request."})
    stops: int = field(default=16, metadata={"help": "Stop strings of one request."})
    stop_characters: int = field(default=1000, metadata={"help": "Of one stop string."})
    messages: int = field(default=4096, metadata={"help": "Of one request's conversation."})
    inputs: int = field(default=2048, metadata={"help": "Texts of one request for embeddings, or prompts of one for completions."})


@dataclass(frozen=True)
class Settings:
    """Of one server."""

    host: str = "127.0.0.1"
    port: int = 11434
    api_key: str | None = None
    origins: tuple[str, ...] = ()  # of web pages elsewhere that may ask; "*" is any
    hosts: tuple[str, ...] = ()  # further names under which it may be asked
    keep_alive: float | None = 5 * MINUTE  # seconds that a model stays after its last request; None: for good
    max_loaded: int = 2  # models in memory at once
    load: tuple[str, ...] = ()  # models that are loaded at the start; /health is 503 until they have written a token
    max_batch: int = 16
    context: int | None = None
    cache_bits: int = 16
    cache_bytes: int | None = None
    threads: int | None = None
    isa: str | None = None  # the kernels' instruction set
    device: str = "cpu"
    priorities: bool = False  # whether clients may say which requests go first
    draft: str | None = None  # name of a smaller model that guesses for those of the same tokens
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if "null" in self.origins:
            raise ValueError('--origin null: files and sandboxed frames of any page have that origin; name a site, or "*" for all of them')


UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
NUMBER = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
PART = re.compile(f"({NUMBER})({'|'.join(UNITS)})")
TIME = re.compile(rf"([+-]?)(?:({NUMBER})|((?:(?:{NUMBER})(?:{'|'.join(UNITS)}))+))")


def seconds(text: str) -> float | None:
    """A time as Ollama writes it: 90, 90s, 10m, 1h30m; below zero or more than a year is None, for good. ValueError names another."""
    match = TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r:.80}: write a time as 90, 10m or 1h30m; -1 is for good")
    sign, number, parts = match.groups()
    value = float(number) if parts is None else sum(float(part) * UNITS[unit] for part, unit in PART.findall(parts))
    return lasting(-value if sign == "-" else value)


def lasting(value: float) -> float | None:
    """Seconds that a model stays; below zero or more than a year is None, for good. ValueError for what is no number."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is no time: write one as 90, 10m or 1h30m; -1 is for good")
    return None if value < 0 or value > YEAR else value
