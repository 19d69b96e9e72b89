"""Low-rank adapters beside a network that answers: several in one batch, each on rows of its own, and none in the weights.

The kernels add to a product what the adapter of each row adds (kernels/added.h), in the one native call that all layers are, so that
a row has the same bits in any company and rows without an adapter have the base's. A and B are packed as floats, in 16 bits where
that loses nothing. In torch the same is added layer by layer. DoRA's lengths of rows are computed once, when the adapter comes.

Left out: training them (lora.py), reading them (weights/adapter.py), and adapters of embeddings and of routed experts.

    adapter = ServedAdapter(network, adapters_for(network, read_adapter(folder)), "my-adapter", digest)
    network(tokens, attend, adapted=AdaptedRows.of([(adapter, 5), (None, 1)]))     # the first five rows have it, the last has none
"""

# N rows of a step, I input width, O output width, r rank

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from qwen2 import kernels
from qwen2.kernels.calls import AdditionsStruct, AdditionStruct, address, i32
from qwen2.kernels.matrix import ALIGNMENT, Arena, Matrix, lanes
from qwen2.model.linear import linear
from qwen2.model.lora import AdaptedLinear, AdaptedPacked, Switch, adapted_layers
from qwen2.quant.linear import PackedLinear, run

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.model.lora import Adapter
    from qwen2.model.qwen2 import Qwen2

ADDITIONS = 9  # of a layer, in the order of kernels.h; a mixture's feed-forward ones are its shared expert's
NUMBERS = {
    **{f"self_attn.{name}_proj": i for i, name in enumerate(("q", "k", "v", "o"))},
    **{f"mlp.{part}{name}_proj": i + 4 for i, name in enumerate(("gate", "up", "down")) for part in ("", "shared_expert.")},
    "mlp.shared_expert_gate": 8,
}
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}  # ggml's numbers


class Addition(NamedTuple):
    """What one layer's rows get: share * (W x + scale * B (A x)) + bias."""

    a: Tensor  # (r, I)
    b: Tensor  # (O, r)
    scale: float
    share: Tensor | None  # (O,)

    def apply(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """x (n, I) and what the base makes of it, y (n, O) -> what the adapted layer makes of it."""
        added = self.scale * linear(linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)).to(y.dtype)
        if self.share is None:
            return y + added
        plain = y if bias is None else y - bias.to(y.dtype)
        out = (plain + added) * self.share.to(y.dtype)
        return out if bias is None else out + bias.to(y.dtype)


class ServedAdapter:
    """One adapter, ready to be added to a network's products. `digest`: equal for equal files, and what cached texts are told apart by.

    Raises ValueError for a network that has adapters in its layers.
    """

    @torch.no_grad()
    def __init__(self, network: Qwen2, adapters: Mapping[str, Adapter], name: str, digest: str) -> None:
        if next(adapted_layers(network), None) is not None:
            raise ValueError(f"{name}: the model's own layers have adapters already: merge them into its weights first")
        self.name, self.digest = name, digest
        self.numbers = dict(_numbered(network))
        self.rank = max((len(adapter.lora_A) for adapter in adapters.values()), default=0)
        self.bends_head = "lm_head" in adapters
        self.plain: dict[nn.Module, Addition] = {}
        self._structs = (AdditionStruct * (len(network.model.layers) * ADDITIONS + 1))()
        self.place, self._keep, self.nbytes = ctypes.addressof(self._structs), list[Any](), 0
        found = [(network.get_submodule(path), _addition(network.get_submodule(path), one)) for path, one in adapters.items()]
        native = [(layer, addition) for layer, addition in found if isinstance(layer, PackedLinear)]
        if native:
            self._pack(native, kernels.isa_of(network.lanes))
        for layer, addition in found:
            if not isinstance(layer, PackedLinear):
                self.plain[layer] = addition = addition._replace(a=addition.a.to(network.dtype), b=addition.b.to(network.dtype))
                self.nbytes += sum(part.nbytes for part in addition if isinstance(part, torch.Tensor))

    def _pack(self, native: Sequence[tuple[nn.Module, Addition]], isa: str | None) -> None:
        assert isa is not None, "packed matrices are some set's"
        parts = [part for _, addition in native for part in (addition.a, addition.b)]
        arena = Arena(sum(4 * part.shape[1] * (len(part) + 16) + ALIGNMENT for part in parts))
        with kernels.using(isa):
            for layer, addition in native:
                a, b = (_packed(part, arena) for part in (addition.a, addition.b))
                share = None if addition.share is None else addition.share.contiguous()
                places = ctypes.addressof(a.struct), ctypes.addressof(b.struct), None if share is None else share.data_ptr()
                self._structs[self.numbers[layer]] = AdditionStruct(*places, addition.scale)
                self._keep += [a, b, share]
                self.nbytes += a.nbytes + b.nbytes + (0 if share is None else share.nbytes)


