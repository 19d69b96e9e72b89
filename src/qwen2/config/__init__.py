"""Configurations of the whole family: dataclasses, released sizes, and the formats they are read from and written to."""

from qwen2.config.family import FAMILY, Release, nano, published_generation, tiny
from qwen2.config.generation import GenerationDefaults
from qwen2.config.model import DualChunkConfig, ModelConfig, MoEConfig, RopeScaling

__all__ = [
    "FAMILY",
    "DualChunkConfig",
    "GenerationDefaults",
    "MoEConfig",
    "ModelConfig",
    "Release",
    "RopeScaling",
    "nano",
    "published_generation",
    "tiny",
]
