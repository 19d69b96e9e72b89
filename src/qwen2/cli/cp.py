"""`qwen2 cp`: a second name for a model, or a name for a file or folder that stays where it is."""

from __future__ import annotations

from qwen2.weights.pull import human_size
from qwen2.weights.store import Store


def cp(source: str, target: str, /) -> None:
    """Give a model a second name, or a file or folder a first one. No bytes are copied.

    Parameters
    ----------
    source
        A name, a GGUF file or a Hugging Face folder. Files outside the store stay where they are.
    target
        The new name, family:tag.
    """
    model = Store().copy(source, target)
    place = f" at {model.location}" if model.location is not None else ""
    print(f"{model.name} is here: {human_size(model.size)}{place}, sha256 {model.digest[:12]}, no disk used")
