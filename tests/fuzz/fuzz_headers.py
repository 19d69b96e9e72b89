"""Mutation fuzzing of the GGUF and safetensors headers: clear errors only, no crash, no hang, no memory beyond the file's size.

Each round takes a good file, changes it in one to four places (bits, integers known to hurt, cuts, copies, splices, JSON tokens)
and reads it. Only ValueError may come out (FileNotFoundError where a mutation claims a split file); memory is traced, and the
process limits its own address space. What is accepted is followed further: extents must lie inside the file and, for GGUF, the
configuration reader must answer or refuse. What is left out: coverage guidance; seeds are chosen by hand instead.

    python -m tests.fuzz.fuzz_headers --rounds 200000          # prints counts, the longest time and the highest peak
"""

from __future__ import annotations

import argparse
import json
import random
import re
import struct
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qwen2.config.gguf import config_from_gguf, config_to_gguf
from qwen2.config.model import ModelConfig, MoEConfig, RopeScaling
from qwen2.weights.gguf import GGUFFile
from qwen2.weights.safetensors_header import read_safetensors_header

CONSTANT = 4 << 20  # bytes a reader may take beside the file's size
INTEGERS = [0, 1, 2, 7, 8, 9, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
JSON_TOKENS = ["null", "-1", "1e400", "NaN", "[]", "{}", '""', '"\\ud800"', str(2**62), "9" * 5000, "true", "[" * 2000, '"F4"', "0.5", ":"]


@dataclass
class Report:
    """What happened over all rounds."""

    rounds: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by kind of file
    reasons: set[str] = field(default_factory=set)
    longest: float = 0.0
    highest: int = 0  # traced bytes above the file's size


def gguf_seeds() -> list[bytes]:
    """Small good files: dense with YaRN, MoE, one of a split pair, and one of every value type."""
    shape = {"vocab": 32, "layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1, "ffn": 32}
    moe = MoEConfig(experts=2, active=1, expert_ffn=32, shared_ffn=32)
    configs = [ModelConfig(**shape, rope_scaling=RopeScaling(4.0, 64)), ModelConfig(**shape, moe=moe, tied=True)]
    extra = {"tokenizer.ggml.tokens": ["a", "bc", "\u5343"], "tokenizer.ggml.scores": [0.5, 1.0], "tokenizer.ggml.eos_token_id": 2}
    files = [_gguf(config, extra) for config in configs]
    split = {"split.no": 0, "split.count": 2, "split.tensors.count": 20, "general.alignment": 64}
    return [*files, _gguf(configs[0], split | {"flag": True, "words": [""] * 9, "numbers": list(range(50))})]


def _gguf(config: ModelConfig, extra: dict[str, object]) -> bytes:
    from qwen2.config.gguf import gguf_shapes

    metadata = config_to_gguf(config, "seed") | extra
    alignment = metadata.get("general.alignment", 32)
    assert isinstance(alignment, int)
    head, rows, offset = b"".join(_pair(key, value) for key, value in metadata.items()), b"", 0
    shapes = gguf_shapes(config)
    for name, lengths in shapes.items():
        kind, block, size = (8, 32, 34) if len(lengths) > 1 else (0, 1, 4)
        weights = 1
        for length in lengths:
            weights *= length
        rows += _text(name) + struct.pack(f"<I{len(lengths)}QIQ", len(lengths), *reversed(lengths), kind, offset)
        offset += -(-weights // block * size // alignment) * alignment
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(metadata)) + head + rows
    return head + bytes(-len(head) % alignment + offset)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _pair(key: str, value: object) -> bytes:
    if isinstance(value, list):
        kind = 8 if isinstance(value[0], str) else 6 if isinstance(value[0], float) else 5
        items = b"".join(_text(item) if kind == 8 else struct.pack("<f" if kind == 6 else "<i", item) for item in value)
        return _text(key) + struct.pack("<IIQ", 9, kind, len(value)) + items
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", 8) + _text(value)
    kind, code = (7, "?") if isinstance(value, bool) else (4, "I") if isinstance(value, int) else (6, "f")
    return _text(key) + struct.pack("<I" + code, kind, value)


def safetensors_seeds() -> list[bytes]:
    """Good files of no, one and several tensors, with metadata and without."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, size in (("a.weight", "F32", [4, 8], 128), ("b", "BF16", [3], 6), ("c", "I64", [], 8), ("d", "F16", [0, 2], 0)):
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    one = {"x": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}}
    texts = ((json.dumps(entries), at), (json.dumps(one, separators=(",", ":")) + "  ", 16), ("{}", 0))
    return [struct.pack("<Q", len(text)) + text.encode() + bytes(data) for text, data in texts]


def mutate(data: bytes, seeds: list[bytes], random: random.Random, tokens: bool) -> bytes:
    """One to four changes; half of them in the first 200 bytes, where the counts are."""
    result = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(min(len(result), 200 if random.random() < 0.5 else len(result)) or 1)
        kind = random.randrange(8 if tokens else 7)
        if kind == 0 and result:
            result[min(at, len(result) - 1)] ^= 1 << random.randrange(8)
        elif kind == 1:
            width = random.choice((4, 8))
            value = random.choice(INTEGERS) + random.choice((-1, 0, 0, 1))
            result[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 2:
            del result[at:]
        elif kind == 3:
            del result[at : at + random.randint(1, 40)]
        elif kind == 4:
            result[at:at] = random.randbytes(random.randint(1, 40))
        elif kind == 5:
            piece = result[at : at + random.randint(1, 200)]
            result[at:at] = piece * random.choice((1, 1, 2, 50))
        elif kind == 6:
            other = random.choice(seeds)
            cut = random.randrange(len(other))
            result[at:] = other[cut if random.random() < 0.5 else min(at, len(other)) :]
        else:
            result = _swap_token(result, random)
    return bytes(result)


def _swap_token(data: bytearray, random: random.Random) -> bytearray:
    """Replace one JSON token of the header, and keep the stated length right, so that the change is reached."""
    length = int.from_bytes(data[:8], "little")
    found = list(re.finditer(rb'"[^"]*"|\d+|[\[\]{}:,]', data[8 : 8 + min(length, 5000)]))
    if not found or length > len(data):
        return data
    place = random.choice(found)
    choices = [*(token.encode() for token in JSON_TOKENS), bytes(random.choice(found)[0]), b""]
    body = data[8 : 8 + place.start()] + random.choice(choices) + data[8 + place.end() : 8 + length]
    return bytearray(struct.pack("<Q", len(body)) + body + data[8 + length :])


def read_gguf(path: Path) -> None:
    size = path.stat().st_size
    with GGUFFile.open(path) as file:
        assert all(0 < info.offset <= info.offset + info.nbytes <= size for info in file.tensors.values())
        config_from_gguf(file.metadata, {name: info.shape for name, info in file.tensors.items()})


def read_safetensors(path: Path) -> None:
    size = path.stat().st_size
    assert all(8 <= extent.start <= extent.stop <= size for extent in read_safetensors_header(path).values())


def run(rounds: int, seed: int, folder: Path, accepted: Callable[[str, Path], None] | None = None) -> Report:
    """`rounds` mutated files, half of each kind; `accepted(kind, path)` is called for those that were read without an error.

    Raises whatever a reader raises that it should not, with the file left in `folder`.
    """
    generator, report = random.Random(seed), Report()
    kinds = (("gguf", gguf_seeds(), read_gguf), ("safetensors", safetensors_seeds(), read_safetensors))
    for _, seeds, read in kinds:  # the seeds themselves are good, but for the missing part of the split one
        for data in seeds[:2]:
            (folder / "seed").write_bytes(data)
            read(folder / "seed")
    tracemalloc.start()
    try:
        for i in range(rounds):
            kind, seeds, read = kinds[i % 2]
            path = folder / f"model-00001-of-00002.{kind}"
            path.write_bytes(mutate(generator.choice(seeds), seeds, generator, kind == "safetensors"))
            if _one_round(report, kind, path, read) and accepted is not None:
                accepted(kind, path)
    finally:
        tracemalloc.stop()
    return report


def _one_round(report: Report, kind: str, path: Path, read: Callable[[Path], None]) -> bool:
    report.rounds += 1
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    start = time.perf_counter()
    error: Exception | None = None
    try:
        read(path)
    except (ValueError, FileNotFoundError) as raised:
        error = raised
    report.longest = max(report.longest, time.perf_counter() - start)
    above = tracemalloc.get_traced_memory()[1] - before - path.stat().st_size
    report.highest = max(report.highest, above)
    assert above < CONSTANT, f"{path}: {above} bytes above the file's size"
    if error is None:
        report.accepted += 1
        return True
    assert "\n" not in str(error), f"an error of more than one line: {error}"
    report.refused[kind] += 1
    report.reasons.add(re.sub(r"'.*?'|\".*?\"|\d+|b'.*'", "*", str(error).replace(str(path), ""))[:60])
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    except ImportError:
        print("no address space limit on this system")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = run(options.rounds, options.seed, Path(folder))
    print(
        f"{report.rounds} mutated headers (seed {options.seed}): {report.refused['gguf']} GGUF and {report.refused['safetensors']} "
        f"safetensors refused with one line each, {len(report.reasons)} different reasons, {report.accepted} still well-formed; "
        f"longest {report.longest * 1000:.1f} ms, highest peak {report.highest / 1024:.0f} KiB above the file's size, "
        f"{time.perf_counter() - start:.0f} s in all"
    )


if __name__ == "__main__":
    main()
