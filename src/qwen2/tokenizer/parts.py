"""What a vocabulary consists of, whichever file it came from: the common ground of the readers and the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, starmap
from operator import add
from reprlib import repr as shown

from qwen2.tokenizer.splits import QWEN2, Split

QWEN2_CONTROL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
QWEN2_5_CONTROL = QWEN2_CONTROL | {
    "<|object_ref_start|>": 151646, "<|object_ref_end|>": 151647, "<|box_start|>": 151648, "<|box_end|>": 151649,
    "<|quad_start|>": 151650, "<|quad_end|>": 151651, "<|vision_start|>": 151652, "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654, "<|image_pad|>": 151655, "<|video_pad|>": 151656, "<tool_call>": 151657, "</tool_call>": 151658,
    "<|fim_prefix|>": 151659, "<|fim_middle|>": 151660, "<|fim_suffix|>": 151661, "<|fim_pad|>": 151662,
    "<|repo_name|>": 151663, "<|file_sep|>": 151664,
}  # fmt: skip
NOT_SPECIAL = frozenset(list(QWEN2_5_CONTROL)[14:])  # <tool_call> and what follows: added, but shown when a text is decoded
END_OF_TEXT = "<|endoftext|>"
MAX_ID = 2**24  # a hundred times the largest vocabulary in use
MAX_CONTROL = 4096  # every text of ours is searched for each of them; Qwen2.5 has 22, Llama 3 has 256


@dataclass(frozen=True)
class Parts:
    """A vocabulary. `vocab` is what text can become, `control` what only a template can; no string and no id is in both."""

    vocab: Mapping[str, int]
    merges: list[tuple[str, str]]
    control: Mapping[str, int]
    special: Iterable[str] | None = None  # control tokens to hide from shown text; Qwen's NOT_SPECIAL never are; None: all others
    split: Split = field(default=QWEN2)
    eos: tuple[int, ...] = ()
    bos: int | None = None
    pad: int | None = None
    add_bos: bool = False
    chat_template: str | None = None

    def __post_init__(self) -> None:
        special = frozenset(self.control) - NOT_SPECIAL if self.special is None else frozenset(self.special)
        # GGUF files call Qwen's fim tokens special, its tokenizer.json does not: the same tokens are shown whatever the source
        shown_by_qwen = {token for token in NOT_SPECIAL if self.control.get(token) == QWEN2_5_CONTROL[token]}
        object.__setattr__(self, "special", special - shown_by_qwen)

    def check(self) -> None:
        """ValueError unless ids are unique and in range and every merge makes an entry."""
        if not self.vocab:
            raise ValueError("the vocabulary is empty")
        check_control_count(len(self.control))
        if not self._is_sound():
            self.complain()
        if "" in self.control:
            raise ValueError("a control token is an empty string")

    def _is_sound(self) -> bool:
        """Whether there is nothing to complain of: the same conditions over whole tables, ten times as fast as entry by entry."""
        ids = [*self.vocab.values(), *self.control.values()]
        if set(map(type, ids)) != {int} or len(set(ids)) < len(ids) or min(ids) < 0 or max(ids) >= MAX_ID:
            return False
        if _has_surrogate("".join(self.vocab)) or _has_surrogate("".join(self.control)):
            return False
        # that both parts of each are there the BPE itself finds, which is built of them next: half the time of looking here
        return all(map(self.vocab.__contains__, starmap(add, self.merges)))

    def complain(self) -> None:
        """The ValueError that names the first entry or merge that is wrong; nothing where none is."""
        owner: dict[int, str] = {}
        for token, id in chain(self.vocab.items(), self.control.items()):
            if not isinstance(id, int) or not 0 <= id < MAX_ID:
                raise ValueError(f"token {shown(token)} has id {shown(id)}; ids go from 0 to {MAX_ID - 1}")
            if id in owner:
                raise ValueError(f"id {id} belongs to both {shown(owner[id])} and {shown(token)}")
            if _has_surrogate(token):
                raise ValueError(f"token {shown(token)} has no UTF-8: half a surrogate pair")
            owner[id] = token
        for left, right in self.merges:
            for token in (left, right, left + right):
                if token not in self.vocab:
                    raise ValueError(f"the merge {shown(left)} + {shown(right)} needs {shown(token)}, which the vocabulary lacks")


def check_control_count(count: int) -> None:
    """ValueError for more control tokens than any model has."""
    if count > MAX_CONTROL:
        raise ValueError(f"the vocabulary has {count} control tokens; at most {MAX_CONTROL} are read")


def _has_surrogate(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def without_control(vocab: Mapping[str, int], merges: list[tuple[str, str]], control: Mapping[str, int]) -> Parts:
    """Take control tokens out of a vocabulary that lists them among its entries, with the merges that would build them."""
    inside = [token for token in control if token in vocab]
    if inside:
        vocab = {token: id for token, id in vocab.items() if token not in control}
        merges = [(a, b) for a, b in merges if a not in control and b not in control and a + b not in control]
    return Parts(vocab, merges, control)


def end_ids(declared: int | None, control: Mapping[str, int]) -> tuple[int, ...]:
    """The ids that end a text: the declared one, and `<|endoftext|>`, the document separator, after which nothing is meant.

    So Qwen2-Instruct ends at 151645 and at 151643, as its generation_config.json says, also where a file has no such list.
    """
    ends = [declared, control.get(END_OF_TEXT)]
    return tuple(dict.fromkeys(id for id in ends if id is not None))
