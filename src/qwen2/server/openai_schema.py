"""The bodies of OpenAI's requests, as pydantic reads them: every field is used, named as harmless, or refused.

Spec: platform.openai.com/docs/api-reference. `top_k`, `min_p`, `repetition_penalty` (also as `repeat_penalty`), `stop_token_ids`,
`ignore_eos`, `prompt_logprobs`, `structured_outputs`, `priority`, `cache_prompt`, and -1 for off or no limit are taken as other
servers take them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    Strict,
    WithJsonSchema,
    model_validator,
)

from qwen2.engine.calls import ToolChoice
from qwen2.engine.constraint import Constraint
from qwen2.engine.request import SamplingParams
from qwen2.server.errors import ApiError

IMAGES = ("image", "image_url", "input_image")


class Body(BaseModel):
    """Nothing unknown passes, and no text or truth value for a number. A field that is null says nothing, whatever its name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def whole(cls, value: Any) -> Any:
        """JSON has one kind of number: 1.0 is whole. Many clients write the fields that were not set, as null."""
        if not isinstance(value, dict):
            return value
        said = {key: one for key, one in value.items() if one is not None}
        return {key: int(one) if isinstance(one, float) and one.is_integer() else one for key, one in said.items()}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The same for the server's specification."""
        found = handler(core)
        schema = handler.resolve_ref_schema(found)
        for name, one in schema.get("properties", {}).items():
            if name not in schema.get("required", ()) and {"type": "null"} not in one.get("anyOf", ()):
                shown = {key: one.pop(key) for key in ("title", "default", "description") if key in one}
                schema["properties"][name] = {"anyOf": [one, {"type": "null"}], **shown}
        schema["additionalProperties"] = {"type": "null"}
        return found


def offered(value: Any, kinds: Collection[str], place: str = "content") -> Any:
    """A list of parts as it came, if all are of these kinds; else plain words instead of a list of what each kind wants."""
    for one in value if isinstance(value, list) else ():
        kind = one.get("type") if isinstance(one, dict) else None
        if isinstance(kind, str) and kind not in kinds:
            if kind in IMAGES:
                raise ValueError("images are not offered: these models read text only")
            raise ValueError(f"{place} of type {kind!r:.80} is not offered: there is {', '.join(kinds)}")
    return value


def choosable(value: Any) -> Any:
    """A tool_choice as it came, if it is of a kind that there is."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "allowed_tools":
        raise ValueError("allowed_tools is not offered: send only those tools, and the mode, auto or required, as tool_choice")
    if isinstance(kind, str) and kind != "function":
        raise ValueError(f"type {kind!r:.80} is not offered: there are auto, none, required, and a function by its name")
    return value


def _off(value: bool) -> bool:
    if value:
        raise ValueError("only false is offered")
    return value


def _on(value: bool) -> bool:
    if not value:
        raise ValueError("only true is offered")
    return value


def _one(value: float) -> float:
    if value != 1:
        raise ValueError("only 1 is offered")
    return value


One = Annotated[float, AfterValidator(_one), WithJsonSchema({"type": "number", "const": 1})]
On = Annotated[bool, AfterValidator(_on), WithJsonSchema({"type": "boolean", "const": True})]
Off = Annotated[bool, AfterValidator(_off), WithJsonSchema({"type": "boolean", "const": False})]
BIASES = {"type": "object", "propertyNames": {"pattern": "^[0-9]{1,9}$"}, "additionalProperties": {"type": "number"}}
Biases = Annotated[dict[Annotated[int, Strict(False)], float], WithJsonSchema(BIASES)]  # JSON's keys are texts


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # padding against an observer of the network; ours is this machine


class Harmless(Body):
    """Fields that cannot change an answer: they are for the account, the bill and the store of OpenAI's own service."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None


