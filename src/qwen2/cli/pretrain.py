"""`qwen2 pretrain`: train a model on token shards, or go on with a stage from another run's model."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from cyclopts import Parameter

from qwen2.cli.ranks import ONE, Ranks, first_here, world_of
from qwen2.cli.settings_flags import given, settings_flags
from qwen2.data.mixture import most_often, sizes, too_short
from qwen2.train.changes import FROM, renamed, with_end
from qwen2.train.folder import WHERE, numbered, steps_done, written_config
from qwen2.train.metrics import where_curves_are
from qwen2.train.place import found_again, source_of
from qwen2.train.stage import PretrainSettings, balance_in_words, of_recipe

if TYPE_CHECKING:
    from qwen2.config import ModelConfig
    from qwen2.data.shards import Shards
    from qwen2.tokenizer import Tokenizer
    from qwen2.train.pretrain import Job
    from qwen2.train.start import Start

SIZES = Literal["tiny", "nano", "0.5b", "1.5b", "7b", "57b-a14b", "72b"]
THETA = 10_000.0  # of a first stage; a long-context stage takes 1,000,000 (Qwen2 report, section 3.2)
HINTS = get_type_hints(PretrainSettings)
TOO_OFTEN = 4  # times through the same documents, from where on little is learned (Muennighoff et al. 2023, arXiv 2305.16264)
NAMED = 3  # languages or sources in a line


if TYPE_CHECKING:
    Flags = PretrainSettings
else:
    Flags = settings_flags(PretrainSettings, __name__, unknown=("steps",))
NO_FLAGS = Flags()


def _option(text: str, **more: Any) -> Parameter:
    return Parameter(help=text, negative=(), **more)


@dataclass(frozen=True, kw_only=True)
class What:
    """What is trained, and where it goes."""

    out: Annotated[Path, _option("The run's folder: settings, metrics, checkpoints, curves, and the model at the end.")]
    size: Annotated[SIZES | None, _option("A shape of the family for new weights; the vocabulary becomes the tokenizer's.")] = None
    config: Annotated[Path | None, _option("A config.json for new weights, in place of a size.")] = None
    start: Annotated[
        str | None, _option("Go on from a model instead: a run, a checkpoint of one, a model's folder, a file or a name.", name="--from")
    ] = None
    resume: Annotated[bool, _option("Go on with the run in --out from its last checkpoint; settings left out are the run's.")] = False
    tokens: Annotated[int | None, _option("Train on this many tokens instead of --steps; without either, on each document once.")] = None
    rope_theta: Annotated[
        float | None,
        _option("Base of the rotary embedding; left out, 10,000 for new weights, else the model's. Qwen2's long stage has 1000000."),
    ] = None
    tokenizer: Annotated[
        Path | None, _option("Folder of the tokenizer that the shards were made with; left out, SHARDS/tokenizer or that of --from.")
    ] = None
    device: Annotated[str, _option("cpu, cuda or cuda:N; under torchrun cuda is a GPU for each process.")] = "cpu"
    threads: Annotated[int | None, _option("CPU threads; left out, as many as there are physical cores.")] = None

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.size, self.config, self.start)) != 1 and not self.resume:
            raise ValueError("say what to train: --size nano, or --config FILE, or --from RUN (one of them)")
        for name in ("threads", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")


def pretrain(
    shards: Path,
    /,
    *,
    what: Annotated[What, Parameter(name="*")],
    flags: Annotated[Flags, Parameter(name="*")] = NO_FLAGS,
    ranks: Annotated[Ranks, Parameter(name="*")] = ONE,
) -> None:
    """Train on token shards; the end is a Hugging Face folder, RUN/model.

    Parameters
    ----------
    shards
        The folder that `qwen2 data` wrote.
    """
    from qwen2.cli.serve import check_device
    from qwen2.data.shards import Shards

    opened = Shards.open(shards, remember=True) if first_here() else Shards.open(shards, verify=False)
    settings, written, said = _settings(what, opened, given(flags))
    check_device(what.device)

    import torch

    from qwen2.train.pretrain import pretrain as train

    if what.threads is not None:
        torch.set_num_threads(what.threads)
    job = _job(opened, settings, written, what)
    with world_of(what.device, ranks) as world:
        if world.main:
            print("\n".join([*_described(job), *said]), file=sys.stderr)
        state = train(job, world)
    if world.main:
        print(f"{what.out / 'model'}: exported after {state.step:,} steps and {state.tokens:,} tokens{where_curves_are(what.out)}")


def _settings(what: What, shards: Shards, chosen: dict[str, Any]) -> tuple[PretrainSettings, dict[str, Any] | None, list[str]]:
    """The settings of this run, what its config.json says where it is resumed, and what has to be said of them."""
    if what.tokens is not None and "steps" in chosen:
        raise ValueError("--tokens and --steps: give one of them")
    base: dict[str, Any] = {}
    written, said = None, list[str]()
    path = what.out / "config.json"
    if what.resume:
        written = written_config(what.out, ("settings", "model", "data", "from"))
        base, said = renamed(written["settings"])
        check_same_shards(shards, written["data"], what.out)
        base["weight"] = tuple(base.get("weight", ()))
        unknown = base.keys() - HINTS.keys()
        if unknown:
            raise ValueError(f"{path}: settings: {min(unknown)}: unknown to this version")
    else:
        base, said = _mixture_of_recipe(shards, chosen)
    wanted = {**base, **chosen}
    if what.tokens is not None or "steps" not in wanted:
        row = {f.name: wanted.get(f.name, f.default) for f in fields(PretrainSettings) if f.name in ("length", "batch")}
        total = what.tokens
        if total is None:
            total = sum(sizes(shards, least=wanted.get("least_document", 0)).values())
        wanted["steps"] = max(1, -(-total // max(row["length"] * row["batch"], 1)))
    if written is not None:  # what another end changes beside the steps
        try:
            moved = with_end(base, wanted["steps"], steps_done(what.out / "checkpoints"))
        except ValueError as error:
            raise ValueError(f"{what.out}: settings: {error}") from None
        wanted = {**moved, **chosen, "steps": wanted["steps"]}
    return PretrainSettings(**wanted), written, said


def check_same_shards(shards: Shards, record: dict[str, Any], out: Path) -> None:
    """ValueError in a line where a run that is resumed was trained on other shards: how many, and where its own lie as far as is known."""
    ours, theirs = [one.sha256_tokens for one in shards.shards], record.get("shards", [])
    if ours == theirs:
        return
    other = Counter(theirs) - Counter(ours)
    what = (
        f"{other.total():,} of the {len(theirs):,} shards that it reads are not in {shards.folder}"
        if other
        else f"{shards.folder} has more shards"
    )
    if not other and len(ours) == len(theirs):
        what = f"{shards.folder} has its shards in another order"
    folder = record.get(WHERE)
    place = os.path.relpath(out / folder) if folder is not None else "the folder it was started with"
    raise ValueError(f"{out}: {what}; resume it with {place}, or start another run from it: {FROM}")


def _mixture_of_recipe(shards: Shards, chosen: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What the recipe of the shards says of the mixture and no flag does, and a line that says so."""
    found, lost = of_recipe(shards.manifest["recipe"], sizes(shards))
    taken = {name: value for name, value in found.items() if name not in chosen}
    words = [" ".join([f"--{name}", *([f"{value:g}"] if name == "temperature" else value)]) for name, value in taken.items()]
    said = [f"mixture of the shards' recipe: {', '.join(words)}"] if words else []
    if lost and "weight" not in chosen:
        said.append(f"weights of the shards' recipe for what the shards have no text of: {', '.join(lost)}")
    return taken, said


