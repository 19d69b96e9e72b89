"""Ours beside llama.cpp, transformers, CTranslate2 and OpenVINO: one run, the same file, alternating, medians of several rounds.

Each engine lives in a process of its own, and one works at a time; every measurement has a fresh random prompt, the same for all, so
that no cache helps. Load and peak memory come from processes started for them: load to the first token with the interpreter and the
imports done, then a prompt of 512 and 64 tokens. llama.cpp runs with flash attention on and off, the better one counts. An engine
that cannot read the file (transformers, CTranslate2) runs the same weights, widened or converted. What is left out: quality
(quality.py), and our own speed by length, depth and format (`qwen2 bench`).

    bench/setup_peers.sh; python bench/peers.py                                # table, picture and raw figures into bench/results/
    python bench/peers.py --quick --peers ours,llama.cpp --llama-cpp VENV/bin/python
    python bench/peers.py --isa avx2 --llama-cpp VENV_OF_AN_AVX2_BUILD/bin/python

What setup_peers.sh built is used where no other place is given. A VENV of one's own has llama-cpp-python built from source, by
CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python; for --isa avx2 CMAKE_ARGS is
"-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON", and for --isa avx512 the same with
-DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON.
CTranslate2's folder: qwen2 export MODEL HF; ct2-transformers-converter --model HF --quantization int8 --output_dir FOLDER.
OpenVINO reads GGUF files of type Q8_0 and Q4_0 (no Q5_0, so no Q4_K_M of the 0.5B), or a folder that optimum-intel wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from peer.machine import command_line, cpu_seconds, processor, read_ceiling
from peer.process import HERE, Worker, interpreter
from peer.report import document, medians, picture, table

import qwen2
from qwen2 import kernels
from qwen2.config import ModelConfig
from qwen2.weights.gguf_header import read_header
from qwen2.weights.store import Store

MODEL = "qwen2.5-coder:0.5b"
KINDS = ("prefill", "decode", "streams", "load", "peak")
COLUMNS = ("ours", "llama.cpp", "transformers-fp32", "transformers-bf16", "ctranslate2", "openvino")
VARIANTS = {"llama.cpp": ("fa", "nofa")}
STREAM_PROMPT = 32
OURS = Path(qwen2.__file__).parents[1]  # the same installation in the worker as here
HELD = {  # what holds the libraries of other engines to an instruction set
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "CT2_FORCE_CPU_ISA": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512_E3", "CT2_FORCE_CPU_ISA": "AVX512"},  # no AMX
}


class Bench:
    """The workers, the prompts and the samples of one run."""

    def __init__(self, args: argparse.Namespace, model: dict[str, Any]) -> None:
        self.args, self.model = args, model
        self.generator = random.Random(args.seed)
        self.samples: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        self.workers: dict[str, Worker] = {}
        self.about: dict[str, Any] = {}
        self.idle_share = 0.0

    def ids(self, length: int) -> list[int]:
        """Random ids of plain text: no control tokens, no single bytes."""
        return [self.generator.randrange(1000, min(100_000, self.model["vocab"] - 1000)) for _ in range(length)]

    def start(self, column: str) -> Worker:
        args = self.args
        options: dict[str, Any] = {"model": self.model["path"], "threads": args.threads, "isa": args.isa, "context": self.model["context"]}
        environment = dict(HELD.get(args.isa, {}))
        engine, python = column, sys.executable
        if column == "ours":
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OURS), os.environ.get("PYTHONPATH")]))
        elif column == "llama.cpp":
            python, folder = interpreter(args.llama_cpp)
            environment |= {"LLAMA_CPP_LIB_PATH": str(folder)} if folder else {}
        elif column.startswith("transformers"):
            engine, options["dtype"] = "transformers", "float32" if column.endswith("fp32") else "bfloat16"
            options["folder"] = str(args.hf / column)
        else:
            python, options["folder"] = getattr(args, column)
            options["compute"] = "int8"
        return Worker(column, engine, python, options, environment)

    def cold(self, column: str) -> None:
        """Load and peak memory, in a process of its own."""
        worker, variant = self.start(column), VARIANTS.get(column, ("",))[0]
        seconds = worker.ask("load", ids=self.ids(8), variant=variant)["seconds"]
        worker.ask("measure", ids=self.ids(self.args.lengths[0]), tokens=self.args.tokens, variant=variant)
        samples = self.samples[column][variant]
        if "load" in self.args.only:
            samples["load"].append(seconds)
        if "peak" in self.args.only:
            samples["peak"].append(worker.ask("peak")["bytes"])
        worker.close()

    def warm(self, columns: list[str]) -> None:
        """Workers that stay, each measured once for nothing."""
        for column in columns:
            self.workers[column] = self.start(column)
            self.workers[column].ask("load", ids=self.ids(8), variant=VARIANTS.get(column, ("",))[0])
            for variant in VARIANTS.get(column, ("",)):
                self.workers[column].ask("measure", ids=self.ids(64), tokens=4, variant=variant)
            self.about[column] = self.workers[column].ask("about")

    def ask(self, column: str, do: str, **fields: Any) -> dict[str, Any]:
        """One measurement; the others' processor time meanwhile shows whether they sleep."""
        others = [worker.process.pid for name, worker in self.workers.items() if name != column]
        before, start = [cpu_seconds(pid) for pid in others], time.perf_counter()
        answer = self.workers[column].ask(do, **fields)
        passed = time.perf_counter() - start
        for pid, used in zip(others, before, strict=True):
            now = cpu_seconds(pid)
            if used is not None and now is not None and passed > 1:  # the system counts in hundredths of a second
                self.idle_share = max(self.idle_share, (now - used) / passed)
        return answer

    def turn(self, number: int) -> None:
        """One round: every engine on the same prompts; who begins changes."""
        columns = list(self.workers)
        columns = columns[number % len(columns) :] + columns[: number % len(columns)]
        short, *long = self.args.lengths
        plans = [("decode", [self.ids(1)]), ("prefill", [self.ids(short)]), *(("both", [self.ids(length)]) for length in long)]
        plans.append(("streams", [self.ids(STREAM_PROMPT) for _ in range(self.args.streams)]))
        for plan, prompts in plans:
            if not ({"prefill", "decode"} if plan == "both" else {plan}) & set(self.args.only):
                continue
            for column in columns:
                for variant in VARIANTS.get(column, ("",)):
                    self._measure(column, variant, plan, prompts)

    def _measure(self, column: str, variant: str, plan: str, prompts: list[list[int]]) -> None:
        samples, length, tokens = self.samples[column][variant], len(prompts[0]), self.args.tokens
        if plan == "streams":
            answer = self.ask(column, "streams", prompts=prompts, tokens=tokens, variant=variant)
            samples[f"streams {len(prompts)}"].append(answer["tokens"] / answer["seconds"])
            return
        answer = self.ask(column, "measure", ids=prompts[0], tokens=0 if plan == "prefill" else tokens, variant=variant)
        if plan != "decode" and "prefill" in self.args.only:
            samples[f"prefill {length}"].append(length / answer["prefill"])
        if plan != "prefill" and "decode" in self.args.only:
            samples[f"decode {length if plan == 'both' else 0}"].append(tokens / answer["decode"])