class Chosen(Harmless):
    """How tokens are chosen and where they end; what vLLM has beside it is taken where it says what is so in any case."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None  # llama.cpp's name of the same
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Biases | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    length_penalty: One | None = None
    typical_p: One | None = None
    best_of: One | None = None
    echo: Off | None = None
    use_beam_search: Off | None = None
    include_stop_str_in_output: Off | None = None
    skip_special_tokens: On | None = None
    spaces_between_special_tokens: On | None = None

    def chosen(self) -> dict[str, Any]:
        """As the engine takes them; None is the model's own default."""
        if len({self.repetition_penalty, self.repeat_penalty} - {None}) > 1:
            raise ApiError(400, "repetition_penalty and repeat_penalty differ: send one of them", field="repeat_penalty")
        same = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "seed", "stop")
        return {name: getattr(self, name) for name in same} | {
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "repetition_penalty": self.repeat_penalty if self.repetition_penalty is None else self.repetition_penalty,
            "logit_bias": {} if self.logit_bias is None else self.logit_bias,
            "stop_token_ids": () if self.stop_token_ids is None else self.stop_token_ids,
            "ignore_eos": bool(self.ignore_eos),
        }

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Sampling(Chosen):
    """What every request that writes some tokens says, but one to /v1/responses."""

    model: str
    n: int | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)  # vLLM's
    priority: int = Field(default=0, ge=-(1 << 31), lt=1 << 31)  # vLLM's: the smaller, the sooner
    cache_prompt: On | None = None  # llama.cpp's: every prompt's beginning is looked for in the cache

    def params(
        self, max_tokens: int | None, logprobs: int | None, constraint: Constraint | None = None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """As the engine takes them; ValueError names what is out of range."""
        return SamplingParams(
            **self.chosen(),
            max_tokens=None if max_tokens == -1 else max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            n=self.samples,
            constraint=constraint,
        )

    @property
    def samples(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class Schema(Body):
    """Of `response_format`; the schema always holds, strict or not."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")


class PlainFormat(Body):
    type: Literal["text", "json_object"]

    def constraint(self) -> Constraint | None:
        """The form that answers are held to."""
        return None if self.type == "text" else Constraint.json_object()


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: Schema

    def constraint(self) -> Constraint:
        """The form that answers are held to."""
        return Constraint.json_schema(self.json_schema.schema_)


class RegexFormat(Body):
    """An extension: texts that match as a whole."""

    type: Literal["regex"]
    regex: str

    def constraint(self) -> Constraint:
        """The form that answers are held to."""
        return Constraint.regex(self.regex)


class GrammarFormat(Body):
    """An extension: texts of a grammar in Lark's notation."""

    type: Literal["grammar"]
    grammar: str

    def constraint(self) -> Constraint:
        """The form that answers are held to."""
        return Constraint.grammar(self.grammar)


class ChoiceFormat(Body):
    """An extension: one of these texts."""

    type: Literal["choice"]
    choices: list[str]

    def constraint(self) -> Constraint:
        """The form that answers are held to."""
        return Constraint.choice(self.choices)


ResponseFormat = Annotated[PlainFormat | SchemaFormat | RegexFormat | GrammarFormat | ChoiceFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """vLLM's way to ask for a form; a grammar is in Lark's notation."""

    json_: dict[str, Any] | bool | None = Field(default=None, alias="json")
    json_object: On | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def constraint(self) -> Constraint:
        """The form that answers are held to."""
        forms: dict[str, Callable[[Any], Constraint]] = {
            "json_": Constraint.json_schema,
            "json_object": lambda _: Constraint.json_object(),
            "regex": Constraint.regex,
            "choice": Constraint.choice,
            "grammar": Constraint.grammar,
        }
        said = [name for name in forms if getattr(self, name) is not None]
        if len(said) != 1:
            raise ApiError(
                400, "structured_outputs: say json, json_object, regex, choice or grammar, one of them", field="structured_outputs"
            )
        return forms[said[0]](getattr(self, said[0]))


class Formed(Sampling):
    """Whose answers may be held to a form."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    def form(self) -> Constraint | None:
        """The one that is asked for."""
        if self.response_format is not None and self.structured_outputs is not None:
            raise ApiError(400, "response_format and structured_outputs both ask for a form: send one of them", field="structured_outputs")
        asked = self.response_format if self.structured_outputs is None else self.structured_outputs
        return None if asked is None else asked.constraint()


class Chat(Formed):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Annotated[Literal["auto", "none", "required"] | NamedTool | None, BeforeValidator(choosable)] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None  # of models that think before they answer: these do not
    verbosity: Literal["medium"] | None = None  # OpenAI's default, as clients send it
    modalities: list[Literal["text"]] | None = None
    continue_final_message: bool | None = None  # vLLM's: the last message is the beginning of the answer
    add_generation_prompt: bool | None = None  # its opposite

    @property
    def choice(self) -> ToolChoice:
        """As the engine takes it: a named function is called once, as OpenAI does it."""
        if isinstance(self.tool_choice, NamedTool):
            return ToolChoice(name=self.tool_choice.function.name, parallel=False)
        return ToolChoice("required" if self.tool_choice == "required" else "auto", parallel=self.parallel_tool_calls is not False)


class Completion(Formed):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    suffix: str | None = None  # what is written stands between prompt and suffix
    echo: bool | None = None


class Embedding(Harmless):
    """POST /v1/embeddings."""

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)  # of longer vectors the first, made one of length one again


class Tokenize(Body):
    """POST /tokenize: a text, or a conversation with the model's template around it."""

    model: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class Detokenize(Body):
    """POST /detokenize."""

    model: str
    tokens: list[int]
