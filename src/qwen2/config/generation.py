"""What a checkpoint says of how it wants to be sampled: the content of generation_config.json.

These are the defaults that `SamplingParams` fields left at None take; nothing is applied that `qwen2 show` does not print. A model
that was made from a Modelfile has its own in their place, and some that a checkpoint has no key for (`weights/modelfile.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen2.config.keys import Keys

if TYPE_CHECKING:
    from collections.abc import Mapping

IGNORED = {
    "transformers_version": "a record of the writer",
    "_from_model_config": "a record of the writer",
    "bos_token_id": "Qwen2 never prepends a token; the tokenizer knows it",
    "pad_token_id": "ragged batches have no padding",
    "use_cache": "decoding always keeps its cache",
    "cache_implementation": "the engine decides",
    "output_attentions": "a return option of transformers' generate",
    "output_hidden_states": "a return option of transformers' generate",
    "return_dict_in_generate": "a return option of transformers' generate",
    "output_scores": "a return option of transformers' generate",
    "max_length": "prompt and answer are bounded by the model's window",
}
NEUTRAL = {  # keys of transformers' generate that change the answer unless they hold this value
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "min_length": 0,
}


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling defaults of a checkpoint; temperature 0 is greedy, top_k 0, top_p 1 and min_p 0 are off,
    and the penalties look at the last `penalty_window` tokens, or at all with -1.

    Raises ValueError for a number outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos: tuple[int, ...] = ()
    max_tokens: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    context: int | None = None  # tokens of prompt and answer together
    penalty_window: int = -1

    def __post_init__(self) -> None:
        in_range = {
            "temperature": 0 <= self.temperature <= 100,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 0.01 <= self.repetition_penalty <= 100,
            "max_tokens": self.max_tokens is None or self.max_tokens > 0,
            "presence_penalty": -2 <= self.presence_penalty <= 2,
            "frequency_penalty": -2 <= self.frequency_penalty <= 2,
            "seed": self.seed is None or -(2**63) <= self.seed < 2**63,
            "stop": all(self.stop),
            "context": self.context is None or self.context > 0,
            "penalty_window": self.penalty_window >= -1,
        }
        for name, fine in in_range.items():
            if not fine:
                raise ValueError(f"generation default {name} {getattr(self, name)!r} is out of range")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> GenerationDefaults:
        """Read generation_config.json; a key that is neither used nor known not to matter is a ValueError that names it."""
        keys = Keys(values, "generation_config.json", IGNORED, NEUTRAL)
        sampled = keys.flag("do_sample", False)
        numbers = {  # the defaults of transformers where the file says nothing
            "temperature": keys.real("temperature", 1.0),
            "top_k": keys.whole("top_k", 50),
            "top_p": keys.real("top_p", 1.0),
            "min_p": keys.real("min_p", 0.0),
        }
        always = {
            "eos": keys.ids("eos_token_id"),
            "repetition_penalty": keys.real("repetition_penalty", 1.0),
            "max_tokens": keys.whole("max_new_tokens", None),
        }
        keys.end("not supported; remove it from the file to go on without it")
        return cls(**always, **(numbers if sampled else {}))

    def to_hf(self) -> dict[str, Any]:
        """The generation_config.json that reads back as this."""
        sampled = self.temperature > 0
        values: dict[str, Any] = {"do_sample": sampled, "eos_token_id": list(self.eos)}
        if sampled:
            values |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            if self.min_p > 0:
                values["min_p"] = self.min_p
        if self.repetition_penalty != 1.0:
            values["repetition_penalty"] = self.repetition_penalty
        if self.max_tokens is not None:
            values["max_new_tokens"] = self.max_tokens
        return values
