"""Folders of the store: none is left empty by a removal, and none is missed by who comes at that moment."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwen2.weights import locks
from qwen2.weights.folders import prune
from qwen2.weights.store import Store
from tests.weights.places import FILE, NAME


def test_remove_leaves_no_empty_folders(store: Store) -> None:
    def folders() -> list[str]:
        kinds = [store.home / kind for kind in ("models", "partial", "holds")]
        return sorted(str(path.relative_to(store.home)) for kind in kinds for path in kind.rglob("*"))

    store.pull(NAME)
    store.hold(NAME).release()
    store.copy(NAME, "mine:a")
    store.copy(NAME, "mine:b")
    store.remove(NAME)
    store.remove("mine:a")
    assert folders() == ["models/mine", "models/mine/b", "models/mine/b/manifest.json", f"models/mine/b/{FILE}"]
    store.remove("mine:b")
    assert folders() == []
    assert (store.home / "locks" / "mine--b.lock").exists(), "another process may wait for it"


def test_models_come_and_go_beside_each_other(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family's folder goes with its last model, just when another is on its way into it."""
    store.pull(NAME)
    made = locks.make
    struck = list[Path]()

    def unlucky(folder: Path) -> None:
        made(folder)
        if folder.name == "mine" and folder not in struck:  # models/mine, on the way there
            struck.append(folder)
            prune(folder)

    with monkeypatch.context() as patched:
        patched.setattr("qwen2.weights.folders.make", unlucky)
        assert store.copy(NAME, "mine:a").name == "mine:a"
    assert struck == [store.home / "models" / "mine"]

    def come_and_go(name: str) -> int:
        for _ in range(50):
            store.copy(str(file), name)
            assert store.has(name)
            store.list()
            store.remove(name)
        return 50

    store.remove("mine:a")
    file = store.find(NAME)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(come_and_go, ("mine:a", "mine:b", "mine:c"))) == [50] * 3
    assert [path.name for path in (store.home / "models").iterdir()] == ["tiny"]