def _numbered(network: Qwen2) -> Iterator[tuple[nn.Module, int]]:
    """The layers that may be adapted, each with the number of its addition."""
    for i, layer in enumerate(network.model.layers):
        for path, module in layer.named_modules():
            if path in NUMBERS:
                yield module, i * ADDITIONS + NUMBERS[path]
    if network.lm_head is not None:
        yield network.lm_head, len(network.model.layers) * ADDITIONS


def _addition(layer: Any, adapter: Adapter) -> Addition:
    a, b, magnitude = adapter.lora_A.detach().float(), adapter.lora_B.detach().float(), adapter.lora_magnitude_vector
    if magnitude is None:
        return Addition(a, b, adapter.scale, None)
    kind: Any = AdaptedPacked if isinstance(layer, PackedLinear) else AdaptedLinear
    return Addition(a, b, adapter.scale, magnitude.detach().float() / adapter.lengths(kind(layer, adapter, Switch())))


def _packed(numbers: Tensor, arena: Arena) -> Matrix:
    """A matrix of floats for the chosen set, of 16 bits where they say the same."""
    exact = (kind for kind in (torch.bfloat16, torch.float16) if torch.equal(numbers.to(kind).float(), numbers))
    stored = numbers.to(next(exact, torch.float32))
    matrix = Matrix.empty(TYPES[stored.dtype], len(stored), stored.shape[1], arena)
    # Tiles of floats are [column][row]. Made here and not by `Matrix.pack`, since the pool belongs to a step while one runs: each of an
    # adapter's hundreds of matrices would wait for one.
    whole = torch.nn.functional.pad(stored, (0, 0, 0, -len(stored) % lanes())).unflatten(0, (-1, lanes()))
    torch.from_numpy(matrix.packed).view(stored.dtype).view(len(whole), -1, lanes()).copy_(whole.transpose(1, 2))
    return matrix


class AdaptedRows:
    """Of one step: which adapter each row has."""

    def __init__(self, spans: Sequence[tuple[ServedAdapter | None, int]]) -> None:
        self.adapters = list(dict.fromkeys(adapter for adapter, _ in spans if adapter is not None))
        places: dict[ServedAdapter | None, int] = {adapter: i for i, adapter in enumerate(self.adapters)}
        self.which = [place for adapter, count in spans for place in (places.get(adapter, -1),) * count]
        self._rows = (i32 * len(self.which))(*self.which)
        self._table = (address * len(self.adapters))(*(adapter.place for adapter in self.adapters))
        self._structs: list[AdditionsStruct] = []  # for as long as a call may look at them
        self._groups: list[tuple[ServedAdapter, Tensor]] | None = None

    @classmethod
    def of(cls, spans: Sequence[tuple[ServedAdapter | None, int]]) -> AdaptedRows | None:
        """The adapters of spans of rows, each with the number of its rows; None where no row has any."""
        return cls(spans) if any(adapter is not None and count for adapter, count in spans) else None

    @classmethod
    def of_head(cls, spans: Sequence[tuple[ServedAdapter | None, int]]) -> AdaptedRows | None:
        """The same for rows of the output head alone: None where no adapter of theirs has an addition there."""
        return cls.of([(adapter if adapter is not None and adapter.bends_head else None, count) for adapter, count in spans])

    def place(self, layer: nn.Module | None = None) -> int:
        """Address of what the kernels add, from the addition beside this layer on; left out, from the first of all."""
        first = 0 if layer is None else self.adapters[0].numbers[layer]
        self._structs.append(AdditionsStruct(ctypes.addressof(self._rows), ctypes.addressof(self._table), len(self.adapters), first))
        return ctypes.addressof(self._structs[-1])

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """x (N, I) through a layer, with what the rows' adapters add -> (N, O)."""
        if isinstance(layer, PackedLinear):
            return run(layer.product, x, self.place(layer))
        y: Tensor = layer(x)
        if self._groups is None:
            which = torch.tensor(self.which, device=x.device)
            self._groups = [(adapter, (which == i).nonzero()[:, 0]) for i, adapter in enumerate(self.adapters)]
        for adapter, rows in self._groups:
            addition = adapter.plain.get(layer)
            if addition is not None:
                y[rows] = addition.apply(x[rows], y[rows], getattr(layer, "bias", None))
        return y
