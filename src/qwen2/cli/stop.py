"""`qwen2 stop MODEL`: a running server gives a model's memory back."""

from __future__ import annotations

from qwen2.cli.client import Address, ask


def stop(model: str, /, *, at: Address = None) -> None:
    """Unload a model of a running server; what it is writing is broken off.

    Parameters
    ----------
    model
        Its name.
    at
        The server, as host:port or a URL; left out, QWEN2_SERVER or 127.0.0.1:11434.
    """
    told = ask(at, "POST", "/qwen2/stop", {"model": model})
    cut = f", {told['broken_off']} of its answers broken off" if told["broken_off"] else ""
    print(f"{model}: unloaded{cut}" if told["unloaded"] else f"{model}: was not in memory")