def _job(shards: Shards, settings: PretrainSettings, written: dict[str, Any] | None, what: What) -> Job:
    """Everything that the run needs, read and checked against each other."""
    from qwen2.config import ModelConfig
    from qwen2.train.pretrain import Job, new_config
    from qwen2.train.start import open_start

    record, theta, start = None if written is None else written["from"], what.rope_theta, None
    source = None if what.start is None else source_of(what.start, record, what.out)
    if source is None and record is not None and what.size is None and what.config is None:
        source = record["model"]
    if source is not None and not (what.resume and numbered(what.out / "checkpoints")):  # a checkpoint has all there is
        place = source if record is None else found_again(record, what.out) or source
        start = open_start(place, lambda text: print(text, file=sys.stderr))
    tokenizer = _tokenizer(shards, what, start, source)
    if what.size is not None:
        shape = _shape(what.size)
        model = new_config(shape, tokenizer, shards.tokenizer.end, settings.length, THETA if theta is None else theta)
    elif what.config is not None:
        model = _read_config(what.config, settings.length, theta)
    elif written is not None:
        model = ModelConfig.from_hf(written["model"])
        model = model if theta is None else replace(model, rope_theta=theta)
    else:
        assert start is not None
        context = max(start.config.context, settings.length)
        model = replace(start.config, context=context, dtype="float32", rope_theta=start.config.rope_theta if theta is None else theta)
    if max(tokenizer.vocab_size, shards.tokenizer.vocabulary) > model.vocab:
        raise ValueError(f"vocab_size {model.vocab}: the tokenizer of {shards.folder} has {shards.tokenizer.vocabulary} ids")
    return Job(shards, tokenizer, model, settings, what.out, start, source, what.resume)


