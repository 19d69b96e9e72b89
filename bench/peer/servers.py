"""The two servers, each a process of its own: ours, and llama.cpp's.

Left out: what is asked of them (serve.py).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import qwen2

GRACE = 10.0  # seconds to end
PATIENCE = 120.0  # seconds to load a model
SLOTS = 16  # answers written at once by either
CONTEXT = 49_152  # of all slots of llama.cpp together; with more it is slower, and so it is where each has a part of its own


class Server:
    """A running one. SystemExit with its last line when it does not come up."""

    def __init__(self, name: str, model: str, command: list[str], port: int, about: str, environment: dict[str, str] | None = None) -> None:
        self.name, self.model, self.port, self.about = name, model, port, about
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the server
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env={**os.environ, **(environment or {})})
        begin = time.monotonic()
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() - begin > PATIENCE:
                self.log.seek(0)
                said = self.log.read().strip().splitlines() or ["it said nothing"]
                self.close()
                raise SystemExit(f"{name}'s server did not come up: {said[-1]}")
            time.sleep(0.1)

    def _is_up(self) -> bool:
        try:
            return bool(json.loads(self.get("/health"))["status"] == "ok")
        except (OSError, urllib.error.URLError):
            return False

    def get(self, path: str) -> str:
        """A page of it."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        """A number of its /metrics, of all labels together."""
        lines = (line.rpartition(" ") for line in self.get("/metrics").splitlines())
        return sum(float(value) for key, _, value in lines if key.partition("{")[0] == name)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def ours(model: str, threads: int) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "qwen2", "serve", "--port", str(port), "--threads", str(threads), "--max-batch", str(SLOTS)]
    source = str(Path(qwen2.__file__).parents[1])  # the same installation there as here
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))}
    return Server("ours", model, [*command, "--keep-alive", "-1"], port, f"qwen2 {qwen2.__version__}, qwen2 serve", environment)


def llama(program: Path, file: Path, threads: int) -> Server:
    port = free_port()
    settings = ["-np", str(SLOTS), "-c", str(CONTEXT), "--kv-unified", "-t", str(threads), "-tb", str(threads)]
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    version = next((line for line in (said.stdout + said.stderr).splitlines() if line.startswith("version")), "")
    command = [str(program), "-m", str(file), "--host", "127.0.0.1", "--port", str(port), *settings]
    return Server("llama.cpp", file.name, command, port, f"{version}, llama-server {' '.join(settings)}")
