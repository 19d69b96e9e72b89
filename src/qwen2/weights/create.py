"""Make a model of one's own: what FROM stands for, whether all that is said of it holds, and the folder that becomes visible.

No weights are copied: files of the store get a second name on the disk, files elsewhere stay there. Only quantizing writes any.
Left out: reading a Modelfile (modelfile.py), and when the result is seen (store.py).

    store.create("mario", parse("FROM qwen2.5-coder:0.5b\\nSYSTEM You are Mario."))
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2.weights.folders import link, now, register
from qwen2.weights.manifest import StoredFile, StoredModel
from qwen2.weights.modelfile import Modelfile
from qwen2.weights.names import ONLY_LISTED, is_hub_like
from qwen2.weights.names import parse as parse_name
from qwen2.weights.partial import file_digest
from qwen2.weights.pull import Progress
from qwen2.weights.registry import ENTRIES, SAFETENSORS, by_repository, canonical

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from qwen2.weights.describe import Description
    from qwen2.weights.store import Store

    Watch = Callable[[Progress], None]

FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
PROBE = "Is anybody there?"
QUANTIZED = "quantized from "


@dataclass(frozen=True)
class Base:
    """What a model is made of, and what keeps it there meanwhile."""

    model: StoredModel
    hold: AbstractContextManager[object]

    def __enter__(self) -> Base:
        self.hold.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hold.__exit__(*error)  # type: ignore[arg-type]


def base_of(store: Store, source: str, watch: Watch, folder: Path | None = None) -> Base:
    """What FROM stands for: a model that is here, a published one, which is pulled, or a path, seen from `folder`."""
    if store.is_path(source):
        path = (Path.cwd() if folder is None else folder) / Path(source).expanduser()
        if not path.exists():
            hint = f"; {ONLY_LISTED}" if is_hub_like(source) else "" if folder is None else f", seen from {folder}"
            raise FileNotFoundError(f"FROM {source}: no such file or folder{hint}")
        watch(Progress(0, 0, f"reading {path.name}"))
        model = register(path)
        return Base(replace(model, made=Modelfile(path.name)), nullcontext())
    if not store.has(source) and _is_published(store, source):
        store.pull(source, watch)
    model = store.get(source)
    return Base(replace(model, made=replace(model.made, source=model.name)), store.hold(model.name, watch))


def uploaded(store: Store, files: Mapping[str, str], work: Path) -> Base:
    """A model of uploaded files, by the names that they shall have: one .gguf, or the files of a Hugging Face folder.

    The files get second names in `work`, which is the caller's to remove. Raises ValueError for names and digests that are none.
    """
    for name in files:
        if FILE.fullmatch(name) is None:
            raise ValueError(f"files: {name[:80]!r} is no plain file name: letters, digits and . - _ only, and no folder")
    kinds = [name for name in files if name.lower().endswith(".gguf")]
    if kinds and len(files) > 1:
        raise ValueError(f"files: {kinds[0]} is a model by itself; send it alone")
    if not kinds:
        odd = next((name for name in files if not any(fnmatchcase(name, wanted) for wanted in SAFETENSORS)), None)
        if odd is not None:
            raise ValueError(f"files: {odd} is not a file of a model; those are one .gguf, or {', '.join(SAFETENSORS)}")
    for name, digest in files.items():
        place = store.blob(digest)
        if place is None:
            raise ValueError(f"files: {name} is not uploaded yet: POST /api/blobs/sha256:{digest} first")
        link(place, work / name)
    where = work / kinds[0] if kinds else work
    model = register(where, dict(files))
    return Base(replace(model, source="uploaded", location=None, folder=work, made=Modelfile(kinds[0] if kinds else "")), nullcontext())


def prepare(
    name: str, modelfile: Modelfile, base: StoredModel, mix: str | None, work: Path, watch: Watch, adapter: Path | None = None
) -> StoredModel:
    """The model in `work`, checked and ready to be published; `adapter` is the folder of its own. Raises ValueError or OSError."""
    from qwen2.weights.describe import describe
    from qwen2.weights.own_adapter import put

    if base.gone:
        raise FileNotFoundError(f"FROM {base.name or base.made.source}: its files are gone; pull or copy it again")
    made = replace(modelfile, source=base.made.source).over(base.made)
    described = describe(base.path, adapter if adapter is not None and adapter.is_dir() else base.adapter_path)
    check(made, described)
    source = base.name or base.source
    model = StoredModel(name, base.format, base.licence, source, now(), base.files, work, base.location, made=made)
    model = put(model, base, adapter, described.config, work)
    if mix is not None:
        return _quantized(model, base.path, mix, work, watch)
    if base.location is None:
        for file in base.files:
            link(base.base / file.path, work / file.path)
    watch(Progress(0, 0, "writing manifest"))
    return model


def check(made: Modelfile, described: Description) -> None:
    """That what is said of the model can be done: a window that it has, a template that shows what people say."""
    from qwen2.tokenizer import ChatTemplate

    made.defaults(described.generation)
    context = made.parameters.get("num_ctx")
    if isinstance(context, int) and context > described.config.window:
        raise ValueError(f"num_ctx {context:,}: the model's window is {described.config.window:,}; leave it out to have all of it")
    if made.template is None and made.system is None and not made.messages:
        return
    template = ChatTemplate.of(described.tokenizer, source=made.template)
    try:
        said = template.render(made.conversation([{"role": "user", "content": PROBE}])).text
    except ValueError as error:
        where = "TEMPLATE" if made.template is not None else "SYSTEM and MESSAGE"
        raise ValueError(f"{where}: {error}") from None
    if PROBE not in said:
        raise ValueError("TEMPLATE: what a person says does not appear in it: write {{ message.content }} of each of the messages")


def _quantized(model: StoredModel, path: Path, mix: str, work: Path, watch: Watch) -> StoredModel:
    from qwen2.weights.quantize import open_plan

    mix = mix.lower()
    file = work / f"{model.name.replace(':', '-')}-{mix}.gguf"
    done = 0
    with open_plan(path, mix, model.name) as plan:
        for note in (f"quantizing to {mix}", *plan.notes):
            watch(Progress(0, 0, note))

        def packed(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            watch(Progress(done, plan.nbytes))

        plan.write(file, lambda tensor: packed(tensor.nbytes))
    watch(Progress(0, 0, "writing manifest"))
    stored = StoredFile(file.name, file.stat().st_size, file_digest(file).hexdigest(), f"{QUANTIZED}{model.source}")
    return replace(model, format=f"GGUF {mix.upper()}", files=(stored,), location=None)


def again(store: Store, stored: StoredModel) -> str:
    """The Modelfile that makes a model of the store again, also where it has been removed, as far as its weights are elsewhere."""
    source, *notes = _again(store, stored)
    adapter = stored.adapter_path
    if source != str(stored.path) and not store.is_path(source) and store.has(source) and store.get(source).adapter:
        adapter = None  # the one that `_makes` has compared
    return stored.made.text(source, *notes, adapter=None if adapter is None else str(adapter))


def _again(store: Store, stored: StoredModel) -> tuple[str, ...]:
    """What FROM says in it, and notes."""
    made_smaller = any(file.source == f"{QUANTIZED}{stored.source}" for file in stored.files)
    mix = stored.format.removeprefix("GGUF ").lower() if made_smaller else None
    if stored.name in ENTRIES:
        return (stored.name,)
    named = _makes(store, stored.source, stored, mix is not None)
    if named or (mix is not None and Path(stored.source).is_absolute() and Path(stored.source).exists()):
        notes = [] if mix is None else [f"Its weights were made smaller on the way: qwen2 create NAME --quantize {mix} makes it again."]
        return (stored.source, *notes)
    if stored.location is not None:
        return (str(stored.path),)
    others = [one.name for one in store.list() if one.name != stored.name]
    published = [entry.name for entry in ENTRIES.values() if entry.known is not None]
    same = next((name for name in (*others, *published) if _makes(store, name, stored, False)), None)
    if same is not None:
        return (same,)
    return (str(stored.path), "No other model has these weights, so they go with this one: qwen2 cp keeps them.")


def _makes(store: Store, name: str, stored: StoredModel, quantized: bool) -> bool:
    """Whether that name, with what the model says of itself, gives the model: the same weights, and nothing that it does not say."""
    try:
        base = store.get(name)
    except FileNotFoundError:  # published, and not here
        known = ENTRIES[str(by_repository(name) or canonical(parse_name(name)))].known
        return quantized or known is None or known.sha256 == stored.digest
    except ValueError:
        return False
    own = replace(stored.made, adapter=base.made.adapter)  # which ADAPTER says
    fits = base.adapter_digest in (None, stored.adapter_digest)
    return (quantized or base.digest == stored.digest) and fits and own.over(base.made) == own


def _is_published(store: Store, name: str) -> bool:
    """ValueError where it stands for nothing."""
    try:
        store.get(name)
    except FileNotFoundError:
        return True
    return False
