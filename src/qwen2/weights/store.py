"""The store of models below QWEN2_HOME (default ~/.qwen2), under plain names.

    models/qwen2.5-coder/0.5b/manifest.json                                what, from where, when, under which licence
    models/qwen2.5-coder/0.5b/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf      the file as published: its digest is its sha256
    partial/ locks/ holds/                                                 downloads under way, one pull at a time, who uses what

A model appears by one rename, whole and verified, or not at all. What is left out: reading weights (`model.py`).

    Store().pull("qwen2.5-coder:0.5b"); Store().find("qwen2.5-coder:0.5b")
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from qwen2.weights.blobs import Blobs
from qwen2.weights.folders import freed_bytes, link, link_adapter, move, now, prune, publish, register
from qwen2.weights.locks import NOT_WRITABLE, Hold, acquire, holders, make
from qwen2.weights.manifest import MANIFEST, StoredModel, read_manifest
from qwen2.weights.names import ONLY_LISTED, Name, is_hub_like, nearest, parse
from qwen2.weights.registry import ENTRIES, by_repository, canonical, lookup, unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from qwen2.weights.modelfile import Modelfile
    from qwen2.weights.pull import Progress
    from qwen2.weights.sources import Endpoints

    Watch = Callable[[Progress], None]


def default_home() -> Path:
    """Where models live: the environment's QWEN2_HOME, or ~/.qwen2. The one place outside the command line that reads it."""
    given = os.environ.get("QWEN2_HOME")
    return Path(given).expanduser() if given else Path.home() / ".qwen2"


