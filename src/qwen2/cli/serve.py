"""`qwen2 serve`: the models of this machine behind the interfaces of OpenAI and Ollama."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from qwen2.cli.listener import check_free
from qwen2.weights.store import Store

if TYPE_CHECKING:
    from qwen2.server.settings import Settings

PORTS = 65_536
DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")
STOP_SECONDS = 30  # for answers that are being written when the server is told to end; then they are broken off
LAST_SECONDS = 10  # for what is left then


def _flag(text: str) -> Parameter:
    return Parameter(help=text, negative=())


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What `qwen2 serve` takes."""

    host: Annotated[str, _flag("The address to listen at. Other than this machine's own it needs --api-key, or --open.")] = "127.0.0.1"
    port: Annotated[int, _flag("The port; 0 is any free one.")] = 11434
    api_key: Annotated[str | None, _flag("What requests have to carry; left out, QWEN2_API_KEY.")] = None
    origin: Annotated[
        list[str] | None, _flag('A web page elsewhere that may ask, as in https://example.org; "*" is any. May be repeated.')
    ] = None
    allow_host: Annotated[list[str] | None, _flag("A further name under which this server is asked. May be repeated.")] = None
    open: Annotated[bool, _flag("Listen without a key at an address that others reach.")] = False
    keep_alive: Annotated[str, _flag("How long a model stays in memory after its last request: 90, 10m, 2h; -1 is for good.")] = "5m"
    max_loaded: Annotated[int, _flag("Models in memory at once.")] = 2
    load: Annotated[
        list[str] | None, _flag("A model to load at the start; /health says 503 until it has written a token. May be repeated.")
    ] = None
    max_batch: Annotated[int, _flag("Answers written at once.")] = 16
    context: Annotated[int | None, _flag("Tokens of prompt and answer together, at most; left out, the model's own.")] = None
    cache_bits: Annotated[Literal[16, 8], _flag("Bits of the keys and values.")] = 16
    cache_gb: Annotated[
        float | None,
        _flag("Memory for keys and values of one model; left out, at most half of what is free then, one window at least."),
    ] = None
    threads: Annotated[int | None, _flag("CPU threads; left out, as many as there are physical cores.")] = None
    device: Annotated[str, _flag("cpu, cuda or cuda:N.")] = "cpu"
    max_queue: Annotated[int, _flag("Requests that run or wait, and answers, of all clients together; more are refused (429).")] = 256
    max_per_client: Annotated[int, _flag("Those of one client, by its address.")] = 64
    max_body_mb: Annotated[int, _flag("Megabytes (MiB) of a request; uploaded files may be larger.")] = 16
    priorities: Annotated[bool, _flag("Let requests say their priority: smaller ones go first, whoever sends them.")] = False
    draft: Annotated[str | None, _flag("A smaller model that guesses for those of the same tokens: no text changes, most come sooner.")] = (
        None
    )


def serve(flags: Annotated[Flags, Parameter(name="*")] = Flags()) -> None:
    """Serve the models that are here."""
    from qwen2.server.memory import one_heap

    one_heap()
    settings = settings_of(flags)
    for name in settings.load:
        Store().get(name)  # said before anything is listened to
    check_free(settings.host, settings.port, settings.api_key)

    import uvicorn

    from qwen2.server.app import create_app
    from qwen2.server.ending import Ending

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    check_device(settings.device)
    sys.setswitchinterval(0.001)  # the engine's thread comes back from its kernels and has to wait for Python no longer than that
    quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
    app = create_app(settings)
    config = uvicorn.Config(app, host=settings.host, port=settings.port, timeout_graceful_shutdown=STOP_SECONDS + LAST_SECONDS, **quiet)
    server = Ending(config, app.state.server.models, app.state.server.works, STOP_SECONDS, partial(tell, settings.host))
    with suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended by one
        server.run()
    if not server.started:
        raise OSError("the server did not start; what it said above is why")


def tell(host: str, port: int) -> None:
    """Where it is, once it is there."""
    shown = f"[{host}]" if ":" in host else host
    print(f"qwen2: serving at http://{shown}:{port} (Ctrl-C ends it)", file=sys.stderr, flush=True)


def settings_of(flags: Flags) -> Settings:
    """The flags, checked. ValueError names the one that is wrong."""
    from qwen2.server.guard import is_loopback
    from qwen2.server.settings import Limits, Settings, seconds

    key = _key(flags.api_key)
    if not is_loopback(flags.host) and key is None and not flags.open:
        raise ValueError(f"--host {flags.host}: others could use this server; give it --api-key KEY, or say --open if that is meant")
    _check_numbers(flags)
    if DEVICE.fullmatch(flags.device) is None:
        raise ValueError(f"--device {flags.device}: must be cpu, cuda or cuda:N")
    if len(flags.load or ()) > flags.max_loaded:
        raise ValueError(f"--load is given {len(flags.load or ())} times and --max-loaded is {flags.max_loaded}: raise it")
    if flags.draft is not None:
        if flags.device != "cpu":
            raise ValueError(f"--draft with --device {flags.device}: guesses are checked by the CPU's kernels; leave one of them out")
        Store().find(flags.draft)
    return Settings(
        host=flags.host,
        port=flags.port,
        api_key=key,
        origins=tuple(flags.origin or ()),
        hosts=tuple(flags.allow_host or ()),
        keep_alive=seconds(flags.keep_alive),
        max_loaded=flags.max_loaded,
        load=tuple(flags.load or ()),
        max_batch=flags.max_batch,
        context=flags.context,
        cache_bits=flags.cache_bits,
        cache_bytes=None if flags.cache_gb is None else int(flags.cache_gb * 1e9),
        threads=flags.threads,
        device=flags.device,
        priorities=flags.priorities,
        draft=flags.draft,
        limits=Limits(body_bytes=flags.max_body_mb << 20, queue=flags.max_queue, per_client=flags.max_per_client),
    )


def _check_numbers(flags: Flags) -> None:
    for name in ("max_loaded", "max_batch", "context", "threads", "max_queue", "max_per_client", "max_body_mb"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if flags.cache_gb is not None and not 0 < flags.cache_gb < math.inf:
        raise ValueError(f"--cache-gb {flags.cache_gb:g}: must be above 0")
    if not 0 <= flags.port < PORTS:
        raise ValueError(f"--port {flags.port}: must be from 0 (any free one) to {PORTS - 1:,}")


def check_device(device: str) -> None:
    """ValueError where torch does not have it."""
    if device == "cpu":
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ValueError(f"--device {device}: torch finds no such device here; leave it out to compute on the CPU")
    if int(device.partition(":")[2] or 0) >= count:
        raise ValueError(f"--device {device}: there are {count}, the last is cuda:{count - 1}")


def _key(given: str | None) -> str | None:
    """What requests have to carry. An empty variable is no key, as where it is not set; an empty flag is a mistake."""
    if given is None:
        return os.environ.get("QWEN2_API_KEY", "").strip() or None
    if not given.strip():
        raise ValueError("--api-key is empty, which everybody knows: give it a key, or leave it out")
    return given.strip()
