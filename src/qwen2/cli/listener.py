"""Who listens at a port that is taken: what it answers when it is asked, and which process it is where the system shows that.

Left out: processes of other users, and systems without /proc, of which only the answers tell.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

LISTEN = "0A"  # of /proc/net/tcp, third column: proc(5)
SECONDS = 2.0
Json = dict[str, Any]


def who(host: str, port: int, key: str | None = None) -> str:
    """In a few words. `key`: what a server of ours may want."""
    process = _process(port)
    return _answers(host, port, key) + (f", process {process[0]} ({process[1]})" if process is not None else "")


def _answers(host: str, port: int, key: str | None) -> str:
    import httpx

    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    place = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
    try:
        with httpx.Client(base_url=place, timeout=SECONDS, headers={} if key is None else {"Authorization": f"Bearer {key}"}) as client:
            own = client.get("/qwen2")
            said = own.json() if own.headers.get("content-type", "").startswith("application/json") else {}
            if own.status_code == httpx.codes.OK and said.get("program") == "qwen2":
                return f"a server of ours, version {said.get('version')}"
            if own.status_code == httpx.codes.UNAUTHORIZED and _is_ours(said):
                return "a server of ours, which wants another key" if key else "a server of ours, which wants its key"
            if client.get("/").text == "Ollama is running":
                return f"Ollama, version {client.get('/api/version').json()['version']}"
    except (httpx.HTTPError, ValueError, AttributeError, KeyError, TypeError):
        pass
    return "another program"


def _is_ours(said: Json) -> bool:
    """Whether a refusal has the words of our guard."""
    error = said.get("error")
    return isinstance(error, dict) and error.get("code") == "invalid_api_key" and "this server wants its key" in str(error.get("message"))


def _process(port: int) -> tuple[int, str] | None:
    """Number and program of the process that listens there, as far as this user may see it."""
    sockets = {f"socket:[{inode}]" for inode in _inodes(port)}
    for folder in Path("/proc").glob("[0-9]*") if sockets else ():
        try:
            if any(str(link.readlink()) in sockets for link in (folder / "fd").iterdir()):
                return int(folder.name), (folder / "comm").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:  # another user's, or gone meanwhile
            continue
    return None


def _inodes(port: int) -> set[str]:
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for columns in map(str.split, lines):
            if columns[3] == LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                found.add(columns[9])
    return found


def check_free(host: str, port: int, key: str | None = None) -> None:
    """OSError where another program listens there already, with who it is as far as it tells."""
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
                f"port {port} at {host} is taken by {who(host, port, key)} ({error.strerror}); end it, or take another with --port"
            ) from None
