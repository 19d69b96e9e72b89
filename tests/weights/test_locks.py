"""Holds: who uses a model, what an orderly end leaves, a load that fails, a store that cannot be written to."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from qwen2.weights.model import load
from qwen2.weights.store import Store
from tests.weights.places import NAME

Spawn = Callable[..., "subprocess.Popen[str]"]
ROOT = Path(__file__).parents[2]
FORK = """
import os, sys
from pathlib import Path
from qwen2.weights.locks import Hold, holders

folder = Path(sys.argv[1])
hold = Hold(folder)
if os.fork() == 0:
    sys.exit()
os.wait()
print(len(list(folder.iterdir())), len(holders(folder)))
"""


def held(store: Store) -> list[str]:
    """What lies in the folder of the holds."""
    return [path.name for path in (store.home / "holds").rglob("*") if path.is_file()]


def test_an_orderly_end_leaves_nothing(store: Store, spawn: Spawn) -> None:
    store.pull(NAME)
    process = spawn("hold")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert len(held(store)) == 2
    process.communicate()
    assert process.returncode == 0
    assert held(store) == []


def test_a_hold_that_nothing_refers_to_has_ended(store: Store) -> None:
    store.pull(NAME)
    hold = store.hold(NAME)
    assert len(held(store)) == 2
    del hold
    assert held(store) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on Windows")
def test_the_end_of_a_forked_child_ends_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", FORK, str(tmp_path)], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "2 1\n"
    assert list(tmp_path.iterdir()) == []


def test_a_load_that_fails_holds_nothing(store: Store) -> None:
    store.pull(NAME)
    with pytest.raises(ValueError) as error:
        load(NAME, home=store.home)
    assert held(store) == []
    assert error.tb is not None  # which refers to everything that load() had
    store.remove(NAME)


def test_a_store_on_a_read_only_file_system(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model = store.pull(NAME)

    def refuse(code: int) -> None:
        def acquire(*_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(FileLock, "acquire", acquire)

    for code in (errno.EROFS, errno.EACCES):
        refuse(code)
        assert store.open(NAME)[:2] == (model.path, NAME)
    refuse(errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        store.open(NAME)
