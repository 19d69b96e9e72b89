"""Put parameters into a network, one at a time, from whatever file they lie in.

The network is built on the "meta" device, where it takes no memory; each parameter is then replaced by the tensor that its source
gives, so that a 7B checkpoint never exists twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from qwen2.model import PackedEmbedding, Qwen2

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from qwen2.config import ModelConfig
    from qwen2.weights.pack import Rows


class Source(Protocol):
    """Where parameters come from, by the decoder's names. Only a Llama's may lack biases: those of q, k and v, all of them."""

    may_lack_biases: bool

    def has(self, name: str) -> bool: ...

    def load(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor: ...

    def in_blocks(self, name: str) -> bool: ...

    def packed(self, name: str, dtype: torch.dtype) -> PackedEmbedding | None: ...

    def rows(self, name: str, shape: torch.Size, dtype: torch.dtype | None) -> list[Rows]: ...

    def check_rest(self) -> None: ...


def fill(config: ModelConfig, source: Source, dtype: torch.dtype, device: torch.device, int8_inputs: bool = False) -> Qwen2:
    """A network whose parameters all come from `source`.

    On a CPU an embedding in blocks that is not also the output head stays packed. `int8_inputs` rounds what weights in blocks are
    multiplied with, as the kernels would.
    """
    network = Qwen2(config, dtype=dtype, device="meta")
    parameters = dict(network.named_parameters())
    packed = None if config.tied or device.type != "cpu" else source.packed("model.embed_tokens.weight", dtype)
    if packed is not None:
        network.model.embed_tokens = packed
        del parameters["model.embed_tokens.weight"]
    for name, tensor in whole_tensors(source, {name: parameter.shape for name, parameter in parameters.items()}, dtype, device):
        module_name, _, leaf = name.rpartition(".")
        module = network.get_submodule(module_name)
        setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))
        if int8_inputs and leaf != "bias" and hasattr(module, "int8_input"):
            module.int8_input = source.in_blocks(name)  # type: ignore[assignment]
    return network.eval()


def whole_tensors(
    source: Source, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """These parameters in turn, each read when it is asked for; at the end all of `source` has to have been among them.

    The q/k/v biases of a Llama that has none are zero.
    """
    biased = not source.may_lack_biases or any(source.has(name) for name in shapes if name.endswith(".bias"))
    for name, shape in shapes.items():
        if name.endswith(".bias") and not biased:
            yield name, torch.zeros(shape, dtype=dtype, device=device)
        else:
            yield name, source.load(name, shape, dtype, device)
    source.check_rest()
