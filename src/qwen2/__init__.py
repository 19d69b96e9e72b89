"""The Qwen2 family in one package: `from qwen2 import LLM`.

The public names are resolved on first use (PEP 562), so that `import qwen2` and `qwen2 --help` do not wait for torch.

    python -c "from qwen2 import LLM; print(LLM('qwen2.5-coder:0.5b').chat([{'role': 'user', 'content': 'Hello'}]).text)"
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen2.config import ModelConfig
    from qwen2.engine.llm import LLM
    from qwen2.engine.request import SamplingParams
    from qwen2.tokenizer.tokenizer import Tokenizer
    from qwen2.weights.model import load

__version__ = "0.1.0"

__all__ = ["LLM", "ModelConfig", "SamplingParams", "Tokenizer", "__version__", "load"]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for."""
    homes = {
        "LLM": "qwen2.engine.llm",
        "ModelConfig": "qwen2.config",
        "SamplingParams": "qwen2.engine.request",
        "Tokenizer": "qwen2.tokenizer.tokenizer",
        "load": "qwen2.weights.model",
    }
    if name not in homes:
        raise AttributeError(f"module 'qwen2' has no attribute {name!r}; it has {', '.join(sorted(homes))}")
    value = getattr(import_module(homes[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
