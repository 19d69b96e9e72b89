"""Rejection sampling: k answers to each prompt, those kept that a checker says are right, as SFT rows and preference pairs.

The folder of a run holds config.json (which model, how it was sampled, the seed), answers.jsonl (a line per finished prompt with all of
its answers and their verdicts, on the disk before the next), and, written anew at the end from these, sft.jsonl, pairs.jsonl and
summary.json, in the order of the prompts. Whatever ends a run, the same call goes on with the prompts that are not finished. How rows
are chosen may change between two calls; where the checker or a row changed, answers that are there are judged again, not sampled again.

Left out: several models at once, and stopping early where a prompt has enough right answers (pass@k would be biased).

    reject(EngineSampler(llm, SamplingParams(temperature=1)), prompts, make_checker("number"), RejectSettings(k=16), Path("out"))
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen2.post.synth.journal import Journal, write_lines
from qwen2.post.synth.judge import CUT, judged, verdict
from qwen2.post.synth.progress import Progress
from qwen2.post.synth.rows import rows_of
from qwen2.post.synth.settings import RejectSettings
from qwen2.post.synth.summary import Summary, summarise
from qwen2.train.folder import write_json
from qwen2.weights.json_object import read_json
from qwen2.weights.locks import alone

if TYPE_CHECKING:
    from qwen2.post.checks.checkers import Checker
    from qwen2.post.synth.prompts import Prompt, Prompts
    from qwen2.post.synth.sampling import Sampler

CONFIG, ANSWERS, SFT, PAIRS, SUMMARY = "config.json", "answers.jsonl", "sft.jsonl", "pairs.jsonl", "summary.json"
KIND = "rejection sampling"
TRIED = 64  # verdicts after which a checker that failed on every one is not asked again


def reject(
    sampler: Sampler,
    prompts: Prompts,
    checker: Checker,
    settings: RejectSettings,
    out: Path,
    say: Callable[[str], None] = lambda text: None,
    shown: bool | Literal["auto"] = False,
) -> Summary:
    """Sample, check, choose, write; go on where `out` holds the beginning of the same run. `shown` is the progress on stderr.

    Raises ValueError where `out` is another run's or anybody else's, where a checker fails on everything, and OSError where the disk
    does; what was finished before is kept.
    """
    with alone(out, KIND):
        _check_folder(out)
        with Journal(out / ANSWERS) as journal:
            if journal.torn:
                say(f"{journal.path}: its last line was torn ({journal.torn:,} bytes): cut off, and its prompt is asked again")
            todo = _todo(out, journal, prompts)
            answers = sampler.sample(todo, settings.k, settings.seed)
            _begin(out, journal, prompts, sampler, checker, settings, say)
            if done := len(prompts.found) - len(todo):
                say(f"{out}: {done:,} of {len(prompts.found):,} prompts are finished")
            try:
                with Progress(len(prompts.found), done, shown) as progress, closing(answers):
                    useful, tried = False, Counter[str]()
                    for record in judged(answers, checker, settings.workers):
                        journal.append(record)
                        progress.prompt(record)
                        told = [answer for answer in record.get("answers", ()) if answer["said"] != CUT]
                        useful = useful or any(answer["right"] is not None for answer in told)
                        tried.update(answer["said"] for answer in told)
                        if not useful and tried.total() >= TRIED:
                            raise ValueError(_useless(checker, tried, out))
            finally:  # also of a run that is broken off there are rows then
                summary = _write(out, journal, prompts, sampler, checker, settings)
        return summary


def _check_folder(out: Path) -> None:
    """ValueError where the folder is somebody else's."""
    if (out / CONFIG).exists():
        if read_json(out / CONFIG).get("kind") != KIND:
            raise ValueError(f"{out}: holds a run of another kind; name another folder with --out")
    elif strange := sorted(path.name for path in out.iterdir() if path.name != ".lock" and path.stat().st_size):
        raise ValueError(f"{out}: holds other files ({strange[0]}); name another folder with --out")


def _todo(out: Path, journal: Journal, prompts: Prompts) -> list[Prompt]:
    """The prompts that are not finished. ValueError where others are."""
    finished, asked = {record.get("key") for record in journal.records}, {prompt.key for prompt in prompts.found}
    if gone := len(finished - asked):
        lost = f"{out}: holds answers to {gone:,} prompts that are not in these files"
        raise ValueError(f"{lost}; give the files that it was started with (more prompts may be added), or another folder with --out")
    return [prompt for prompt in prompts.found if prompt.key not in finished]