def describe(name: str, context: int) -> dict[str, Any]:
    """What the figures need of a model: path, vocabulary, bytes read for a token and for a cached position (fp16)."""
    path, shown = Store().resolve(name)
    if path.suffix != ".gguf":
        raise ValueError(f"{name}: a GGUF file is needed, this is {path}")
    header = read_header(path)
    config = ModelConfig.from_gguf(header.metadata, {name: tensor.shape for name, tensor in header.tensors.items()})
    tied = "output.weight" not in header.tensors
    weights = sum(t.nbytes for t in header.tensors.values() if tied or t.name != "token_embd.weight")
    return {
        "name": shown,
        "file": path.name,
        "path": str(path),
        "vocab": config.vocab,
        "context": context,
        "weight_bytes": None if config.moe else weights,  # of a mixture of experts a token reads a part
        "cache_bytes": config.cache_bytes_per_token(),
    }


def fill_places(args: argparse.Namespace) -> None:
    """What setup_peers.sh left, for flags that are left out: its llama.cpp uses every set of this processor, its weights are the 0.5B's."""
    home = Path(os.environ.get("QWEN2_PEERS", Path(__file__).parents[1] / ".peers"))
    python = home / "others" / "bin" / "python"
    if args.llama_cpp is None and args.isa is None and (home / "llama" / "bin" / "python").exists():
        args.llama_cpp = str(home / "llama" / "bin" / "python")
    for column, weights in (("ctranslate2", "int8"), ("openvino", "q8_0.gguf")):
        if getattr(args, column) is None and args.model == MODEL and python.exists() and (home / weights).exists():
            setattr(args, column, [str(python), str(home / weights)])


def chosen(args: argparse.Namespace) -> list[str]:
    """The columns to run; those that are not here are named. SystemExit for one that is not known or whose flag is missing."""
    fill_places(args)
    given = {"llama.cpp": args.llama_cpp, "ctranslate2": args.ctranslate2, "openvino": args.openvino}
    if args.peers is None:
        missing = [column for column in COLUMNS if not given.get(column, "here")]
        if missing:
            print(f"left out: {', '.join(missing)}; bench/setup_peers.sh sets them up, or say where they are (--help)", file=sys.stderr)
        return [column for column in COLUMNS if column not in missing]
    for column in args.peers:
        if column not in COLUMNS:
            raise SystemExit(f"--peers {column}: unknown; there are {', '.join(COLUMNS)}")
        if not given.get(column, "here"):
            raise SystemExit(f"--peers {column}: say where it is by --{column.replace('.', '-')}")
    return list(args.peers)


