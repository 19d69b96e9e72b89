"""`qwen2 pretrain`: train a model on token shards, or go on with a stage from another run's model."""

from __future__ import annotations

import sys
from dataclasses import field as new_field
from dataclasses import fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, get_type_hints

from cyclopts import Parameter

from qwen2.cli.ranks import ONE, Ranks, world_of
from qwen2.train.stage import PretrainSettings

if TYPE_CHECKING:
    from qwen2.config import ModelConfig
    from qwen2.data.shards import Shards
    from qwen2.tokenizer import Tokenizer
    from qwen2.train.pretrain import Job
    from qwen2.weights.model import Model

SIZES = Literal["tiny", "nano", "0.5b", "1.5b", "7b", "57b-a14b", "72b"]
THETA = 10_000.0  # of a first stage; a long-context stage takes 1,000,000 (Qwen2 report, section 3.2)
HINTS = get_type_hints(PretrainSettings)


def _flag(name: str, default: Any, text: str) -> tuple[str, Any, Any]:
    hint, switch = list[str] if HINTS[name] == tuple[str, ...] else HINTS[name], HINTS[name] is bool
    shown = str(default).lower() if switch else str(default)
    known = switch or (default not in (0, ()) and name != "steps")
    parameter = Parameter(help=text, show_default=shown if known else False, negative=None if switch else ())
    return name, Annotated[Optional[hint], parameter], new_field(default=None)  # noqa: UP045


if TYPE_CHECKING:
    Flags = PretrainSettings
else:  # an optional field per setting; None where the flag was not given, so that a resumed run keeps its own
    Flags = make_dataclass("Flags", [_flag(f.name, f.default, f.metadata["help"]) for f in fields(PretrainSettings)], frozen=True)
    Flags.__module__ = __name__
NO_FLAGS = Flags()


def pretrain(
    shards: Path,
    /,
    *,
    out: Path,
    size: SIZES | None = None,
    config: Path | None = None,
    from_: Annotated[str | None, Parameter(name="--from")] = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
    tokens: int | None = None,
    rope_theta: float | None = None,
    tokenizer: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    flags: Annotated[Flags, Parameter(name="*")] = NO_FLAGS,
    ranks: Annotated[Ranks, Parameter(name="*")] = ONE,
) -> None:
    """Train on token shards; the end is a Hugging Face folder, RUN/model.

    Parameters
    ----------
    shards
        The folder that `qwen2 data` wrote.
    out
        The run's folder: settings, metrics, checkpoints, curves, and the model at the end.
    size
        A shape of the family; the vocabulary becomes the tokenizer's.
    config
        A config.json in place of a size.
    from_
        Start from a model instead of new weights: a run's folder, a model's folder, a file or a name.
    resume
        Go on with the run in --out from its last checkpoint; settings left out are the run's.
    tokens
        Train on this many tokens instead of --steps; without either on each document once.
    rope_theta
        Base of the rotary embedding; left out, 10,000 for new weights, and with --from the model's own. The long-context stage of
        Qwen2 takes 1,000,000.
    tokenizer
        The folder of the tokenizer that the shards were made with; left out, SHARDS/tokenizer, or the one of --from.
    device
        cpu, cuda or cuda:N.
    threads
        CPU threads; left out, as many as there are physical cores.
    """
    if sum(given is not None for given in (size, config, from_)) != 1 and not resume:
        raise ValueError("say what to train: --size nano, or --config FILE, or --from RUN (one of them)")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads}: must be at least 1")
    given = {f.name: value for f in fields(flags) if (value := getattr(flags, f.name)) is not None}
    if "weight" in given:
        given["weight"] = tuple(given["weight"])
    if tokens is not None:
        if "steps" in given:
            raise ValueError("--tokens and --steps: give one of them")
        if tokens < 1:
            raise ValueError(f"--tokens {tokens}: must be at least 1")

    from qwen2.cli.serve import check_device
    from qwen2.data.shards import Shards

    opened = Shards.open(shards)
    settings, written = _settings(out, opened, given, tokens, resume)
    check_device(device)

    import torch

    from qwen2.train.pretrain import pretrain as train

    if threads is not None:
        torch.set_num_threads(threads)
    job = _job(opened, settings, written, out, size, config, from_, rope_theta, tokenizer)
    with world_of(device, ranks) as world:
        if world.main:
            _describe(job)
        state = train(replace(job, resume=resume), world)
    if world.main:
        print(f"{out / 'model'}: exported after {state.step:,} steps and {state.tokens:,} tokens; curves in {out / 'curves.png'}")


