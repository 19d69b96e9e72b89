"""What a checkpoint says of how it wants to be sampled: the content of generation_config.json.

These are the defaults that `SamplingParams` fields left at None take; nothing is applied that `qwen2 show` does not print.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
NEUTRAL = {  # keys of transformers' generate that change the answer unless they hold one of these values
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1.0,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "min_length": (0,),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling defaults of a checkpoint; temperature 0 is greedy, top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos: tuple[int, ...] = ()
    max_tokens: int | None = None

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> GenerationDefaults:
        """Read generation_config.json; a key that is neither used nor known not to matter is a ValueError that names it."""
        rest = {key: value for key, value in values.items() if key not in IGNORED and value is not None}
        sampled = bool(rest.pop("do_sample", False))
        eos = rest.pop("eos_token_id", ())
        chosen: dict[str, Any] = {"eos": (eos,) if isinstance(eos, int) else tuple(eos)}
        for key, default in (("temperature", 1.0), ("top_k", 50), ("top_p", 1.0), ("min_p", 0.0)):
            value = rest.pop(key, default)  # the defaults of transformers where the file says nothing
            if sampled:
                chosen[key] = type(default)(value)
        chosen["repetition_penalty"] = float(rest.pop("repetition_penalty", 1.0))
        chosen["max_tokens"] = rest.pop("max_new_tokens", None)
        for key, neutral in NEUTRAL.items():
            if rest.get(key, neutral[0]) in neutral:
                rest.pop(key, None)
        if rest:
            unknown = ", ".join(sorted(rest))
            raise ValueError(f"generation_config.json: {unknown}: not supported; remove it from the file to go on without it")
        return cls(**chosen)

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
