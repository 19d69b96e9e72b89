"""How long `qwen2 run` takes from the call to its first character, nothing running before; beside it what importing torch takes alone.

Alternating, medians; the file and the libraries are in the system's cache. Left out: a cold disk.

    python bench/start.py [--model qwen2.5-coder:0.5b] [--rounds 9]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median


def first_byte(command: list[str]) -> float:
    """Seconds until the program has written something."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise SystemExit(f"{' '.join(command)}: wrote nothing")
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder:0.5b")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    commands = {
        "qwen2 run, to the first character": ["-m", "qwen2", "run", args.model, "Say hello.", "--max-tokens", "4"],
        "python -c 'import torch'": ["-c", "import torch; print(1)"],
        "python -c pass": ["-c", "print(1)"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(args.rounds + 1):
        for name, rest in commands.items():
            taken = first_byte([sys.executable, *rest])
            seconds[name] += [taken] if number else []  # the first round warms the system's cache
    for name, found in seconds.items():
        print(f"{name}: {median(found):.2f} s, from {min(found):.2f} to {max(found):.2f}")


if __name__ == "__main__":
    main()
