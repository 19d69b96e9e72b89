"""The settings of a pre-training stage: those of the loop, and what concerns batches, mixture and loss. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qwen2.data.mixture import Group, Mixture
from qwen2.train.settings import Settings, number, rows_at_once, setting, whole

if TYPE_CHECKING:
    from qwen2.config import MoEConfig

AT_ONCE = 8  # rows, where nothing is said


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(Settings):
    """What pre-training adds to the loop's settings."""

    length: int = setting(512, "Tokens of a row: the longest context that is trained.")
    batch: int = setting(16, "Rows of a step, over all micro-batches and ranks.")
    micro_batch: int | None = setting(
        None,
        f"Rows computed at once; left out, {AT_ONCE}, or all where there are fewer. "
        "Fewer need less memory and change results by rounding alone.",
    )
    temperature: float = setting(1.0, "How much rare languages are repeated: 1 not at all, 3 as multilingual models usually do.")
    weight: tuple[str, ...] = setting((), "language/source=number, as in en/wiki=0.5 or lo/*=2: a share more or less. May be repeated.")
    least_document: int = setting(
        0,
        "Tokens of the shortest document that rows are cut from; 0 takes all. For a stage of long rows; a language that has none so long "
        "keeps all of its own.",
    )
    z_loss: float = setting(0.0, "Weight of the squared logarithm of each token's normaliser; 1e-4 keeps logits from drifting.")
    balance: float | None = setting(
        None, "Weight of the loss that evens out the experts of a mixture, over the tokens of each row; left out, the model's own."
    )
    eval_bytes: int = setting(60_000, "Bytes of held-out text of each language that are evaluated at most.")
    export_dtype: Literal["float32", "bfloat16"] = setting("float32", "What the weights are exported in.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length", "batch", "eval_bytes"):
            whole(name, getattr(self, name), 1)
        whole("least_document", self.least_document, 0)
        number("z_loss", self.z_loss, 0, 1)
        if self.balance is not None:
            number("balance", self.balance, 0, 10)
        rows_at_once(self.micro_batch, self.batch, AT_ONCE)
        if self.export_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"export_dtype {self.export_dtype!r}: must be float32 or bfloat16")
        self.mixture()

    @property
    def at_once(self) -> int:
        """Rows that are computed together."""
        return rows_at_once(self.micro_batch, self.batch, AT_ONCE)

    def mixture(self) -> Mixture:
        """The mixture that the weights ask for."""
        pairs = [one.rpartition("=") for one in self.weight]
        try:
            weights = {name: float(value) for name, _, value in pairs}
        except ValueError:
            raise ValueError(f"weight {' '.join(self.weight)!r}: write language/source=number, as in en/wiki=0.5") from None
        return Mixture.parse(weights, self.temperature)


def of_recipe(recipe: Mapping[str, Any], groups: Iterable[Group]) -> tuple[dict[str, Any], list[str]]:
    """The mixture of the recipe that shards were made with, as settings; and the weights of it that no group of theirs has.

    ValueError where it is none. A recipe that says nothing gives nothing.
    """
    weights, temperature = recipe.get("weights", {}), recipe.get("temperature", 1.0)
    try:
        mixture = Mixture.parse(weights, float(temperature))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the mixture of the shards' recipe: {error}") from None
    lost = ["/".join(group) for group in mixture.unmatched(groups)]
    kept = tuple(f"{name}={weight}" for name, weight in weights.items() if name not in lost)
    return {**({"weight": kept} if kept else {}), **({"temperature": mixture.temperature} if mixture.temperature != 1 else {})}, lost


def balance_in_words(balance: float | None, moe: MoEConfig) -> str:
    """How much the balance of a mixture's experts weighs in the loss, and whose word that is, in a line."""
    whose = "as its config says (router_aux_loss_coef)" if balance is None else "--balance"
    return f"{moe.experts} experts, {moe.active} of them for a token; their balance weighs {balance_weight(balance, moe):g}, {whose}"


def balance_weight(balance: float | None, moe: MoEConfig) -> float:
    """What the setting stands for: without it the model's own."""
    return moe.aux_coef if balance is None else balance
