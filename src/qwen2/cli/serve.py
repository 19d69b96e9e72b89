"""`qwen2 serve`: the models of this machine behind the interfaces of OpenAI and Ollama."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Literal

from cyclopts import Parameter

Names = Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)]
Flag = Annotated[bool, Parameter(negative=())]
STOP_SECONDS = 30  # for answers that are being written when the server is told to end


def serve(
    *,
    host: str = "127.0.0.1",
    port: int = 11434,
    api_key: str | None = None,
    origin: Names = None,
    allow_host: Names = None,
    open: Flag = False,
    keep_alive: str = "5m",
    max_loaded: int = 2,
    max_batch: int = 16,
    context: int | None = None,
    cache_bits: Literal[16, 8] = 16,
    cache_gb: float | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> None:
    """Serve the models that are here.

    Parameters
    ----------
    host
        The address to listen at. Other than this machine's own it needs --api-key, or --open.
    port
        The port.
    api_key
        What requests have to carry; left out, QWEN2_API_KEY.
    origin
        Web pages elsewhere that may ask, as in https://example.org; "*" is any.
    allow_host
        Further names under which this server is asked.
    open
        Listen at an address that others reach without a key.
    keep_alive
        How long a model stays in memory after its last request: 90, 10m, 2h; -1 is for good.
    max_loaded
        Models in memory at once.
    max_batch
        Answers written at once.
    context
        Tokens of prompt and answer together, at most; left out, the model's own.
    cache_bits
        Bits of the keys and values.
    cache_gb
        Memory for the keys and values of one model; left out, a quarter of this machine's.
    threads
        CPU threads; left out, as many as there are physical cores.
    device
        cpu, or cuda.
    """
    from qwen2.server.guard import is_loopback
    from qwen2.server.settings import seconds

    key = os.environ.get("QWEN2_API_KEY") if api_key is None else api_key
    if not is_loopback(host) and key is None and not open:
        raise ValueError(f"--host {host}: others could use this server; give it --api-key KEY, or say --open if that is meant")
    for name, value in (("max-loaded", max_loaded), ("max-batch", max_batch)):
        if value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if not 0 <= port < 65_536:
        raise ValueError(f"--port {port}: must be from 0 (any free one) to 65,535")
    stays = seconds(keep_alive)
    check_free(host, port)

    import uvicorn

    from qwen2.server.app import create_app
    from qwen2.server.settings import Settings

    settings = Settings(
        host=host,
        port=port,
        api_key=key,
        origins=tuple(origin or ()),
        hosts=tuple(allow_host or ()),
        keep_alive=stays,
        max_loaded=max_loaded,
        max_batch=max_batch,
        context=context,
        cache_bits=cache_bits,
        cache_bytes=None if cache_gb is None else int(cache_gb * 1e9),
        threads=threads,
        device=device,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    sys.setswitchinterval(0.001)  # the engine's thread comes back from its kernels and has to wait for Python no longer than that
    print(f"qwen2: serving at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    uvicorn.run(
        create_app(settings), host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_SECONDS,
        server_header=False,
    )  # fmt: skip


def check_free(host: str, port: int) -> None:
    """OSError where another program listens there already, with who it is as far as it tells."""
    import socket

    if port == 0:
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise OSError(f"port {port}: ports below 1,024 are the system's; take another with --port") from None
        except OSError as error:
            raise OSError(
                f"port {port} at {host} is taken by {who(host, port)} ({error.strerror}); end it, or take another with --port"
            ) from None


def who(host: str, port: int) -> str:
    """What answers at a port."""
    import httpx

    place = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"
    try:
        version = httpx.get(f"{place}/api/version", timeout=2).json().get("version")
    except (httpx.HTTPError, ValueError, AttributeError):
        return "another program"
    return f"a server of ours or of Ollama, version {version}"
