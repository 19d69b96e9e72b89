"""llama.cpp by its C interface, called through llama_cpp (llama-cpp-python): what llama-bench does, on ids that we choose.

Contexts differ in flash attention (variants "fa" and "nofa") and in the number of sequences; batch and micro-batch are 512, the cache
is fp16, and logits are computed for the last token of a prompt only. `write_logits` is for bench/quality.py.

Read by worker.py, in an interpreter that has llama_cpp.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

BATCH = 512
STREAM_ROOM = 512  # positions of each of several streams
FLASH = {"nofa": 0, "fa": 1}


class LlamaCpp:
    """A model file and the contexts made of it so far."""

    def __init__(self, options: dict[str, Any]) -> None:
        import llama_cpp
        import numpy

        self.c, self.numpy, self.options = llama_cpp, numpy, options
        self.contexts: dict[tuple[str, int], Any] = {}
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        if options["isa"] == "avx2" and b"AVX512 = 1" in llama_cpp.llama_print_system_info():
            raise ValueError("this build uses AVX-512: give one built with -DGGML_NATIVE=OFF -DGGML_AVX2=ON by --llama-cpp")

    def load(self) -> None:
        params = self.c.llama_model_default_params()
        self.model = self.c.llama_model_load_from_file(str(self.options["model"]).encode(), params)
        if not self.model:
            raise ValueError(f"llama.cpp cannot read {self.options['model']}")
        self.vocab = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self.model))
        self.batch = self.c.llama_batch_init(BATCH, 0, 1)

    def context(self, variant: str, sequences: int = 1) -> Any:
        """The context of a variant, made at its first use, its cache empty."""
        if (variant, sequences) not in self.contexts:
            params = self.c.llama_context_default_params()
            params.n_ctx = self.options["context"] if sequences == 1 else sequences * STREAM_ROOM
            params.n_batch = params.n_ubatch = BATCH
            params.n_seq_max = sequences
            params.n_threads = params.n_threads_batch = self.options["threads"]
            params.flash_attn_type = FLASH[variant]
            params.no_perf = True
            context = self.c.llama_init_from_model(self.model, params)
            if not context:
                raise ValueError(f"llama.cpp has no room for a context of {params.n_ctx:,} tokens")
            self.contexts[variant, sequences] = context
        context = self.contexts[variant, sequences]
        self.c.llama_memory_clear(self.c.llama_get_memory(context), False)
        return context

    def decode(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> None:
        """One call for rows of (token, position, sequence, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        status = self.c.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode ended with {status}")

    def chosen(self, context: Any, rows: int) -> list[int]:
        """The likeliest token of each row whose logits were wanted."""
        return self.logits(context, rows).argmax(1).tolist()

    def logits(self, context: Any, rows: int) -> Any:
        """(rows, V) float32, the context's own memory: gone with its next call."""
        return self.numpy.ctypeslib.as_array(self.c.llama_get_logits(context), shape=(rows, self.vocab))

    def measure(self, ids: list[int], tokens: int, variant: str) -> tuple[float, float]:
        context = self.context(variant)
        start = time.perf_counter()
        for at in range(0, len(ids), BATCH):
            piece = ids[at : at + BATCH]
            self.decode(context, [(token, at + i, 0, at + i == len(ids) - 1) for i, token in enumerate(piece)])
        (token,) = self.chosen(context, 1)
        read = time.perf_counter()
        for position in range(len(ids), len(ids) + tokens):
            self.decode(context, [(token, position, 0, True)])
            (token,) = self.chosen(context, 1)
        return read - start, time.perf_counter() - read

    def write_logits(self, ids: list[int], path: str, variant: str) -> int:
        """The logits after every token as rows of float32 into a file; returns their length."""
        context = self.context(variant)
        with open(path, "wb") as file:
            for at in range(0, len(ids), BATCH):
                piece = ids[at : at + BATCH]
                self.decode(context, [(token, at + i, 0, True) for i, token in enumerate(piece)])
                file.write(self.logits(context, len(piece)).data)
        return int(self.vocab)

    def streams(self, prompts: list[list[int]], tokens: int, variant: str) -> tuple[int, float]:
        context = self.context(variant, len(prompts))
        chosen, lengths = [], [len(ids) for ids in prompts]
        for sequence, ids in enumerate(prompts):
            self.decode(context, [(token, i, sequence, i == len(ids) - 1) for i, token in enumerate(ids)])
            chosen += self.chosen(context, 1)
        start = time.perf_counter()
        for step in range(tokens):
            self.decode(context, [(token, lengths[s] + step, s, True) for s, token in enumerate(chosen)])
            chosen = self.chosen(context, len(chosen))
        return len(prompts) * tokens, time.perf_counter() - start

    def versions(self) -> dict[str, str]:
        return {"llama-cpp-python": self.c.__version__, "llama.cpp": self.c.llama_version().decode()}

    def notes(self) -> str:
        return self.c.llama_print_system_info().decode().strip(" |")
