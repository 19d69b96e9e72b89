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
    loaded = [one["name"] for one in ask(at, "GET", "/api/ps")["models"]]
    ask(at, "POST", "/api/generate", {"model": model, "keep_alive": 0, "stream": False})
    print(f"{model}: unloaded" if model in loaded or f"{model}:latest" in loaded else f"{model}: was not in memory")
