"""What a loaded model is and where it computes, in the words that people see. Imports torch only where a model is asked about.

about(llm).place        # "cpu, 2 threads"
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qwen2.config import GenerationDefaults

if TYPE_CHECKING:
    from qwen2.engine.llm import LLM


@dataclass(frozen=True)
class About:
    """Of one model. `system` and `template` are those that are used where nobody asks for others."""

    name: str
    where: str  # its files
    shape: str
    weight_format: str
    dtype: str
    place: str
    computing: str
    window: int
    system: str | None
    template: str
    generation: GenerationDefaults

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> About:
        """What `to_json` gave."""
        stated = values["generation"].items()
        given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in stated}
        return cls(**{**values, "generation": GenerationDefaults(**given)})


def about(llm: LLM) -> About:
    """What there is to say of it."""
    model, config, template = llm.model, llm.model.config, llm.template
    kind = f"mixture of {config.moe.experts} experts" if config.moe is not None else "dense"
    return About(
        name=model.name,
        where=str(model.path),
        shape=f"{config.parameters() / 1e9:.2f} billion parameters, {config.layers} layers, {kind}",
        weight_format=model.weight_format if llm.adapter is None else f"{model.weight_format} with an adapter of rank {llm.adapter.rank}",
        dtype=str(model.dtype).removeprefix("torch."),
        place=_place(llm),
        computing=_computing(llm),
        window=llm.window if llm.generation.context is None else min(llm.window, llm.generation.context),
        system=template.default_system if model.made.system is None else model.made.system,
        template=template.source if template.source is not None else f"built in: {template.style}",
        generation=llm.generation,
    )


def _place(llm: LLM) -> str:
    import torch

    from qwen2 import kernels

    device = llm.model.device
    if device.type != "cpu":
        return str(device)
    pool = kernels.threads() if llm.model.network.packed else None
    return f"{device}, {torch.get_num_threads() if pool is None else pool} threads"


def _computing(llm: LLM) -> str:
    from qwen2 import kernels

    model, runner = llm.model, llm.engine.runner
    if runner.native:
        return f"{model.weight_format} by kernels for {kernels.isa_of(runner.lanes)}, cache of {runner.cache_bits} bits"
    return f"torch in {str(model.dtype).removeprefix('torch.')} from {model.weight_format}"


def peak_memory(device: str) -> str:
    """The most memory that this process, and the accelerator where there is one, has held."""
    parts = []
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        parts.append(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB")
    if device.startswith("cuda"):
        import torch

        parts.append(f"on the GPU {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    return ", ".join(parts)
