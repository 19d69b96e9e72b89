"""`qwen2 rm`: remove models from the store."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from qwen2.weights.pull import human_size
from qwen2.weights.store import Store


def rm(*names: Annotated[str, Parameter(show_default=False)]) -> None:
    """Remove models, or what an interrupted pull has left of them. One that a process is using stays.

    Parameters
    ----------
    names
        Names as qwen2 list shows them.
    """
    if not names:
        raise ValueError("name the models to remove: qwen2 list shows them")
    store = Store()
    for name in names:
        store.check_removable(name)
    for name in dict.fromkeys(names):
        freed = store.remove(name)
        print(f"removed {name}: {human_size(freed)} freed")
