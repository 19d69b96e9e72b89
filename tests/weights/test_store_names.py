"""Which model a name, a folder or a file stands for, what is no model, and what a home must be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen2.weights.store import Store
from tests.weights.places import DATA, NAME


def test_a_name_that_stands_for_nothing_is_told_as_typed(store: Store) -> None:
    with pytest.raises(ValueError, match=r"^no model is named 'qwn2': did you mean qwen2, qwen2\.5\? \(qwen2 list"):
        store.find("qwn2")
    for verb in (store.remove, store.hold):
        with pytest.raises(ValueError, match=r"^no model is named 'qwn2': did you mean qwen2"):
            verb("qwn2")


def test_a_name_a_folder_or_a_file(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = store.pull(NAME)
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "x.gguf").write_bytes(DATA)
    assert store.resolve(NAME) == (model.path, NAME)  # the name wins over a folder called the same
    assert store.resolve(f"./{NAME}") == (Path(NAME), NAME)
    assert store.resolve(Path(NAME)) == (Path(NAME), NAME)
    assert store.resolve("elsewhere") == (Path("elsewhere"), "elsewhere")
    assert store.resolve("x.gguf") == (Path("x.gguf"), "x.gguf")
    with pytest.raises(FileNotFoundError, match=r"^Lab/Foo: no such file or folder; of the hubs' names only those of qwen2 list --all"):
        store.resolve("Lab/Foo")
    for missing in ("./nothing", "y.gguf", str(tmp_path / "nothing")):
        with pytest.raises(FileNotFoundError, match=r"no such file or folder$"):
            store.resolve(missing)
    with pytest.raises(FileNotFoundError, match=r"^qwen2:7b is not pulled yet"):
        store.resolve("Qwen/Qwen2-7B-Instruct")
    with pytest.raises(ValueError, match="no model is named 'nothing"):
        store.resolve("nothing")


def test_a_path_is_not_held(store: Store, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    assert store.open(tmp_path / NAME) == (tmp_path / NAME, NAME, None)
    store.pull(NAME)
    assert store.open(tmp_path / NAME)[2] is None


def test_a_model_given_by_its_path_in_the_store_is_held(store: Store) -> None:
    path = store.pull(NAME).path
    opened, name, hold = store.open(path)
    assert (opened, name) == (path, path.name)
    with pytest.raises(OSError, match=r"^tiny:1b is in use by process"):
        store.remove(NAME)
    assert hold is not None
    hold.release()
    store.remove(NAME)


def test_what_is_no_model(store: Store, tmp_path: Path) -> None:
    for text in ("", "  "):
        for verb in (store.resolve, store.pull, store.get):
            with pytest.raises(ValueError, match=r"^the model's name is empty$"):
                verb(text)
    for text in ("Lab/Foo", "hf.co/Qwen/Qwen2-7B-Instruct", "https://huggingface.co/Lab/Foo"):
        with pytest.raises(ValueError, match=r"^\S+: of the hubs' names only those of qwen2 list --all are known: download"):
            store.pull(text)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"give the folder that it lies in: "):
        store.resolve(str(tmp_path / "model.safetensors"))


def test_a_local_file_replaces_nothing(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    file.write_bytes(DATA)
    with pytest.raises(ValueError, match=r"^mine:latest is no published model's name: run qwen2 cp \S+other.gguf mine:latest"):
        store.pull("mine", local=file)
    store.copy(str(file), "mine")
    with pytest.raises(ValueError, match=r"^mine:latest is there already: run qwen2 rm mine:latest first$"):
        store.pull("mine", local=file)
    assert not store.get("mine").gone
    file.unlink()
    assert store.get("mine").gone


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="set QWEN2_HOME to another folder") as error:
        Store(tmp_path / "file" / "home").pull("qwen2:7b")
    assert str(error.value.strerror).startswith(f"{tmp_path / 'file' / 'home'}: the models' folder cannot be made")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_shared_for_reading(store: Store) -> None:
    store.pull(NAME)
    for folder in (store.home, *store.home.rglob("*")):
        folder.chmod(folder.stat().st_mode & ~0o222)
    try:
        assert store.open(NAME)[0].read_bytes() == DATA
    finally:
        for folder in (store.home, *store.home.rglob("*")):
            folder.chmod(folder.stat().st_mode | 0o200)
