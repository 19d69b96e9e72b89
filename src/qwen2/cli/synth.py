"""`qwen2 synth`: training data that models make, and problems whose answers are known; how many of them a model gets right."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from dataclasses import field as new_field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from cyclopts import App, Parameter

from qwen2.cli.lora_flags import adapter_folder
from qwen2.cli.sampling import HELP, make_flags, params_of
from qwen2.post.checks.checkers import KINDS, make_checker
from qwen2.post.synth.settings import RejectSettings
from qwen2.train.place import ADAPTER

if TYPE_CHECKING:
    from qwen2.engine.llm import LLM
    from qwen2.engine.request import SamplingParams
    from qwen2.post.checks.checkers import Checker
    from qwen2.post.checks.exact import Measured
    from qwen2.post.synth.prompts import Prompts
    from qwen2.post.synth.sampling import EngineSampler

synth = App("synth", help_format="plaintext", help_epilogue="Example: qwen2 synth arithmetic sums --count 1000")
MAX_TOKENS = 512  # of an answer, where nothing else is said
NEUTRAL = (  # what `exact` does not take from the model
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "penalty_window"),
)
Switch = Annotated[bool, Parameter(negative=())]


def _option(text: str, **more: Any) -> Parameter:
    return Parameter(help=text, negative=(), **more)


if TYPE_CHECKING:
    from qwen2.engine.request import SamplingParams as Flags

    Choosing = RejectSettings
else:  # the settings as flags, and the sampling parameters but for the seed, which is a setting
    _TEXTS = {**HELP, "max_tokens": f"Of an answer; left out, {MAX_TOKENS}."}
    Flags = make_flags("Flags", {name: text for name, text in _TEXTS.items() if name != "seed"}, __name__)
    _HINTS = get_type_hints(RejectSettings)
    Choosing = make_dataclass(
        "Choosing",
        [(f.name, Annotated[_HINTS[f.name], _option(f.metadata["help"])], new_field(default=f.default)) for f in fields(RejectSettings)],
        frozen=True,
    )
    Choosing.__module__ = __name__
CHOOSING, NO_SAMPLING = Choosing(), Flags()


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What is asked, by whom answers are judged, and how to compute."""

    check: Annotated[str, _option(f"What says whether an answer is right: {KINDS}.")] = "number"
    check_seconds: Annotated[float, _option("Seconds that the tests of one answer, or one call of the function, may take.")] = 10.0
    check_memory: Annotated[int, _option("MiB that a program under test may use.")] = 512
    system: Annotated[str | None, _option("A system message before each prompt that has none.")] = None
    prompt_column: Annotated[str | None, _option("The column that asks; left out, messages, prompt, question, ...")] = None
    answer_column: Annotated[str | None, _option("The column with the right answer; left out, answer.")] = None
    skip_broken: Annotated[bool, _option("Leave rows out that are broken, and count them.")] = False
    adapter: Annotated[
        Path | None, _option("A LoRA adapter beside MODEL, whose base that is: a folder as PEFT writes it, or a run of adapters.")
    ] = None
    max_batch: Annotated[int, _option("Answers that are written at a time.")] = 32
    threads: Annotated[int | None, _option("CPU threads; left out, as many as there are physical cores.")] = None
    device: Annotated[str, _option("cpu, cuda or cuda:N.")] = "cpu"


ASKING = Asking()


@synth.command(help_epilogue="Example: qwen2 synth reject qwen2.5-coder:0.5b sums/train.jsonl --out right --k 16 --temperature 1")
def reject(
    model: str,
    /,
    *prompts: Path,
    out: Path,
    choosing: Annotated[Choosing, Parameter(name="*")] = CHOOSING,
    asking: Annotated[Asking, Parameter(name="*")] = ASKING,
    sampling: Annotated[Flags, Parameter(name="*")] = NO_SAMPLING,
) -> None:
    """Sample answers, keep those that are right: SFT rows and preference pairs. The same command goes on where it was stopped.

    Parameters
    ----------
    model
        A name, a file, a folder, a training run, or an adapter, which is used beside the model that it was trained on.
    prompts
        Files of JSON lines.
    out
        The folder for config.json, answers.jsonl, sft.jsonl, pairs.jsonl and summary.json.
    choosing
        How many answers, and which become rows.
    asking
        What is asked, and what says whether an answer is right.
    sampling
        How answers are sampled; left out, the model's own defaults.
    """
    params, settings = _params(sampling), RejectSettings(**{f.name: getattr(choosing, f.name) for f in fields(choosing)})
    checker, found = _read(asking, prompts)

    from qwen2.post.synth.reject import CONFIG, PAIRS, SFT
    from qwen2.post.synth.reject import reject as run

    try:
        sampler = _sampler(model, asking, params)
        _say(f"{out / CONFIG}: {len(found.found):,} prompts, {settings.k} answers each, judged by {checker.name}")
        summary = run(sampler, found, checker, settings, out, _say, "auto")
    finally:
        checker.close()
    for line in summary.lines():
        print(line)
    print(f"{out / SFT}: {summary.sft_rows:,} rows\n{out / PAIRS}: {summary.pairs:,} pairs")


