"""The flags of adapters: what they stand for, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2.cli.lora_flags import NO_LORA, LoraFlags, lora_settings
from qwen2.config.lora import LoraSettings


def test_what_they_stand_for():
    assert lora_settings(NO_LORA) is None
    assert lora_settings(LoraFlags(lora_rank=8)) == LoraSettings()
    assert lora_settings(LoraFlags(lora_rank=64, qlora=True)) == LoraSettings(rank=64, alpha=128)
    asked = LoraFlags(lora_rank=4, lora_alpha=1, lora_dropout=0.05, lora_targets="q_proj,v_proj", rslora=True, dora=True)
    assert lora_settings(asked) == LoraSettings(4, 1, 0.05, "q_proj,v_proj", True, True)


def test_with_rslora_alpha_is_the_same_at_every_rank():
    """Twice the rank would let the scale grow with it: 16 at rank 64."""
    found = {rank: lora_settings(LoraFlags(lora_rank=rank, rslora=True)) for rank in (4, 16, 64, 256)}
    assert {rank: settings.scale for rank, settings in found.items() if settings} == {4: 4.0, 16: 2.0, 64: 1.0, 256: 0.5}
    plain, rooted = lora_settings(LoraFlags(lora_rank=16)), lora_settings(LoraFlags(lora_rank=16, rslora=True, lora_alpha=32))
    assert plain is not None
    assert plain.scale == 2.0
    assert rooted is not None
    assert rooted.scale == 8.0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lora_alpha": 16.0}, "--lora-alpha: is of adapters; say --lora-rank N too"),
        ({"lora_dropout": 0.0}, "--lora-dropout: is of adapters"),
        ({"qlora": True}, "--qlora: is of adapters"),
        ({"lora_rank": 0}, "--lora-rank 0: must be a whole number of at least 1"),
        ({"lora_rank": 4, "lora_dropout": 1.5}, "--lora-dropout 1.5: must be a number from 0"),
        ({"lora_rank": 4, "lora_targets": ""}, "--lora-targets '': must be all-linear"),
    ],
)
def test_what_they_refuse(given: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        lora_settings(LoraFlags(**given))
