"""Log-probabilities: of tokens that were chosen, and of those that a text consists of.

Natural logarithms in float32, over all rows of the output head, as the model gives them: before penalties, bias, temperature and
cuts. A row's numbers are computed from that row alone, so that they have the same bits for one token and for many.
"""

# R rows, V rows of the output head, D hidden

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qwen2.engine.request import TokenLogprob
from qwen2.model.adapted import AdaptedRows

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.model import Qwen2
    from qwen2.model.adapted import ServedAdapter

LOGIT_ELEMENTS = 2**24  # of one block of rows: 64 MiB of float32, and as much again of their logarithms


def token_logprobs(rows: Tensor, tokens: Sequence[int], top: int, vocab: int) -> list[TokenLogprob]:
    """Logits (R, V) as the model gave them, padding included, and a token for each; with the `top` likeliest of the first `vocab`."""
    logprobs = rows.float().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=rows.device)[:, None])  # (R, 1)
    ranks = 1 + (logprobs[:, :vocab] > chosen).sum(-1)
    best = logprobs[:, :vocab].topk(min(top, vocab))
    likeliest = [tuple(zip(*pair, strict=True)) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [TokenLogprob(*each) for each in zip(tokens, chosen[:, 0].tolist(), ranks.tolist(), likeliest, strict=True)]


class TextLogprobs:
    """A reader of a text's hidden states: `found` has a token for every row from row `first` on that another token follows.

    Logits are made for some rows at a time, and are gone when it returns.
    """

    def __init__(
        self, network: Qwen2, tokens: Sequence[int], vocab: int, top: int = 0, first: int = 0, adapter: ServedAdapter | None = None
    ) -> None:
        self.network, self.tokens, self.vocab, self.top, self.first = network, tokens, vocab, top, first
        self.adapter = adapter
        self.found: list[TokenLogprob] = []

    def __call__(self, hidden: Tensor) -> None:
        """Rows (R, D) that follow those that it had. FloatingPointError where the model's numbers are none."""
        for rows in torch.split(hidden, max(1, LOGIT_ELEMENTS // self.network.config.vocab)):
            start = self.first + len(self.found) + 1
            targets = self.tokens[start : start + len(rows)]
            if targets:
                logits = self.network.logits(rows[: len(targets)], AdaptedRows.of_head([(self.adapter, len(targets))]))
                found = token_logprobs(logits, targets, self.top, self.vocab)
                if not all(abs(each.logprob) < float("inf") for each in found):  # false of a NaN too
                    raise FloatingPointError(f"the model's log-probabilities are not finite: {not_finite(self.network.dtype)}")
                self.found += found


def not_finite(dtype: torch.dtype) -> str:
    """What it means that a model's numbers are none, and what to do."""
    if dtype == torch.float32:
        return "its weights are damaged; fetch or make the file again"
    return f"its weights are damaged, or overflow {str(dtype).removeprefix('torch.')}; try dtype='float32'"
