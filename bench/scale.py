"""The tables of docs/scale.md: plans for the five sizes, and the same formulas beside published runs.

python bench/scale.py            # writes them into docs/scale.md, between its markers
python bench/scale.py --check    # only says whether they are up to date
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen2.config import FAMILY, ModelConfig, MoEConfig
from qwen2.train.hardware import GIB, GPUS
from qwen2.train.layout import Layout
from qwen2.train.plan import Job, Plan, best, plans

DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"
SIZES = ("0.5b", "1.5b", "7b", "57b-a14b", "72b")


OLMOE = ModelConfig(50304, 16, 2048, 16, 16, 1024, context=1 << 20, moe=MoEConfig(64, 8, 1024, shared_ffn=1))  # which has no shared expert


def shape(vocab: int, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, tied: bool = False) -> ModelConfig:
    return ModelConfig(vocab, layers, hidden, heads, kv_heads, ffn, context=1 << 20, tied=tied)


def mpt(layers: int, hidden: int) -> ModelConfig:
    """MPT's feed-forward part has two matrices of width 4 D; three of width 8/3 D are as many parameters and FLOPs."""
    return shape(50368, layers, hidden, hidden // 128, hidden // 128, 8 * hidden // 3, tied=True)


MODELS = {
    "MPT 1B": mpt(24, 2048),
    "MPT 7B": mpt(32, 4096),
    "MPT 13B": mpt(40, 5120),
    "MPT 30B": mpt(48, 7168),
    "MPT 70B": mpt(80, 8192),
    "Llama 2 13B": shape(32000, 40, 5120, 40, 40, 13824),
    "Llama 2 70B": shape(32000, 80, 8192, 64, 8, 28672),
    "Llama 3 70B": shape(128256, 80, 8192, 64, 8, 28672),
    "Llama 3.1 405B": shape(128256, 126, 16384, 128, 8, 53248),
    "Llama 3.1 8B": shape(128256, 32, 4096, 32, 8, 14336),
    "OLMoE 1B-7B": OLMOE,
    "OLMoE's dense one": shape(50304, 16, 2048, 16, 16, 8192),
}
SLOWER_H100 = replace(GPUS["h100"], hbm=2.4e12)  # of torchtitan's cluster: HBM2e, 500 W


@dataclass(frozen=True)
class Published:
    """A measured run: sequences of `length` tokens, `micro` at a time, `times` micro-batches a step; tokens/s of one GPU."""

    source: str
    model: str
    gpu: str
    layout: Layout
    length: int
    micro: int
    times: int
    recompute: bool
    rate: int

    def plan(self) -> Plan:
        gpu = SLOWER_H100 if (self.source, self.gpu) == ("T", "h100") else GPUS[self.gpu]
        tokens = self.length * self.micro * self.times * self.layout.data_size
        job = Job(MODELS[self.model], self.layout.ranks, gpu, sequence=self.length, batch_tokens=tokens)
        return Plan(job, self.layout, self.micro, self.recompute)


def fsdp(ranks: int) -> Layout:
    return Layout(data=ranks)


PUBLISHED = [  # M: MosaicML, T: torchtitan (see docs/scale.md)
    Published("M", "MPT 1B", "a100", fsdp(8), 2048, 14, 4, False, 20513),
    Published("M", "MPT 7B", "a100", fsdp(8), 2048, 6, 2, False, 4641),
    Published("M", "MPT 7B", "a100", fsdp(8), 8192, 8, 2, True, 3206),
    Published("M", "MPT 7B", "a100", fsdp(8), 32768, 2, 2, True, 1672),
    Published("M", "MPT 13B", "a100", fsdp(8), 2048, 2, 3, False, 2262),
    Published("M", "MPT 30B", "a100", fsdp(8), 2048, 3, 21, True, 916),
    Published("M", "MPT 70B", "a100", fsdp(32), 2048, 2, 16, True, 373),
    Published("M", "MPT 70B", "a100", fsdp(64), 2048, 8, 4, True, 410),
    Published("T", "Llama 2 13B", "a100", fsdp(64), 4096, 2, 1, False, 2162),
    Published("T", "Llama 2 70B", "a100", fsdp(64), 4096, 2, 1, True, 353),
    Published("T", "Llama 3 70B", "a100", fsdp(64), 8192, 1, 1, True, 331),
    Published("M", "MPT 1B", "h100", fsdp(64), 2048, 20, 1, False, 44402),
    Published("M", "MPT 7B", "h100", fsdp(8), 2048, 6, 1, False, 10643),
    Published("M", "MPT 7B", "h100", fsdp(8), 32768, 2, 2, True, 3318),
    Published("M", "MPT 13B", "h100", fsdp(64), 2048, 2, 1, False, 4800),
    Published("M", "MPT 30B", "h100", fsdp(32), 2048, 14, 3, True, 2308),
    Published("M", "MPT 70B", "h100", fsdp(32), 2048, 2, 16, True, 882),
    Published("M", "MPT 70B", "h100", fsdp(64), 2048, 8, 4, True, 1039),
    Published("T", "Llama 3.1 405B", "h100", Layout(data=16, tensor=8), 8192, 2, 1, True, 109),
]


BEYOND = [  # what the formulas were not fitted to; O: OLMoE
    Published("O", "OLMoE's dense one", "h100", fsdp(128), 4096, 8, 1, False, 37500),
    Published("O", "OLMoE 1B-7B", "h100", fsdp(128), 4096, 8, 1, False, 23600),
    Published("T", "Llama 3.1 8B", "h100", fsdp(8), 32768, 1, 1, True, 3890),
    Published("T", "Llama 3.1 8B", "h100", Layout(data=4, context=2), 65536, 1, 1, True, 2540),
    Published("T", "Llama 3.1 8B", "h100", Layout(data=2, context=4), 131072, 1, 1, True, 1071),
    Published("T", "Llama 3.1 8B", "h100", Layout(data=1, context=8), 262144, 1, 1, True, 548),
]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def deviations(runs: Sequence[Published] = PUBLISHED) -> list[float]:
    """Counted by published tokens/s, less one."""
    return [run.plan().tokens_per_second / run.layout.ranks / run.rate - 1 for run in runs]


def published_table(runs: Sequence[Published]) -> str:
    head = ["run", "GPUs", "layout", "sequence", "at a time", "recomputed", "published tokens/s a GPU", "counted", "deviation", "memory"]
    rows = []
    for run, deviation in zip(runs, deviations(runs), strict=True):
        plan = run.plan()
        ways = [run.model + f" [{run.source}]", f"{run.layout.ranks} {run.gpu}", str(run.layout), f"{run.length:,}", str(run.micro)]
        counted = f"{plan.tokens_per_second / run.layout.ranks:,.0f}"
        again = "yes" if run.recompute else "no"
        rows.append([*ways, again, f"{run.rate:,}", counted, f"{deviation:+.0%}", f"{plan.memory / GIB:.0f} GiB"])
    sizes = [abs(deviation) for deviation in deviations(runs)]
    mean = f"The median deviation is {statistics.median(sizes):.0%}, the largest {max(sizes):.0%}."
    return f"{table(head, rows)}\n\n{mean}"


def plan_row(size: str, gpus: int, sequence: int) -> list[str]:
    job = Job(FAMILY[f"qwen2:{size}"].config, gpus, GPUS["h100"], sequence=sequence)
    found = plans(job)
    plan = best(found)
    if plan is None:
        return [size, f"{gpus:,}", "none fits", "", "", f"{found[0].memory / GIB:.1f}", *[""] * (len(HEAD) - 6)]
    gib = [plan.memory, plan.weights, plan.gradients, plan.optimizer, plan.activations, plan.buffers]
    traffic = [f"{plan.traffic.link / 1e9:,.0f}", f"{plan.traffic.network / 1e9:,.0f}"]
    again = "yes" if plan.recompute else "no"
    speed = [f"{plan.step:.3g}", f"{plan.tokens_per_second:,.0f}", f"{plan.utilisation:.0%}"]
    days = f"{(12 if size == '0.5b' else 4.5 if size == '57b-a14b' else 7) * 1e12 / plan.tokens_per_second / 86400:,.0f}"
    return [size, f"{gpus:,}", str(plan.layout), str(plan.micro), again, *(f"{x / GIB:.1f}" for x in gib), *traffic, *speed, days]


HEAD = ["size", "GPUs", "layout", "at a time", "recomputed", "GiB a GPU", "weights", "gradients", "optimizer", "activations", "buffers"]
HEAD += ["NVLink GB", "network GB", "s a step", "tokens/s", "MFU", "days"]


def plan_table(sequence: int) -> str:
    return table(HEAD, [plan_row(size, gpus, sequence) for size in SIZES for gpus in (8, 64, 1024)])


def hardware_table() -> str:
    head = ["GPU", "TFLOP/s", "memory GiB", "HBM TB/s", "NVLink GB/s", "network GB/s", "products reach", "attention reaches"]
    rows = []
    for name, gpu in GPUS.items():
        peaks = [f"{gpu.flops / 1e12:g}", f"{gpu.memory / GIB:.0f}", f"{gpu.hbm / 1e12:g}", f"{gpu.link / 1e9:g}", f"{gpu.network / 1e9:g}"]
        rows.append([name, *peaks, f"{gpu.products:.0%}", f"{gpu.attention:.0%}"])
    return table(head, rows)


def tables() -> dict[str, str]:
    """The generated parts of the document, by the name in their marker."""
    return {
        "hardware": hardware_table(),
        "published": published_table(PUBLISHED),
        "beyond": published_table(BEYOND),
        "plans-4096": plan_table(4096),
        "plans-32768": plan_table(32768),
    }


def filled(text: str) -> str:
    """The document with every marked part made anew. Raises ValueError for a marker without a table and a table without a marker."""
    made = tables()
    marked = re.findall(r"<!-- (\S+): python bench/scale.py -->", text)
    if sorted(marked) != sorted(made):
        raise ValueError(f"{DOCUMENT.name} has markers for {sorted(marked)}, bench/scale.py makes {sorted(made)}")
    for name, part in made.items():
        pattern = rf"(<!-- {name}: python bench/scale.py -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match, part=part: f"{match[1]}{part}\n{match[2]}", text, flags=re.DOTALL)
    return text


def main() -> int:
    text = DOCUMENT.read_text(encoding="utf-8")
    made = filled(text)
    if "--check" in sys.argv[1:]:
        print(f"{DOCUMENT.name}: {'as it should be' if made == text else 'not up to date: run python bench/scale.py'}")
        return int(made != text)
    DOCUMENT.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
