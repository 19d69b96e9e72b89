"""The reference model's log-probabilities: computed once, kept beside the run, computed again where they are of something else.

RUN/reference.safetensors holds a number for each answer of the data, the sum over its tokens, and says what they are of: a sha256 of the
model's weights, one of the data, what products were computed in. Only what a run comes to read is computed; where it later reads more,
that is added. A long pass is written down on its way, so that a killed run does not begin again.

What is left out: the run's model itself, which is the reference before its first step, and its base under the adapter ever after.

    sums = Reference(Path("run"), of, items).sums(network, indices, compute, say)        # (n, 2)
"""

# n items

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from torch import Tensor

FILE = "reference.safetensors"
OFTEN = 256  # groups between two writings


class Reference:
    """The numbers of one run; `of` names what they are of: {"model": sha256, "data": sha256, "computed in": type}."""

    def __init__(self, folder: Path, of: Mapping[str, str], shape: tuple[int, int]) -> None:
        self.path, self.of = folder / FILE, dict(of)
        self.sums = torch.full(shape, torch.nan)

    def read(self, say: Callable[[str], None]) -> None:
        """Take what is there, if it is of the same; else say why not."""
        if not self.path.exists():
            return
        try:
            with safe_open(self.path, "pt") as file:
                written, sums = file.metadata() or {}, file.get_tensor("sums")
        except (SafetensorError, OSError) as error:
            say(f"{self.path}: cannot be read ({error}); computed again")
            return
        other = [name for name in self.of if written.get(name) != self.of[name]]
        if other:
            say(f"{self.path}: of other {' and '.join(other)}; computed again")
        elif sums.shape != self.sums.shape:
            say(f"{self.path}: of {len(sums):,} answers instead of {len(self.sums):,}; computed again")
        else:
            self.sums = sums

    def missing(self, wanted: Sequence[int]) -> list[int]:
        """Which of these items have no numbers yet, each once."""
        there = ~self.sums.isnan().any(1)
        return [index for index in dict.fromkeys(wanted) if not there[index]]

    def fill(self, wanted: Sequence[int], compute: Callable[[Sequence[int]], Tensor], keep: bool = True) -> None:
        """Compute what is missing of these items, and write it down (`keep`); `compute` gives numbers (n, 2) for n items."""
        missing = self.missing(wanted)
        for start in range(0, len(missing), OFTEN):
            part = missing[start : start + OFTEN]
            self.sums[torch.tensor(part)] = compute(part).to(self.sums.dtype).cpu()
            if keep:
                self.write()

    def write(self) -> None:
        """Under a temporary name, then renamed."""
        draft = self.path.with_name(f".{self.path.name}.part")
        save_file({"sums": self.sums}, draft, metadata=self.of)
        os.replace(draft, self.path)