def _identity(sampler: Sampler, settings: RejectSettings) -> dict[str, Any]:
    """What answers depend on."""
    model = {"digest": sampler.digest}
    return {"model": model, "sampling": json.loads(json.dumps(sampler.params)), "answers": {"k": settings.k, "seed": settings.seed}}


def _begin(
    out: Path, journal: Journal, prompts: Prompts, sampler: Sampler, checker: Checker, settings: RejectSettings, say: Callable[[str], None]
) -> None:
    """See that this is the run that the folder holds, judge again where the checker changed, write down what the run is now."""
    wanted, path = _identity(sampler, settings), out / CONFIG
    if path.exists():
        written = read_json(path)
        for section, values in wanted.items():
            theirs = written.get(section, {})
            for name in sorted((values.keys() | theirs.keys()) - {"name"}):
                if theirs.get(name) != values.get(name):
                    was = f"{section} {name} was {theirs.get(name)}, not {values.get(name)}"
                    raise ValueError(f"{out}: {was}; go on with it as it was started, or name another folder with --out")
        changed = written.get("checker", {}).get("digest") != checker.digest
        rows = {prompt.key: prompt for prompt in prompts.found}
        stale = [record for record in journal.records if changed or record.get("row") != rows[record["key"]].judged_by]
        if stale:
            what = "the checker is" if changed else "rows are"
            say(f"{out}: {what} not the one{'' if changed else 's'} of before: the answers to {len(stale):,} prompts are judged again")
            _judge_again(journal, stale, rows, checker, settings)
    choosing = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in ("k", "seed", "workers")}
    wanted["model"]["name"] = sampler.name
    write_json(path, {"kind": KIND, **wanted, "checker": {"name": checker.name, "digest": checker.digest}, "choosing": choosing})


def _judge_again(
    journal: Journal, stale: Sequence[dict[str, Any]], rows: Mapping[str, Prompt], checker: Checker, settings: RejectSettings
) -> None:
    def again(record: dict[str, Any]) -> dict[str, Any]:
        prompt = rows[record["key"]]
        judged = pool.map(lambda one: verdict(checker, prompt, one["text"], one["finish"]), record.get("answers", ()))
        answers = [{**one, "right": new.right, "said": new.said} for one, new in zip(record.get("answers", ()), judged, strict=True)]
        return {**record, "row": prompt.judged_by, **({} if "refused" in record else {"answers": answers})}

    with ThreadPoolExecutor(settings.workers) as pool:
        new = {record["key"]: again(record) for record in stale}
    journal.rewrite([new.get(record["key"], record) for record in journal.records])


def _useless(checker: Checker, tried: Counter[str], out: Path) -> str:
    """Why there is no use in sampling the rest."""
    cure = f"mend it, then the same command goes on; what was sampled is kept in {out}"
    return f"check {checker.name} failed on each of the first {tried.total()} answers, mostly so: {tried.most_common(1)[0][0]}; {cure}"


def _write(out: Path, journal: Journal, prompts: Prompts, sampler: Sampler, checker: Checker, settings: RejectSettings) -> Summary:
    """Rows and summary of what is finished, in the order of the prompts."""
    records = {record["key"]: record for record in journal.records}
    finished = [(prompt, records[prompt.key]) for prompt in prompts.found if prompt.key in records]
    about = {"model": sampler.name, "digest": sampler.digest, "sampling": sampler.params, "checker": checker.name}
    asked = [(replace(prompt, messages=sampler.conversation(prompt.messages)), record) for prompt, record in finished]
    chosen = [rows_of(prompt, record, about, settings, sampler.message) for prompt, record in asked if "refused" not in record]
    sft, pairs = [row for rows, _ in chosen for row in rows], [row for _, rows in chosen for row in rows]
    write_lines(out / SFT, sft)
    write_lines(out / PAIRS, pairs)
    summary = summarise(prompts, finished, settings.k, len(sft), len(pairs))
    write_json(out / SUMMARY, asdict(summary))
    return summary