def comma(text: str) -> list[str]:
    return text.split(",")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a name or a GGUF file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="left out: 5, or 1 with --quick")
    parser.add_argument("--only", type=comma, default=list(KINDS), help=f"some of {','.join(KINDS)}")
    parser.add_argument("--peers", type=comma, help=f"some of {','.join(COLUMNS)}; left out: all whose place is given")
    parser.add_argument("--llama-cpp", metavar="PATH", help="a Python that has llama_cpp, or a build folder of llama.cpp")
    parser.add_argument("--ctranslate2", nargs=2, metavar=("PYTHON", "FOLDER"))
    parser.add_argument("--openvino", nargs=2, metavar=("PYTHON", "FOLDER_OR_GGUF"))
    parser.add_argument("--hf", type=Path, metavar="FOLDER", help="keeps the exports that transformers reads; left out: made anew")
    parser.add_argument("--isa", choices=("avx2", "avx512"), help="hold every engine to it (llama.cpp must be built so)")
    parser.add_argument("--quick", action="store_true", help="short prompts: whether all works, no figures to keep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the results' files; left out: peers_ and the machine's kind, with the model's if it is another")
    parser.add_argument("--out", type=Path, help="left out: bench/results/ for a full run, nowhere for a part of one")
    args = parser.parse_args()
    unknown = [kind for kind in args.only if kind not in KINDS]
    if unknown:
        parser.error(f"--only {unknown[0]}: unknown; there are {', '.join(KINDS)}")
    if kernels.library() is None:
        parser.error(f"the qwen2 in {OURS} has no native library, so its speed would be torch's: make install, or pip install .")
    args.rounds = (1 if args.quick else 5) if args.rounds is None else args.rounds
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads: at least 1")
    whole = not args.quick and args.peers is None and set(args.only) == set(KINDS)
    args.lengths, args.tokens, args.streams = ((128, 256), 16, 16) if args.quick else ((512, 4096), 64, 16)
    args.out = HERE.parent / "results" if args.out is None and whole else args.out
    return args


def measured(args: argparse.Namespace, columns: list[str]) -> dict[str, Any]:
    """The whole run, as it goes into the raw JSON."""
    cpu, command = processor(), command_line()
    bench = Bench(args, describe(args.model, args.lengths[-1] + args.tokens + 64))
    ceiling = read_ceiling(args.threads)
    for number in range(min(3, args.rounds) if {"load", "peak"} & set(args.only) else 0):
        for column in columns:
            print(f"cold {number + 1}: {column}", file=sys.stderr)
            bench.cold(column)
    if {"prefill", "decode", "streams"} & set(args.only):
        bench.warm(columns)
        for number in range(args.rounds):
            bench.turn(number)
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
            print("\n".join(table(medians(bench.samples))), file=sys.stderr)
    for worker in bench.workers.values():
        worker.close()
    about = {column: bench.about.get(column, {"versions": {}, "notes": "not asked"}) for column in columns}
    shared = {"date": time.strftime("%Y-%m-%d"), "command": command, "threads": args.threads, "rounds": args.rounds, "isa": args.isa}
    model = {key: value for key, value in bench.model.items() if key != "path"}
    return {
        **shared,
        "machine": cpu,
        "model": model,
        "read_ceiling": max(ceiling, read_ceiling(args.threads)),
        "idle_share": bench.idle_share,
        "about": about,
        "samples": bench.samples,
    }


def main() -> None:
    args = arguments()
    columns = chosen(args)
    with tempfile.TemporaryDirectory() as scratch:
        args.hf = Path(scratch) if args.hf is None else args.hf
        args.hf.mkdir(parents=True, exist_ok=True)
        for column, form in (("transformers-fp32", "f32"), ("transformers-bf16", "bf16")):
            if column in columns and not (args.hf / column).exists():
                export = [sys.executable, "-m", "qwen2", "export", args.model, str(args.hf / column), "--to", form]
                if subprocess.run(export, stdout=subprocess.DEVNULL).returncode:
                    raise SystemExit(f"{column}: the export failed")
        try:
            run = measured(args, columns)
        except (ValueError, FileNotFoundError) as error:
            raise SystemExit(str(error)) from None
    text = document(run)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        kind = args.isa if args.isa is not None else run["machine"]["kind"]
        suffix = "" if args.model == MODEL else "_" + Path(run["model"]["file"]).stem.lower()
        stem = args.out / (args.name or f"peers_{kind}{suffix}")
        stem.with_name(stem.name + ".md").write_text(text)
        stem.with_name(stem.name + ".json").write_text(json.dumps(run, indent=1) + "\n")
        picture(run, stem.with_name(stem.name + ".png"))


if __name__ == "__main__":
    main()
