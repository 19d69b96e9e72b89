"""Two libraries for structured output on a real tokenizer: llguidance, which is used, and xgrammar where it is installed.

Prints Markdown: what they cost (their data from our tokenizer, schemas of growing size, masks over JSON texts token by token, memory),
and which keywords of JSON Schema each enforces, refuses or ignores. Times are of one process in which the libraries alternate;
memory is of a process for each. Left out: grammars in other notations, batches.

    pip install --target build/xgrammar --no-deps xgrammar==0.2.8 apache-tvm-ffi       # it needs transformers too, which the tests have
    PYTHONPATH=build/xgrammar python bench/grammar.py [--model qwen2.5-coder:0.5b]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from peer.schemas import FEATURES, SCHEMAS, TEXTS

from qwen2.engine.grammar import JSON_OPTIONS, Vocabulary
from qwen2.tokenizer import Tokenizer
from qwen2.weights.gguf import GGUFFile
from qwen2.weights.store import Store


class LLGuidance:
    """As engine/grammar.py uses it, but for our own checks."""

    name = "llguidance"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size)

    def compile(self, schema: Any) -> Any:
        from llguidance import LLMatcher

        matcher = LLMatcher(
            self.vocabulary.library, LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS), log_level=0
        )
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def begin(self, compiled: Any) -> Any:
        return compiled.deep_copy()

    def mask(self, matcher: Any) -> None:
        matcher.compute_bitmask()

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.try_consume_tokens([token]))

    def may_end(self, matcher: Any) -> bool:
        return bool(matcher.is_accepting())


class XGrammar:
    """With white space bounded as ours is."""

    name = "xgrammar"

    def __init__(self, tokenizer: Tokenizer) -> None:
        import xgrammar

        size = tokenizer.vocab_size
        tokens = [b"" if tokenizer.is_control(i) else tokenizer.token_bytes(i) for i in range(size)]
        self.ends = list(tokenizer.eos)
        info = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, vocab_size=size, stop_token_ids=self.ends)
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=2, cache_enabled=False)
        self.bits = xgrammar.allocate_token_bitmask(1, size)

    def compile(self, schema: Any) -> Any:
        return self.compiler.compile_json_schema(json.dumps(schema), max_whitespace_cnt=20, strict_mode=False)

    def begin(self, compiled: Any) -> Any:
        import xgrammar

        return xgrammar.GrammarMatcher(compiled)

    def mask(self, matcher: Any) -> None:
        matcher.fill_next_token_bitmask(self.bits, 0)

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.accept_token(token))

    def may_end(self, matcher: Any) -> bool:
        self.mask(matcher)
        return bool(self.bits[0, self.ends[0] // 32].item() >> self.ends[0] % 32 & 1)


LIBRARIES = {library.name: library for library in (LLGuidance, XGrammar)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder:0.5b", help="a name or a GGUF file, for its tokenizer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=LIBRARIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = Store().resolve(args.model)[0]
    with GGUFFile.open(path) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    if args.memory_of:
        print(memory(LIBRARIES[args.memory_of], tokenizer))
        return
    warm(tokenizer)
    names = [name for name in LIBRARIES if find_spec(name)]
    libraries, rows = {}, {}
    for name in names:
        start = perf_counter()
        libraries[name] = LIBRARIES[name](tokenizer)
        rows[name] = [f"{perf_counter() - start:.2f} s"]
    print(f"{path.name}, {tokenizer.vocab_size:,} tokens, medians of {args.rounds} rounds\n")
    costs(libraries, tokenizer, rows, args)
    features(libraries, tokenizer)


def costs(libraries: dict[str, Any], tokenizer: Tokenizer, rows: dict[str, list[str]], args: argparse.Namespace) -> None:
    labels = ["data from our tokenizer"]
    for label, schema in SCHEMAS.items():
        times: dict[str, list[float]] = {name: [] for name in libraries}
        for _ in range(args.rounds):
            for name, library in libraries.items():
                start = perf_counter()
                library.mask(library.begin(library.compile(schema)))
                times[name].append(perf_counter() - start)
        labels.append(f"{label}, {len(json.dumps(schema)):,} bytes: compile, first mask")
        for name, found in times.items():
            rows[name].append(f"{1e3 * median(found):.1f} ms")
    masks: dict[str, list[float]] = {name: [] for name in libraries}
    for schema, text in TEXTS:
        tokens = tokenizer.encode(json.dumps(text, ensure_ascii=False))
        for name, library in libraries.items():
            compiled = library.compile(schema)
            rounds = [over_text(library, library.begin(compiled), tokens) for _ in range(args.rounds)]
            masks[name] += map(median, zip(*rounds, strict=True))  # of each token, so that the worst is not another process
    labels += [
        f"mask and step, mean of {len(next(iter(masks.values()))):,}",
        "its 99th percentile",
        "its worst",
        "memory, with the schemas",
    ]
    for name, found in masks.items():
        found.sort()
        rows[name] += [f"{1e6 * value:.0f} us" for value in (mean(found), found[len(found) * 99 // 100], found[-1])]
        rows[name].append(f"{in_a_process(name, args.model)} MiB")
    table(labels, rows)


def over_text(library: Any, matcher: Any, tokens: list[int]) -> list[float]:
    times = []
    for token in tokens:
        start = perf_counter()
        library.mask(matcher)
        accepted = library.accept(matcher, token)
        times.append(perf_counter() - start)
        if not accepted:
            raise ValueError(f"{library.name} refuses token {len(times) - 1} of a text that is valid")
    return times


def warm(tokenizer: Tokenizer) -> None:
    """What both libraries ask of the tokenizer is in its memory then."""
    for i in range(tokenizer.vocab_size):
        tokenizer.token_bytes(i)


def memory(library: Any, tokenizer: Tokenizer) -> int:
    """MiB that the library adds to a process that has the tokenizer."""
    warm(tokenizer)
    before = resident()
    made = library(tokenizer)
    kept = [made.begin(made.compile(schema)) for schema in SCHEMAS.values()]
    for matcher in kept:
        made.mask(matcher)
    return (resident() - before) >> 20


def resident() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096


def in_a_process(name: str, model: str) -> str:
    command = [sys.executable, __file__, "--memory-of", name, "--model", model]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def features(libraries: dict[str, Any], tokenizer: Tokenizer) -> None:
    labels, rows = [], {name: list[str]() for name in libraries}
    for label, schema, valid, invalid in FEATURES:
        labels.append(label)
        for name, library in libraries.items():
            rows[name].append(verdict(library, tokenizer, schema, valid, invalid))
    print()
    table(labels, rows)


def verdict(library: Any, tokenizer: Tokenizer, schema: Any, valid: str, invalid: str) -> str:
    try:
        compiled = library.compile(schema)
    except (ValueError, RuntimeError) as error:
        return "refused" if "panic" not in str(error) else "panic"
    takes = [takes_text(library, library.begin(compiled), tokenizer.encode(text)) for text in (valid, invalid)]
    return {(1, 0): "enforced", (1, 1): "IGNORED", (0, 0): "too strict", (0, 1): "WRONG"}[takes[0], takes[1]]


def takes_text(library: Any, matcher: Any, tokens: list[int]) -> bool:
    return all(library.accept(matcher, token) for token in tokens) and library.may_end(matcher)


def table(labels: list[str], rows: dict[str, list[str]]) -> None:
    print("| | " + " | ".join(rows) + " |\n|---|" + "---|" * len(rows))
    for label, *cells in zip(labels, *rows.values(), strict=True):
        print(f"| {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
