"""The bodies of Ollama's requests: every field is used, named as one that cannot change an answer, or refused.

Spec: github.com/ollama/ollama/blob/main/docs/api.md.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from qwen2.engine.constraint import Constraint
from qwen2.engine.request import SamplingParams
from qwen2.server.errors import ApiError
from qwen2.server.openai_schema import Body, Off
from qwen2.weights.parameters import OFF

TIME = {"type": "string", "pattern": r"^-?([0-9]{1,9}|([0-9]{1,9}(ns|us|ms|s|m|h))+)$"}
KeepAlive = Annotated[float | str, WithJsonSchema({"anyOf": [{"type": "number"}, TIME]})]


class Options(Body):
    """How tokens are chosen; what concerns only the machine is accepted and has no effect on an answer."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_last_n: int | None = None  # that the three penalties look at
    seed: int | None = None
    stop: list[str] | str | None = None
    num_predict: int | None = None
    num_ctx: int | None = Field(default=None, ge=1)
    # where and how it is computed
    numa: bool | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    num_keep: int | None = None  # of a prompt that is cut; here none is
    # transforms that there are not here: only switched off
    tfs_z: float | None = None
    typical_p: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    penalize_newline: bool | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def params(self, logprobs: int | None, constraint: Constraint | None = None) -> SamplingParams:
        """As the engine takes them. ApiError names a transform that there is not."""
        for name, off in OFF.items():
            value = getattr(self, name)
            if value is not None and value != off:
                raise ApiError(400, f"options.{name} is {value}: only {off} is offered, which leaves everything as it is")
        most = self.num_predict
        if most is not None and most < -2:
            raise ApiError(400, f"options.num_predict is {most}: a number of tokens, or -1 for as many as the window has room for")
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            penalty_window=self.repeat_last_n,
            seed=self.seed,
            stop=self.stop,
            max_tokens=None if most is None or most < 0 else most,
            logprobs=logprobs,
            context=self.num_ctx,
            constraint=constraint,
        )


class Asking(Body):
    """What chat and generate have in common."""

    model: str
    stream: bool = True
    options: Options = Options()
    format: Literal["", "json"] | dict[str, Any] | None = None
    keep_alive: KeepAlive | None = None
    think: Off | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    def params(self) -> SamplingParams:
        """As the engine takes them."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs goes with logprobs: true")
        form = None
        if self.format:
            form = Constraint.json_object() if self.format == "json" else Constraint.json_schema(self.format)
        return self.options.params(self.likeliest, form)

    @property
    def likeliest(self) -> int | None:
        """How many log-probabilities beside each token's own."""
        return (self.top_logprobs or 0) if self.logprobs else None


class Chat(Asking):
    """POST /api/chat; without messages the model is loaded, and with keep_alive 0 unloaded."""

    messages: list[dict[str, Any]] = Field(default_factory=list)
    tools: list[dict[str, Any]] | None = None


class Generate(Asking):
    """POST /api/generate; without a prompt the model is loaded or unloaded."""

    prompt: str = ""
    suffix: str = ""
    system: str | None = None
    template: Literal[""] | None = None
    context: list[int] | None = None
    raw: bool = False
    images: list[str] = Field(default_factory=list, max_length=0)


class Embed(Body):
    """POST /api/embed."""

    model: str
    input: str | list[str]
    truncate: bool = False  # Ollama cuts unless it is told not to; here only who asks for it loses the end of a text
    dimensions: int | None = Field(default=None, ge=1)  # of longer vectors the first, made one of length one again
    options: Options = Options()
    keep_alive: KeepAlive | None = None


class Embeddings(Body):
    """POST /api/embeddings, the older form."""

    model: str
    prompt: str
    options: Options = Options()
    keep_alive: KeepAlive | None = None


NEEDS_A_NAME: dict[str, Any] = {"oneOf": [{"required": [key], "properties": {key: {"type": "string"}}} for key in ("model", "name")]}


class Named(Body):
    """Which model is meant: `model`, or `name`, which it was called before and Ollama's own JavaScript client still says."""

    model_config = ConfigDict(json_schema_extra={**NEEDS_A_NAME})
    model: str | None = None
    name: str | None = None

    @property
    def target(self) -> str:
        """The model's name."""
        given = {name for name in (self.model, self.name) if name is not None}
        if len(given) > 1:
            raise ApiError(400, "model and name differ: send one of them", field="model")
        if not given:
            raise ApiError(400, "say the model's name as model", field="model")
        return given.pop()


class Show(Named):
    """POST /api/show."""

    verbose: bool = False  # nothing more is told


class Pull(Named):
    """POST /api/pull."""

    stream: bool = True
    insecure: Off = False


class Copy(Body):
    """POST /api/copy."""

    source: str
    destination: str


class Delete(Named):
    """DELETE /api/delete."""
