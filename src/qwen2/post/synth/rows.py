"""A finished prompt's rows: conversations for SFT and preference pairs, each with where it comes from.

They hold what the model really read, with what its Modelfile puts before a prompt. Of a conversation the sampled answer alone is
learned: earlier ones have the weight 0, as OpenAI's format and ours write it. An answer without text is in no row, whatever its checker
says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwen2.post.synth.pick import Candidate, pairs, pick
from qwen2.post.synth.sampling import seed_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from qwen2.post.rows.records import Tools
    from qwen2.post.synth.prompts import Prompt
    from qwen2.post.synth.settings import RejectSettings

Rows = list[dict[str, Any]]


def rows_of(
    prompt: Prompt,
    record: dict[str, Any],
    about: dict[str, Any],
    settings: RejectSettings,
    message: Callable[[str, Tools | None], dict[str, Any]],
) -> tuple[Rows, Rows]:
    """SFT rows and pairs of a prompt's record; `about` is what all of a run's rows have in common. The prompt's messages are the rows'.

    `message` makes an assistant's message of what was sampled, with its calls where the prompt has tools.
    """
    listed = [(Candidate(i, one["text"], one["tokens"], one["said"]), one) for i, one in enumerate(record["answers"])]
    whole = [(candidate, one) for candidate, one in listed if candidate.text.strip()]
    right = [candidate for candidate, one in whole if one["right"]]
    wrong = [candidate for candidate, one in whole if one["right"] is False and one["finish"] == "stop"]
    order, least = settings.pick, settings.least_distance
    taken = pick(right, max(settings.per_prompt, settings.pairs_per_prompt), order, least)
    known = {"source": prompt.source, "language": prompt.language, "prompt": prompt.where, "key": prompt.key}
    about = {**about, **{name: value for name, value in known.items() if value}}

    def told(candidate: Candidate) -> dict[str, Any]:
        return {"seed": seed_of(settings.seed, prompt.key) + candidate.index, "sample": candidate.index, "verdict": candidate.said}

    def turn(candidate: Candidate) -> dict[str, Any]:
        return message(candidate.text, prompt.tools)

    tools = {"tools": prompt.tools} if prompt.tools else {}
    before = [{**one, "weight": 0} if one["role"] == "assistant" else one for one in prompt.messages]
    sft: Rows = [
        {"messages": [*before, turn(candidate)], **tools, "provenance": {**about, **told(candidate)}}
        for candidate in taken[: settings.per_prompt]
    ]
    chosen: Rows = [
        {
            "prompt": prompt.messages,
            "chosen": [turn(good)],
            "rejected": [turn(bad)],
            **tools,
            "provenance": {**about, "rule": settings.rejected, "chosen": told(good), "rejected": told(bad)},
        }
        for good, bad in pairs(taken, wrong, settings.pairs_per_prompt, settings.rejected)
    ]
    return sft, chosen
