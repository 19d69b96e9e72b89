"""generation_config.json: the published text, round trips, refusals by name."""

from __future__ import annotations

import pytest

from qwen2.config import FAMILY, GenerationDefaults

PUBLISHED = {  # Qwen2-0.5B-Instruct, whole
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.1,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}


def test_the_published_file_is_the_familys_row():
    assert GenerationDefaults.from_hf(PUBLISHED) == FAMILY["qwen2:0.5b"].generation


@pytest.mark.parametrize("name", FAMILY)
def test_to_hf_and_back_is_the_same(name: str):
    generation = FAMILY[name].generation
    assert GenerationDefaults.from_hf(generation.to_hf()) == generation


def test_without_sampling_the_other_numbers_do_not_count():
    assert GenerationDefaults.from_hf({"do_sample": False, "temperature": 0.7, "top_p": 0.8}) == GenerationDefaults()


def test_sampling_without_numbers_takes_those_of_transformers():
    read = GenerationDefaults.from_hf({"do_sample": True})
    assert (read.temperature, read.top_k, read.top_p, read.min_p) == (1.0, 50, 1.0, 0.0)


@pytest.mark.parametrize("key", ["penalty_alpha", "made_up"])
def test_a_key_that_would_change_the_answer_is_refused(key: str):
    message = f"generation_config.json: {key}: not supported; remove it from the file to go on without it"
    with pytest.raises(ValueError, match=message):
        GenerationDefaults.from_hf(PUBLISHED | {key: 4})


@pytest.mark.parametrize(("key", "neutral"), [("num_beams", 1), ("no_repeat_ngram_size", 0)])
def test_a_key_with_a_neutral_value_must_hold_it(key: str, neutral: int):
    with pytest.raises(ValueError, match=f"generation_config.json: {key} 4 is not supported, only {neutral}"):
        GenerationDefaults.from_hf(PUBLISHED | {key: 4})


def test_neutral_values_pass():
    assert GenerationDefaults.from_hf(PUBLISHED | {"num_beams": 1, "typical_p": 1.0, "length_penalty": 1.0}).temperature == 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1}, "generation default temperature -1.0 is out of range"),
        ({"temperature": float("nan")}, "generation_config.json: temperature is nan, must be a finite number"),
        ({"top_k": -1}, "generation default top_k -1 is out of range"),
        ({"top_p": "x"}, "generation_config.json: top_p is 'x', must be a finite number"),
        ({"max_new_tokens": "x"}, "generation_config.json: max_new_tokens is 'x', must be a whole number"),
        ({"eos_token_id": "x"}, "generation_config.json: eos_token_id is 'x', must be a whole number or a list of them"),
        ({"do_sample": "yes"}, "generation_config.json: do_sample is 'yes', must be true or false"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, object], message: str):
    with pytest.raises(ValueError) as error:
        GenerationDefaults.from_hf(PUBLISHED | changes)
    assert str(error.value) == message
