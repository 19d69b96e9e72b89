"""Importing torch without the parts that answering does not need: in about two thirds of the time, and with 20 MiB less.

`import torch` also imports its exporter, the shape functions of its compiler, its probability distributions and its data loaders,
and with them hundreds of modules. Here they are left out; whoever uses one of them, as `torch.export.export` or by an import, has
it imported then. That rests on how torch imports itself, so it is done for the versions it was tested with, and for others torch
is imported as ever. Only the program does this, for an answer or a conversation on the CPU: `import qwen2` never touches how torch
is imported. What is left out: `torch.Generator()` works only after the shape functions have come; a sampler here needs none.

    import_torch()
    import torch
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec

TESTED = ("2.13.",)
COMPILER, SHAPES = "torch._dynamo", "torch._meta_registrations"
LATER = (SHAPES, "torch.export", "torch.distributions", "torch.utils.data")


class Unloaded(ModuleType):
    """What `torch.export` and the like are until something of theirs is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # who looks through all modules, as inspect does, wants none of them
            raise AttributeError(f"{self.__name__} is not loaded: no {name}")
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)  # which also puts the real one into this one's place


class ShapesFirst:
    """Imports torch's shape functions before its compiler, which takes for granted that `import torch` has; finds nothing itself."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == COMPILER:
            import_module(SHAPES)
        return None


def import_torch() -> None:
    """Import torch, leanly, where its version is known to allow that and it is not imported already; else leave it to the next import."""
    if "torch" in sys.modules or not _version().startswith(TESTED):
        return
    left_out = {name: Unloaded(name) for name in LATER}
    sys.modules.update(left_out)
    try:
        import_module("torch")
    finally:
        left = [name for name, stand_in in left_out.items() if sys.modules.get(name) is stand_in]
        for name in left:
            del sys.modules[name]  # from here on, an import is one
    for name in left:
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, left_out[name])
    sys.meta_path.insert(0, ShapesFirst())


def _version() -> str:
    """torch's version as its files have it; empty where there is none."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    return next((line.split("'")[1] for line in text.splitlines() if line.startswith("__version__ = '")), "")