@synth.command(help_epilogue="Example: qwen2 synth exact qwen2.5-coder:0.5b sums/held-out.jsonl --out before.json")
def exact(
    model: str,
    /,
    *prompts: Path,
    out: Path | None = None,
    against: Path | None = None,
    seed: int = 0,
    asking: Annotated[Asking, Parameter(name="*")] = ASKING,
    sampling: Annotated[Flags, Parameter(name="*")] = NO_SAMPLING,
) -> None:
    """How many problems a model answers rightly, with the interval that holds the true share in 95 of 100 cases.

    Answers are of the likeliest tokens, without penalties and cuts, whatever the model's own defaults are; what you give is used.

    Parameters
    ----------
    model
        A name, a file, a folder, a training run, or an adapter, which is used beside the model that it was trained on.
    prompts
        Files of JSON lines.
    out
        A file for the figures and all answers, as JSON.
    against
        Another model's such file of the same problems, to say how much better this one is.
    seed
        Of answers that are drawn, where a temperature is given.
    asking
        What is asked, and what says whether an answer is right.
    sampling
        How answers are chosen; left out, by the likeliest token, without penalties.
    """
    params = _neutral(_params(sampling))
    before = None if against is None else _report(against)
    checker, found = _read(asking, prompts)

    from qwen2.post.checks.exact import check_same, difference, measure
    from qwen2.train.folder import check_writable, write_json

    try:
        if before is not None:
            check_same((one["key"] for one in before["problems"]), (prompt.key for prompt in found.found))
        if out is not None:
            check_writable(out)
        measured = measure(_sampler(model, asking, params), found, checker, seed=seed, shown="auto")
    finally:
        checker.close()
    report = measured.report()
    gain = None if before is None else difference([before], [report])
    if before is not None and gain is not None:
        report["difference"] = {"against": before.get("model"), **asdict(gain)}
    if out is not None:
        write_json(out, report)
    _show(measured)
    if gain is not None:
        print(f"difference {gain}")


@synth.command(help_epilogue="Example: qwen2 synth difference --before sft-0.json sft-1.json --after dpo-0.json dpo-1.json")
def difference(
    *,
    before: Annotated[list[Path], Parameter(consume_multiple=True, negative=())],
    after: Annotated[list[Path], Parameter(consume_multiple=True, negative=())],
) -> None:
    """How much better, after minus before, on the same problems, with its interval: of one run each, or of several, such as seeds.

    Parameters
    ----------
    before
        What qwen2 synth exact --out wrote, a file a run.
    after
        The same of the other model.
    """
    from qwen2.post.checks.exact import difference as compare

    print(f"difference {compare([_report(path) for path in before], [_report(path) for path in after])}")


