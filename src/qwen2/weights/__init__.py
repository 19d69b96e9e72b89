"""Weights in and out: GGUF, safetensors, the store of models."""
