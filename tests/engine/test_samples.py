"""Samples of one request: they read the prompt once and share its blocks."""

from __future__ import annotations

from qwen2 import SamplingParams
from qwen2.engine.blocks import BLOCK


def test_samples_share_the_blocks_of_their_prompt(llm, monkeypatch):
    engine, seen, read = llm.engine, [], []
    forward = engine.runner.forward

    def watched(batch):
        read.append(sum(span.count for span in batch))
        if len(batch) == 6:
            first, *others = (span.answer.cache.blocks for span in batch)
            shared = [block for block in first if all(block is other[i] for i, block in enumerate(first[:4]) for other in others)]
            seen.append((len(shared) >= 4, first[0].refs, engine.cache.pool.taken))
        return forward(batch)

    monkeypatch.setattr(engine.runner, "forward", watched)
    prompt = list(range(4 * BLOCK)) + [7] * 10
    prompt = [token % 256 for token in prompt]
    output = llm.generate([prompt], SamplingParams(temperature=1.0, seed=1, n=6, max_tokens=12, ignore_eos=True))[0]
    assert len({choice.token_ids for choice in output.choices}) > 1
    assert read[0] == len(prompt)
    assert sum(read) == len(prompt) + 6 * 11
    assert seen
    assert all(entry == (True, 6, 4 + 6) for entry in seen)