@synth.command(help_epilogue="Example: qwen2 synth arithmetic sums --count 2000 --held-out 2000 --solutions 4000")
def arithmetic(
    out: Path,
    /,
    *,
    count: int,
    held_out: int = 0,
    solutions: int = 0,
    seed: int = 0,
    worked: Switch = False,
    operation: Annotated[list[Literal["add", "sub", "mul", "div"]] | None, Parameter(negative=())] = None,
    largest: int = 99,
    largest_factor: int = 12,
    language: Annotated[list[str] | None, Parameter(negative=())] = None,
    stories: float = 0.5,
) -> None:
    """Write short arithmetic problems in up to 25 languages, each with its exact answer; no held-out fact is in training.

    Parameters
    ----------
    out
        The folder for train.jsonl, held-out.jsonl and sft.jsonl.
    count
        Problems to train on.
    held_out
        Problems to measure by, of facts that no other file has.
    solutions
        Other training problems with their answers, as conversations for SFT.
    seed
        The same seed gives the same problems.
    worked
        Put the sum in signs before the answer, in solutions.
    operation
        add, sub, mul or div, several times for several; left out, all.
    largest
        The largest summand.
    largest_factor
        The largest factor.
    language
        A language's code, several times for several; left out, all.
    stories
        The share of problems that are told as a story.
    """
    from qwen2.post.synth.arithmetic import OPERATIONS, Kind, problems
    from qwen2.post.synth.journal import write_lines

    for name, value in (("count", count), ("held-out", held_out), ("solutions", solutions)):
        if value < 0:
            raise ValueError(f"--{name} {value}: must be at least 0")
    kind = Kind(OPERATIONS if operation is None else operation, largest, largest_factor, language or (), stories)
    drawn = problems(count + solutions, "train", seed, kind)
    files = {
        "train.jsonl": [problem.row() for problem in drawn[:count]],
        "held-out.jsonl": [problem.row() for problem in problems(held_out, "held-out", seed, kind)],
        "sft.jsonl": [problem.solved(worked) for problem in drawn[count:]],
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        if rows:
            write_lines(out / name, rows)
            print(f"{out / name}: {len(rows):,} {'conversations' if name == 'sft.jsonl' else 'problems'}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _params(sampling: Flags) -> SamplingParams:
    params = params_of(sampling)
    return replace(params, max_tokens=MAX_TOKENS) if params.max_tokens is None else params


def _neutral(params: SamplingParams) -> SamplingParams:
    """With nothing left to the model's defaults that would choose other tokens: a penalty that suits chats makes sums wrong."""
    from qwen2.engine.request import ResolvedParams

    return replace(params, **{name: getattr(ResolvedParams, name) for name in NEUTRAL if getattr(params, name) is None})


def _read(asking: Asking, paths: tuple[Path, ...]) -> tuple[Checker, Prompts]:
    """The checker and the prompts, before a model is loaded."""
    from qwen2.post.checks.checkers import TestChecker
    from qwen2.post.synth.prompts import read_prompts

    if not paths:
        raise ValueError("name the files with prompts behind the model")
    checker = make_checker(asking.check, asking.check_seconds, asking.check_memory << 20)
    for missing in checker.sandbox.missing if isinstance(checker, TestChecker) else ():
        _say(f"the sandbox for programs lacks {missing}; run this in a container, or as a user who has nothing to lose")
    return checker, read_prompts(paths, checker, asking.system, asking.prompt_column, asking.answer_column, asking.skip_broken)


def _show(measured: Measured) -> None:
    for column in ("language", "source"):
        groups = measured.by(column)
        for name, estimate in groups.items():
            if len(groups) > 1:
                print(f"{column} {name or '-'}: {estimate}")
    for reason, count in measured.not_judged().items():
        print(f"counted as wrong: {count:,} x {reason}")
    print(f"exact match {measured.match}")


def _report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
    problems = report.get("problems") if isinstance(report, dict) else None
    if not isinstance(problems, list) or not all(isinstance(one, dict) and one.keys() >= {"key", "right"} for one in problems):
        raise ValueError(f"{path}: not what qwen2 synth exact --out writes: it has no problems with their answers")
    return report


def _sampler(model: str, asking: Asking, params: SamplingParams) -> EngineSampler:
    """The loaded model; of a training run its last word. An adapter stays beside its base's own weights wherever that can be."""
    from qwen2.cli.pull import ensure
    from qwen2.cli.serve import check_device
    from qwen2.engine.llm import LLM
    from qwen2.post.synth.sampling import EngineSampler, digest_of_weights
    from qwen2.train.place import is_run
    from qwen2.train.saved import files_of, take, unmerged

    check_device(asking.device)
    how: dict[str, Any] = {"device": asking.device, "threads": asking.threads, "max_batch": asking.max_batch}
    files, path = files_of(model), Path(model)
    if asking.adapter is not None:
        if files is None:
            cure = "name the model below it, or merge it first with qwen2 export"
            raise ValueError(f"--adapter {asking.adapter}: {model} is an adapter or a checkpoint itself: {cure}")
        beside: tuple[str, Path] | None = files, adapter_folder(asking.adapter)
    else:
        beside = None if files is not None else unmerged(model, _say)
    if beside is not None:
        base, folder = beside
        ensure(base)
        llm = LLM(base, adapter=folder, **how)
        run = folder.absolute().parent
        of_run = folder.name == ADAPTER and is_run(run)
        return EngineSampler(llm, params, f"{_named(base, llm)} with the adapter {run.name if of_run else folder.absolute().name}")
    if files is not None:
        ensure(files)
        llm = LLM(files, **how)
        return EngineSampler(llm, params, _named(files, llm))
    loaded = take(path, _say)
    _say(f"{path}: its weights exist merged, in float32, alone: computed by torch; qwen2 export makes a model of them that samples faster")
    return EngineSampler(LLM(loaded, **how), params, path.absolute().name, digest_of_weights(loaded))


def _named(files: str, llm: LLM) -> str:
    """What rows call a model: its own name, of a run's model the run's."""
    from qwen2.train.place import is_run

    run = Path(files).absolute().parent
    return run.name if Path(files).name == "model" and is_run(run) else llm.model.name
