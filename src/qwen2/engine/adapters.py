"""An engine's adapters: read once for all models that have the same one, and gone with the last of these.

adapter = engine.adapters.load(Path("adapter"))       # what PEFT writes; `Request.adapter` of the requests that shall have it
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from qwen2.model.adapted import ServedAdapter
from qwen2.weights.adapter import adapters_for, digest_of, read_adapter

if TYPE_CHECKING:
    from qwen2.model import Qwen2


class Adapters:
    """Those of one network."""

    def __init__(self, network: Qwen2) -> None:
        self.network = network
        self._there: WeakValueDictionary[str, ServedAdapter] = WeakValueDictionary()  # by digest
        self._turn = threading.Lock()

    def load(self, folder: str | Path) -> ServedAdapter:
        """The adapter of a folder. FileNotFoundError or ValueError in one line: what is wrong with it, or that it is another model's."""
        folder = Path(folder).expanduser()
        with self._turn:
            saved = read_adapter(folder)
            digest = digest_of(folder)
            found = self._there.get(digest)
            if found is None:
                found = self._there[digest] = ServedAdapter(self.network, adapters_for(self.network, saved), folder.name, digest)
            return found

    @property
    def nbytes(self) -> int:
        """Memory of all of them."""
        return sum(adapter.nbytes for adapter in list(self._there.values()))