def _shape(size: str) -> ModelConfig:
    from qwen2.config.family import SHAPES, nano, tiny

    return {"tiny": tiny, "nano": nano}[size]() if size in ("tiny", "nano") else SHAPES[size]


def _read_config(file: Path, length: int, theta: float | None) -> ModelConfig:
    from qwen2.config import ModelConfig
    from qwen2.weights.json_object import read_json

    model = ModelConfig.from_hf(read_json(file), str(file))
    if model.context < length:
        raise ValueError(f"{file}: max_position_embeddings {model.context} is less than the rows of {length} tokens (--length)")
    return replace(model, dtype="float32", rope_theta=model.rope_theta if theta is None else theta)


def _tokenizer(shards: Shards, what: What, start: Start | None, source: str | None) -> Tokenizer:
    """The tokenizer that the shards were made with, found and checked."""
    from qwen2.data.shards import sha256_of
    from qwen2.tokenizer import Tokenizer

    place = what.tokenizer if what.tokenizer is not None else shards.folder / "tokenizer"
    file = place / "tokenizer.json" if place.is_dir() else place
    own = what.out / "tokenizer"  # a run's copy, which belongs to its shards
    if what.tokenizer is None and not file.exists() and start is not None:
        tokenizer = start.tokenizer
    elif what.tokenizer is None and not file.exists() and what.resume and own.is_dir():
        tokenizer = Tokenizer.from_folder(own)
    elif not file.exists():
        raise FileNotFoundError(
            f"{file}: no tokenizer there; name the folder of the one that the shards were made with: --tokenizer FOLDER"
        )
    elif sha256_of(file) != shards.tokenizer.sha256:
        raise ValueError(f"{file}: not the tokenizer that {shards.folder} was made with (its sha256 is another)")
    else:
        tokenizer = Tokenizer.from_json(file)
    if start is not None and not tokenizer.same_tokens(start.tokenizer):
        raise ValueError(f"{source}: its tokenizer is not the one that {shards.folder} was made with")
    return tokenizer


def _described(job: Job) -> list[str]:
    """What is about to be trained, in two lines, one of a mixture's experts, and one where text is repeated too often."""
    settings, model = job.settings, job.config
    count, active = model.parameters(), model.active_parameters()
    what = f"{count:,} parameters" + ("" if active == count else f" ({active:,} active)")
    tokens = sizes(job.shards, least=settings.least_document)
    total, had = settings.steps * settings.batch * settings.length, sum(tokens.values())
    often = most_often(settings.mixture().times(tokens, total)) if had else []
    read = f"{total:,} tokens, {total / max(had, 1):.2f} times the {had:,} of the shards"
    if settings.least_document > 1:
        read += f" in documents of at least {settings.least_document:,}"
        if short := too_short(job.shards, settings.least_document):
            read += f" (all of {_some(short)})"
    if often and often[0][1] > 1.01 * often[-1][1]:
        read += f"; most often {', '.join(f'{name} {times:.1f} times' for name, times in often[:NAMED])}"
    said = [
        f"{what}, vocabulary {model.vocab:,}, {settings.length} tokens a row, rotary base {model.rope_theta:,.0f}",
        *([] if model.moe is None else [balance_in_words(settings.balance, model.moe)]),
        f"{settings.steps:,} steps of {settings.batch} rows: {read}",
    ]
    if many := [name for name, times in often if times > TOO_OFTEN]:
        said.append(
            f"warning: read more than {TOO_OFTEN} times: {_some(many)}; that is memory, not learning: "
            "a lower --temperature, fewer --steps or more text would help"
        )
    return said


def _some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
