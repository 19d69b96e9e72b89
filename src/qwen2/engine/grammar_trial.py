"""A grammar compiled once in a process that can be stopped, before the engine's own process compiles it. Started by path by grammar.py.

The library's limits count most of its work, not all: thirty terminals joined by `&` kept it busy for minutes, and what goes wrong in
native code may end the process. So a grammar that somebody else wrote is first tried here, with 256 tokens of one byte and the two
brackets of calls, under limits of time and memory. Knows nothing of the rest of qwen2.

Its time is the processor's, so that it is the same on a busy machine; by the clock it has WAIT times as much.

Protocol: {"grammar", "limits", "seconds", "memory"} in, {"error"} out, empty where there is none.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys

if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != os.path.dirname(os.path.abspath(__file__))]

import llguidance

WAIT = 5


class Bytes:
    """A vocabulary of single bytes, one token that ends, and the two that open and close a call."""

    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>", b"<tool_call>", b"</tool_call>")
    special_token_ids = (256, 257, 258)
    eos_token_id = 256
    bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        """Ids of bytes."""
        return list(text)


def main() -> None:
    job = json.loads(sys.stdin.readline())
    waits = WAIT if hasattr(signal, "setitimer") else 1
    faulthandler.dump_traceback_later(waits * job["seconds"], exit=True)  # in C: ends this process even if the parent is gone
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, job["seconds"])  # its signal ends the process
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (job["memory"], job["memory"]))
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), n_vocab=259, eos_token=256)
    matcher = llguidance.LLMatcher(tokenizer, job["grammar"], log_level=0, limits=llguidance.LLParserLimits(**job["limits"]))
    if not matcher.is_error():
        matcher.compute_bitmask()
    print(json.dumps({"error": matcher.get_error()}))


if __name__ == "__main__":
    main()