def _settings(
    out: Path, shards: Shards, given: dict[str, Any], tokens: int | None, resume: bool
) -> tuple[PretrainSettings, dict[str, Any] | None]:
    """The settings of this run, and what its config.json says where it is resumed."""
    from qwen2.weights.json_object import read_json

    base: dict[str, Any] = {}
    written = None
    if resume and (out / "config.json").exists():
        written = read_json(out / "config.json")
        base = {**written["settings"], "weight": tuple(written["settings"]["weight"])}
        unknown = base.keys() - HINTS.keys()
        if unknown:
            raise ValueError(f"{out / 'config.json'}: settings: {min(unknown)}: unknown to this version")
    elif resume:
        raise FileNotFoundError(f"{out}: no run to resume here (config.json is missing); leave --resume out to start one")
    wanted = {**base, **given}
    if tokens is not None or "steps" not in wanted:
        row = {f.name: wanted.get(f.name, f.default) for f in fields(PretrainSettings) if f.name in ("length", "batch")}
        total = tokens if tokens is not None else sum(record.tokens for record in shards.select("train"))
        wanted["steps"] = max(1, -(-total // max(row["length"] * row["batch"], 1)))
    return PretrainSettings(**wanted), written


def _job(
    shards: Shards,
    settings: PretrainSettings,
    written: dict[str, Any] | None,
    out: Path,
    size: str | None,
    file: Path | None,
    source: str | None,
    theta: float | None,
    tokenizer_folder: Path | None,
) -> Job:
    """Everything that the run needs, read and checked against each other."""
    from qwen2.config import ModelConfig
    from qwen2.train.pretrain import Job, new_config

    if written is not None and size is None and file is None:
        source = source if source is not None else written["from"]["model"]
    start = None if source is None else _load(source)
    tokenizer = _tokenizer(shards, tokenizer_folder, start, source)
    if start is not None:
        base = start.config
        theta = (base.rope_theta if written is None else written["model"]["rope_theta"]) if theta is None else theta
        model = replace(base, context=max(base.context, settings.length), rope_theta=theta, dtype="float32")
    elif size is not None:
        model = new_config(_shape(size), tokenizer, shards.tokenizer.end, settings.length, THETA if theta is None else theta)
    elif file is not None:
        model = _read_config(file, settings.length, theta)
    else:
        assert written is not None
        model = ModelConfig.from_hf(written["model"])
        model = model if theta is None else replace(model, rope_theta=theta)
    if max(tokenizer.vocab_size, shards.tokenizer.vocabulary) > model.vocab:
        raise ValueError(f"vocab_size {model.vocab}: the tokenizer of {shards.folder} has {shards.tokenizer.vocabulary} ids")
    return Job(shards, tokenizer, model, settings, out, start, source)


def _shape(size: str) -> ModelConfig:
    from qwen2.config.family import SHAPES, nano, tiny

    return {"tiny": tiny, "nano": nano}[size]() if size in ("tiny", "nano") else SHAPES[size]


def _read_config(file: Path, length: int, theta: float | None) -> ModelConfig:
    from qwen2.config import ModelConfig
    from qwen2.weights.json_object import read_json

    model = ModelConfig.from_hf(read_json(file))
    if model.context < length:
        raise ValueError(f"{file}: max_position_embeddings {model.context} is less than the rows of {length} tokens (--length)")
    return replace(model, dtype="float32", rope_theta=model.rope_theta if theta is None else theta)


def _load(source: str) -> Model:
    """The model that a stage starts from: a run's, or any other."""
    from qwen2.weights.model import load

    run = Path(source) / "model"
    if (Path(source) / "metrics.jsonl").exists() and not run.exists():
        raise FileNotFoundError(f"{source}: this run has no model yet; end it first, with --resume")
    return load(str(run) if run.exists() else source, dtype="float32")


def _tokenizer(shards: Shards, folder: Path | None, start: Model | None, source: str | None) -> Tokenizer:
    """The tokenizer that the shards were made with, found and checked."""
    from qwen2.data.shards import sha256_of
    from qwen2.tokenizer import Tokenizer

    place = folder if folder is not None else shards.folder / "tokenizer"
    file = place / "tokenizer.json" if place.is_dir() else place
    if folder is None and not file.exists() and start is not None:
        tokenizer = start.tokenizer
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


def _describe(job: Job) -> None:
    """What is about to be trained, in two lines."""
    settings, model = job.settings, job.config
    count, active = model.parameters(), model.active_parameters()
    what = f"{count:,} parameters" + ("" if active == count else f" ({active:,} active)")
    total, had = settings.steps * settings.batch * settings.length, sum(record.tokens for record in job.shards.select("train"))
    print(f"{what}, vocabulary {model.vocab:,}, {settings.length} tokens a row, rotary base {model.rope_theta:,.0f}", file=sys.stderr)
    print(
        f"{settings.steps:,} steps of {settings.batch} rows: {total:,} tokens, {total / max(had, 1):.2f} times the {had:,} of the shards",
        file=sys.stderr,
    )
