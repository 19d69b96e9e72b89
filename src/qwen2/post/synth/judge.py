"""Verdicts on answers while others are sampled: a record of each prompt as soon as all of its answers are judged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qwen2.post.checks.checkers import Verdict

if TYPE_CHECKING:
    from qwen2.post.checks.checkers import Checker
    from qwen2.post.synth.prompts import Prompt
    from qwen2.post.synth.sampling import Answers, Sampled

SOON = 0.05  # seconds that the next prompt waits for verdicts on this one, which most need less than
AHEAD = 64  # prompts whose answers wait for a verdict while others are sampled
CUT = "cut off"  # what is said of an answer that reached max_tokens
Waiting = tuple["Prompt", "Answers | str", list[Future[Verdict]]]  # for verdicts


def judged(sampled: Iterable[tuple[Prompt, Answers | str]], checker: Checker, workers: int) -> Iterator[dict[str, Any]]:
    """The record of each prompt as soon as its verdicts are there; others are sampled while answers are checked."""
    waiting: list[Waiting] = []
    pool = ThreadPoolExecutor(workers)
    try:
        for prompt, answers in sampled:
            listed = [] if isinstance(answers, str) else answers
            futures = [pool.submit(verdict, checker, prompt, one.text, one.finish) for one in listed]
            waiting.append((prompt, answers, futures))
            wait(futures, SOON)
            while ready := [one for one in waiting if all(future.done() for future in one[2])] or waiting[:-AHEAD]:
                waiting = [one for one in waiting if one not in ready]
                yield from (_record(*one) for one in ready)
        yield from (_record(*one) for one in waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def verdict(checker: Checker, prompt: Prompt, text: str, finish: str) -> Verdict:
    """The checker's on a whole answer; one that was cut off is not right."""
    return Verdict(False, CUT) if finish != "stop" else checker.check(text, prompt.row)


def _record(prompt: Prompt, answers: Answers | str, futures: list[Future[Verdict]]) -> dict[str, Any]:
    about = {"key": prompt.key, "where": prompt.where, "row": prompt.judged_by}
    if isinstance(answers, str):
        return {**about, "refused": answers}
    return {**about, "answers": [_line(*pair) for pair in zip(answers, futures, strict=True)]}


def _line(answer: Sampled, future: Future[Verdict]) -> dict[str, Any]:
    verdict = future.result()
    return {**asdict(answer), "right": verdict.right, "said": verdict.said}
