"""A peer in a process of its own: it loads a model when told and measures what it is told, one JSON line in, one JSON line out.

The interpreter may be another than ours (each peer has its own packages), so this file and engines.py import nothing of the
rest of the bench, and a peer's packages only when it is named. What the peer prints goes to stderr; stdout carries the answers.

    echo '{"do": "load"}' | python bench/peer/worker.py ours '{"model": "model.gguf", "threads": 2}'
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any, TextIO

from engines import ENGINES, Engine


def peak_rss() -> int:
    """Bytes of memory this process has held at most, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def answer(engine: Engine, command: dict[str, Any]) -> dict[str, Any]:
    """Carry out one command; ValueError for one that is not known."""
    match command["do"]:
        case "load":  # from here to the first token, imports done
            start = time.perf_counter()
            engine.load()
            engine.measure(command["ids"], 0, command["variant"])
            return {"seconds": time.perf_counter() - start}
        case "measure":
            prefill, decode = engine.measure(command["ids"], command["tokens"], command["variant"])
            return {"prefill": prefill, "decode": decode}
        case "streams":
            tokens, seconds = engine.streams(command["prompts"], command["tokens"], command["variant"])
            return {"tokens": tokens, "seconds": seconds}
        case "logits":  # of every token, into a file: only llama.cpp's engine can, for quality.py
            return {"columns": engine.write_logits(command["ids"], command["path"], command["variant"])}  # type: ignore[attr-defined]
        case "peak":
            return {"bytes": peak_rss()}
        case "about":
            return {"versions": engine.versions(), "notes": engine.notes()}
    raise ValueError(f"command {command['do']!r}: unknown")


def serve(engine: Engine, lines: TextIO, out: TextIO) -> None:
    """Answer line by line until the input ends."""
    for line in lines:
        print(json.dumps(answer(engine, json.loads(line))), file=out, flush=True)


def main() -> None:
    name, options = sys.argv[1], json.loads(sys.argv[2])
    out = os.fdopen(os.dup(1), "w")  # ours alone: libraries print to descriptor 1
    os.dup2(2, 1)
    try:
        engine = ENGINES[name](options)
    except (ImportError, OSError, ValueError) as error:
        print(json.dumps({"error": f"{name}: {error} (interpreter {sys.executable})"}), file=out, flush=True)
        raise SystemExit(1) from None
    print(json.dumps({"ready": name}), file=out, flush=True)
    serve(engine, sys.stdin, out)


if __name__ == "__main__":
    main()
