"""The dry run's parts: tokens with their mask, lengths, and estimates that follow the shapes."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from qwen2.config import tiny
from qwen2.config.lora import LoraSettings
from qwen2.model.lora import add_lora, lora_parameters
from qwen2.post.estimate import CHUNK, STATE, adapter_parameters, expected
from qwen2.post.rows.preview import histogram, show
from tests.conftest import random_network, tiny_tokenizer
from tests.post.conftest import gathered, small


def painted(ids: list[int], mask: list[bool], terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system="standard" if terminal else None, width=40)
    show(console, tokenizer, ids, mask)
    return console.file.getvalue()  # type: ignore[attr-defined]


tokenizer = tiny_tokenizer()


def test_learned_tokens_are_green_or_in_brackets() -> None:
    ids, mask = gathered(small()).examples.example(0)
    text = tokenizer.decode(ids)
    plain = painted(ids, mask, terminal=False)
    assert plain.replace("[", "").replace("]", "") == text + "\n"
    assert re.findall(r"\[(.*?)\]", plain, re.DOTALL) == [
        answer + "<|im_end|>" for answer in re.findall(r"assistant\n(.*?)<\|im_end\|>", text, re.DOTALL)
    ]
    coloured = painted(ids, mask, terminal=True)
    green = "".join(re.findall(r"\x1b\[(?:1;)?(?:32|92)m(.*?)\x1b\[0m", coloured, re.DOTALL))
    assert green == "".join(re.findall(r"\[(.*?)\]", plain, re.DOTALL))
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == text + "\n"


def test_markup_in_the_data_stays_text() -> None:
    ids = tokenizer.encode("[bold]the fox[/bold] [red]")
    assert "[bold]the fox[/bold] [red]" in painted(ids, [False] * len(ids), terminal=False)


def test_long_examples_are_shown_in_part() -> None:
    ids = tokenizer.encode("the fox " * 500)
    assert painted(ids, [True] * len(ids), terminal=False).endswith(f"]\n... and {len(ids) - 400:,} more tokens\n")


def test_the_histogram_counts_every_example() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 300)
    lines = histogram(lengths, 512)
    assert sum(int(line.rpartition(" ")[2]) for line in lines) == 300
    assert len(lines) == 8
    assert histogram(np.array([1]), 512)[0].endswith(" 1")


@pytest.mark.parametrize("targets", ["all-linear", "attention", "q_proj,down_proj"])
def test_adapters_are_counted_as_they_are_made(targets: str) -> None:
    config, settings = tiny(), LoraSettings(rank=4, targets=targets)
    network = random_network(config)
    add_lora(network, settings)
    assert adapter_parameters(config, settings) == sum(parameter.numel() for parameter in lora_parameters(network).values())


def test_estimates_follow_what_they_are_of() -> None:
    config, settings, lora = tiny(layers=8, hidden=512, ffn=1536), small(), LoraSettings(rank=4)
    given = {"tokens": 1000, "learned": 300, "packed_bytes": 0, "rate": 1e9, "half": False}
    whole = expected(config, settings, lora=None, **given)  # type: ignore[arg-type]
    adapted = expected(config, settings, lora=lora, **given)  # type: ignore[arg-type]
    packed = expected(config, settings, lora=lora, **{**given, "packed_bytes": 1_000_000})  # type: ignore[arg-type]
    assert whole.weights > config.parameters() * STATE
    assert packed.weights < adapted.weights < whole.weights / 3
    assert adapted.seconds < whole.seconds
    fewer = expected(config, replace(settings, micro_batch=1), lora=None, **given)  # type: ignore[arg-type]
    again = expected(config, replace(settings, recompute="layers"), lora=None, **given)  # type: ignore[arg-type]
    assert fewer.activations < whole.activations
    assert again.activations - CHUNK < (whole.activations - CHUNK) / 2
    assert again.seconds > whole.seconds
    assert fewer.memory - fewer.weights < whole.memory - whole.weights
