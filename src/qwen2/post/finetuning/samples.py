"""What the model answers while it learns: the same prompts at each evaluation, greedily, by the engine.

RUN/samples.jsonl has a line for each answer: step, prompt, answer, and what the data says. Where a step comes again, in a run that is
resumed or went back from a spike, its lines and those behind it go first. Prompts are rendered as the server renders them.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwen2.engine.llm import LLM
from qwen2.engine.request import SamplingParams
from qwen2.train.metrics import read_lines

if TYPE_CHECKING:
    from qwen2.model import Qwen2
    from qwen2.post.finetuning.settings import SftSettings
    from qwen2.post.rows.records import Example
    from qwen2.weights.model import Model

SHOWN = 200  # characters of a prompt or an answer on the terminal


class Samples:
    """Prompts to be answered again and again. Those that leave no room for an answer in the window are left out."""

    def __init__(self, examples: Sequence[Example], model: Model, settings: SftSettings, path: Path) -> None:
        self.model, self.path = model, path
        self.params = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=settings.sample_tokens)
        self.asked: list[tuple[list[int], str, str]] = []  # ids of the prompt, its last message, what the data answers
        for example in examples[: settings.samples]:
            last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
            if not last:
                continue
            ids = model.template.render(example.messages[:last], example.tools).ids
            if len(ids) + settings.sample_tokens <= model.config.window:
                self.asked.append((ids, example.messages[last - 1]["content"], said(example.messages[last])))
        self.last = math.inf  # the step that was written last; of an earlier start of the run any may have been

    def __call__(self, network: Qwen2, step: int) -> None:
        """Answer the prompts, write the answers down and show them."""
        if not self.asked:
            return
        if step <= self.last:
            self._back_to(step)
        with torch.random.fork_rng(devices=[]), torch.autocast(network.device.type, enabled=False):
            llm = LLM(replace(self.model, network=network), context=self._window(), max_batch=len(self.asked))
            outputs = llm.generate([ids for ids, _, _ in self.asked], self.params, progress=False)
        lines = []
        for (_, prompt, reference), output in zip(self.asked, outputs, strict=True):
            line = {"step": step, "prompt": prompt, "answer": output.text, "reference": reference, "ended": output.finish_reason == "stop"}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            print(f"  {shown(prompt)}\n  -> {shown(output.text)}{'' if line['ended'] else ' ...'}", file=sys.stderr, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
        self.last = step

    def _window(self) -> int:
        """As much room as the longest prompt needs."""
        limit = self.params.max_tokens
        assert limit is not None
        return max(len(ids) for ids, _, _ in self.asked) + limit

    def _back_to(self, step: int) -> None:
        """Take away what was said at this step or later."""
        kept = [line for line in read_lines(self.path) if line["step"] < step]
        draft = self.path.with_name(f".{self.path.name}.part")
        draft.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8")
        os.replace(draft, self.path)


def said(message: dict[str, Any]) -> str:
    """What a message says, its calls as JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    return "\n".join(part for part in (message["content"], *calls) if part)


def shown(text: str) -> str:
    """One line of a text."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."