class Store:
    """The models of one home folder. Any number of processes may use it at once."""

    def __init__(self, home: Path | None = None, endpoints: Endpoints | None = None) -> None:
        self.home = default_home() if home is None else Path(home)
        self.endpoints = endpoints

    @property
    def identity(self) -> str:
        """Equal for equal homes, for programs that ask each other whether they have the same models."""
        return hashlib.sha256(str(self.home.resolve()).encode()).hexdigest()[:16]

    # -------------------------------------------------------------------------------------------------------- what is there

    def list(self, on_damaged: Callable[[ValueError], None] | None = None) -> tuple[StoredModel, ...]:
        """Every model that is there, by name. One whose manifest cannot be read is passed over, and told to `on_damaged`."""
        found = []
        models = self.home / "models"
        for path in glob(f"*/*/{MANIFEST}", root_dir=models):  # unlike Path.glob not troubled by a folder that goes meanwhile
            try:
                model = read_manifest((models / path).parent)
            except ValueError as error:
                if on_damaged is not None:
                    on_damaged(error)
                continue
            found += [] if model is None else [model]
        return tuple(sorted(found, key=lambda model: model.name))

    def has(self, name: str) -> bool:
        """Whether the model of that name is there."""
        return (self._folder("models", self._name(name)) / MANIFEST).exists()

    def get(self, name: str) -> StoredModel:
        """The model of that name. FileNotFoundError: known but not pulled; ValueError: stands for nothing."""
        asked = self._name(name)
        model = read_manifest(self._folder("models", asked))
        if model is not None:
            return model
        if str(asked) in ENTRIES:
            raise FileNotFoundError(f"{asked} is not pulled yet: run qwen2 pull {asked}")
        raise ValueError(self._unknown(name))

    def find(self, name: str) -> Path:
        """What `load` takes for that name: a GGUF file or a folder. Errors as in `get`."""
        model = self.get(name)
        if not model.path.exists():
            raise FileNotFoundError(f"{model.name}: {model.path} is gone; pull or copy it again, or run qwen2 rm {model.name}")
        return model.path

    def is_path(self, source: str | Path) -> bool:
        """Whether a file or folder is meant, and not a name.

        A `Path`, text with a path separator, or text that ends in .gguf is a path (unless it is the hub's name of a model, such
        as Qwen/Qwen2-7B-Instruct, and no such folder exists). Other text is a name; a folder of that name in the working
        directory is taken only where the name stands for nothing.
        """
        path, text = Path(source).expanduser(), str(source)
        if isinstance(source, Path):
            return True
        if not text.strip():  # not the working directory
            return False
        if "/" in text or os.sep in text or text.startswith((".", "~")) or text.endswith(".gguf"):
            return path.exists() or by_repository(text) is None
        return path.exists() and not self._is_known(text)

    def resolve(self, source: str | Path) -> tuple[Path, str]:
        """Path and name of a model given as a name, a folder or a file (`is_path` says which)."""
        if not self.is_path(source):
            return self.find(str(source)), str(self._name(str(source)))
        path = Path(source).expanduser()
        if not path.exists():
            hint = f"; {ONLY_LISTED}" if isinstance(source, str) and is_hub_like(source) else ""
            raise FileNotFoundError(f"{source}: no such file or folder{hint}")
        if path.is_file() and path.suffix == ".safetensors":
            raise ValueError(f"{source}: weights alone are no model; give the folder that it lies in: {path.absolute().parent}")
        return path, path.name

    def open(self, source: str | Path) -> tuple[Path, str, Hold | None]:
        """As `resolve`, and a hold that keeps `rm` away from a model of the store for as long as it lives, also if given by its path."""
        path, name = self.resolve(source)
        held = self._owner(path) if self.is_path(source) else name
        return path, name, None if held is None else self.hold(held)

    # ----------------------------------------------------------------------------------------------------------- what comes

    def pull(
        self, name: str, progress: Watch | None = None, sources: Sequence[str] | None = None, local: Path | None = None
    ) -> StoredModel:
        """Fetch a model unless it is there, and return it.

        `sources` names the places to ask (`sources.SOURCE_KEYS`), `local` a file or folder to take it from. Raises ValueError
        for a name that stands for nothing, OSError with every source and its reason, or with the space needed and had.
        """
        from qwen2.weights.pull import Pull
        from qwen2.weights.sources import SOURCE_KEYS, Endpoints, make_sources

        asked = self._name(name)
        folder = self._folder("models", asked)
        there = read_manifest(folder)
        if local is not None:
            _check_wanted(asked, there, local)
        if there is not None:
            return there
        entry = lookup(asked)
        watch = progress if progress is not None else silent
        tried = make_sources(self.endpoints or Endpoints(), SOURCE_KEYS if sources is None else sources, local)
        with self._lock(asked, _waiting("pulling", asked, watch)):
            there = read_manifest(folder)
            if there is not None:  # while this one waited
                return there
            work = self._folder("partial", asked)
            make(work)
            pull = Pull(self.home, entry, tried, watch)
            files = pull.run(work)
            ready = pull.folder(work)
            source = ", ".join(dict.fromkeys(file.source for file in files))
            StoredModel(str(asked), entry.format, entry.licence, source, now(), files, ready).write()
            move(ready, folder)
            shutil.rmtree(work, ignore_errors=True)
        return self.get(str(asked))

    def copy(self, source: str, target: str, watch: Watch | None = None) -> StoredModel:
        """Give a model a second name. No bytes are copied: files of the store are linked, a file or folder elsewhere stays there."""
        name = self._free(target)
        path, origin = self.resolve(source)
        model = register(path) if self.is_path(source) else self.get(origin)
        work = self._folder("partial", name) / "copy"
        with self._lock(name, _waiting("making", name, watch)):
            self._free(target)  # while this one waited
            shutil.rmtree(work, ignore_errors=True)
            make(work)
            if model.location is None:
                for file in model.files:
                    link(model.base / file.path, work / file.path)
            replace(model, name=str(name), folder=work, part=None).write()
            link_adapter(model, work)
            move(work, self._folder("models", name))
            shutil.rmtree(work.parent, ignore_errors=True)
        return self.get(str(name))

    def create(
        self,
        target: str,
        modelfile: Modelfile,
        files: Mapping[str, str] | None = None,
        mix: str | None = None,
        watch: Watch | None = None,
        folder: Path | None = None,
        adapter: Mapping[str, str] | None = None,
    ) -> StoredModel:
        """Make a model of one's own, in place of one of that name that may be there; its files are linked or stay where they are.

        It is made of what FROM stands for, a path being seen from `folder`, or of uploaded `files`, digests by name; its adapter is
        copied from where ADAPTER says, or uploaded as `adapter`. `mix` is the type to quantize the weights to. What it is made of may
        be removed afterwards: files stay for as long as any model has them. Raises ValueError or OSError.
        """
        from qwen2.weights.create import base_of, prepare, uploaded
        from qwen2.weights.own_adapter import given_adapter

        name = self.own_name(target)
        tell = silent if watch is None else watch
        held = None if files else base_of(self, modelfile.source, tell, folder)
        with nullcontext() if held is None else held, self._lock(name, _waiting("making", name, tell)):
            work = self._folder("partial", name)
            shutil.rmtree(work, ignore_errors=True)
            for part in ("model", "files", "adapter"):
                make(work / part)
            try:
                base = uploaded(self, files or {}, work / "files") if held is None else held
                own = given_adapter(self, modelfile.adapter, folder, adapter or {}, work / "adapter")
                publish(prepare(str(name), modelfile, base.model, mix, work / "model", tell, own), self._folder("models", name))
            finally:
                shutil.rmtree(work, ignore_errors=True)
        for digest in (*(files or {}).values(), *(adapter or {}).values()):  # the model has the file now
            Blobs(self.home).path(digest).unlink(missing_ok=True)
        return self.get(str(name))

    def blob(self, digest: str) -> Path | None:
        """The file of that sha256 (64 digits), uploaded or of a model of the store; None where there is none."""
        path = Blobs(self.home).path(digest)
        models = self.list()
        files = [(model.base / file.path, file) for model in models if model.location is None for file in model.files]
        files += [(model.adapter_path / file.path, file) for model in models if model.adapter_path is not None for file in model.adapter]
        return path if path.is_file() else next((place for place, file in files if file.sha256 == digest and place.is_file()), None)

    def check_removable(self, name: str) -> None:
        """Errors as in `get`, where neither such a model nor the beginning of one is there."""
        if not self._folder("partial", self._name(name)).exists():
            self._require(name)

    def remove(self, name: str) -> int:
        """Remove a model, or what an interrupted pull has left of it, and return the bytes that this frees.

        Refused with an OSError that names the processes while any of them uses the model.
        """
        asked = self._name(name)
        folder, work = self._folder("models", asked), self._folder("partial", asked)
        self.check_removable(name)
        try:
            with self._lock(asked, wait=False):
                users = holders(self._folder("holds", asked))
                if users:
                    raise OSError(f"{asked} is in use by {' and '.join(users)}: {_way_out(asked, users)}")
                freed = freed_bytes(folder) + freed_bytes(work)
                if folder.exists():
                    doomed = self.home / "partial" / asked.family / f"{asked.tag}.removed"
                    move(folder, doomed)  # from here on it is not seen, whatever interrupts
                    shutil.rmtree(doomed)
                shutil.rmtree(work, ignore_errors=True)
                holds = self._folder("holds", asked)
                prune(folder.parent, work.parent, holds, holds.parent)  # and not the lock's file: others may wait for it
        except Timeout:
            raise OSError(f"{asked} is being pulled by another process: end that first") from None
        return freed

    def hold(self, name: str, watch: Watch | None = None) -> Hold:
        """Say that this process uses the model until the hold is released or the process ends."""
        asked = self._name(name)
        try:
            with self._lock(asked, _waiting("making", asked, watch)):
                self._require(name)
                return Hold(self._folder("holds", asked))
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                raise
            return Hold(self._folder("holds", asked))

    # -------------------------------------------------------------------------------------------------------------- its own

    def _name(self, text: str) -> Name:
        """The full name: of a model that is there, or what the registry makes of it, or of a hub's name for it."""
        name = by_repository(text) or parse(text)
        if name.tag is not None and (self._folder("models", name) / MANIFEST).exists():
            return name
        return canonical(name)

    def _owner(self, path: Path) -> str | None:
        """The name of the model of this store to which a path belongs."""
        models, inside = (self.home / "models").resolve(), path.resolve()
        if models not in inside.parents or len(parts := inside.relative_to(models).parts) < 2:
            return None
        return ":".join(parts[:2]) if (models / parts[0] / parts[1] / MANIFEST).exists() else None

    def _is_known(self, text: str) -> bool:
        """Whether the text names a model that is there or that the registry knows."""
        try:
            name = self._name(text)
        except ValueError:
            return False
        return str(name) in ENTRIES or self.has(text)

    def own_name(self, text: str) -> Name:
        """A name that no published model has."""
        name = parse(text)
        name = Name(name.family, "latest" if name.tag is None else name.tag)
        if str(name) in ENTRIES or str(canonical(name)) in ENTRIES:
            raise ValueError(f"{name} is the name of a published model: choose another")
        return name

    def _free(self, text: str) -> Name:
        """A name that nothing has yet."""
        name = self.own_name(text)
        if (self._folder("models", name) / MANIFEST).exists():
            raise ValueError(f"{name} is there already: run qwen2 rm {name} first, or choose another name")
        return name

    def _unknown(self, text: str) -> str:
        """What to say of a name that stands for nothing: the user's own models are near it too."""
        own = [model.name for model in self.list() if model.name not in ENTRIES]
        close = nearest(text, own)
        said = unknown(parse(text))
        return f"{said}; among your own: {', '.join(close)}" if close else said

    def _require(self, text: str) -> None:
        """Errors as in `get`, where no such model is there."""
        if self.has(text):
            return
        name = self._name(text)
        if str(name) in ENTRIES:
            raise FileNotFoundError(f"{name} is not pulled: qwen2 list shows what is")
        raise ValueError(self._unknown(text))

    def _folder(self, kind: str, name: Name) -> Path:
        """Names are safe as paths by their grammar (`names.py`)."""
        return self.home / kind / name.family / str(name.tag)

    @contextmanager
    def _lock(self, name: Name, on_wait: Callable[[], None] | None = None, wait: bool = True) -> Iterator[None]:
        """One process at a time changes a model. Timeout where another does and `wait` is off; `on_wait` may end a wait by raising."""
        path = self.home / "locks" / f"{name.family}--{name.tag}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"{self.home}: the models' folder cannot be made or written ({error.strerror}); set QWEN2_HOME to another folder"
            raise OSError(error.errno, why) from error
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise
            acquire(lock, on_wait)
        try:
            yield
        finally:
            lock.release()


def _waiting(doing: str, name: Name, watch: Watch | None) -> Callable[[], None] | None:
    """What is told, again and again, while another process has a model's lock."""
    from qwen2.weights.pull import Progress

    waiting = Progress(0, 0, f"another process is {doing} {name}: waiting for it")
    return None if watch is None else lambda: watch(waiting)


def _check_wanted(name: Name, there: StoredModel | None, local: Path) -> None:
    """Files of one's own take the place of no model, and get a name by `copy`; where the digest is known they cannot be others."""
    entry = ENTRIES.get(str(name))
    if there is not None and (entry is None or entry.known is None):
        raise ValueError(f"{name} is there already: run qwen2 rm {name} first")
    if entry is None:
        raise ValueError(f"{name} is no published model's name: run qwen2 cp {local} {name} to give a file or folder a name of its own")


def _way_out(name: Name, users: Sequence[str]) -> str:
    """How to end the use of a model: a server has others too, and need not go for it."""
    serving = [user for user in users if user.endswith(" serve)")]
    ways = [f"run qwen2 stop {name} first"] if serving else []
    return " and ".join(ways if len(serving) == len(users) else [*ways, "end it first"])


def silent(_: Progress) -> None:
    """Watch nothing."""
