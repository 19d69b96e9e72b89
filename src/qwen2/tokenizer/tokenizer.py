"""Text to ids and back: byte-level BPE in which control tokens are out of reach of ordinary text.

The merging itself is the `tokenizers` library's. The one thing done differently from the reference: added tokens are taken out
of the BPE, so `encode` cannot produce one whatever the text says; only `encode_trusted`, meant for templates and corpora
written by us, turns `<|im_end|>` into its id.

What is left out: sentencepiece vocabularies, training (its own file), offsets.

    Tokenizer.from_folder("Qwen2-0.5B-Instruct").encode("Hello world")     # [9707, 1879]
"""

from __future__ import annotations

import codecs
import json
import operator
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from qwen2.tokenizer import gguf, load, save
from qwen2.tokenizer.alphabet import CHAR_OF_BYTE, to_bytes
from qwen2.tokenizer.parts import Parts
from qwen2.tokenizer.splits import GGUF_SPLITS

COUNTED = 2**18  # bytes of texts that are counted exactly, in some hundredths of a second
LONG = 4096  # characters from which on a text is encoded without holding Python's lock, which costs a change of threads
JOINED = 3  # times shorter than before a text can become by NFC: three parts of a Korean syllable, of three bytes each, are one


class Tokenizer:
    """One vocabulary. `control` holds every added token, special or not (`<tool_call>`, the fim tokens): string -> id."""

    def __init__(self, parts: Parts) -> None:
        parts.check()
        self.control = dict(parts.control)
        self.special = frozenset(parts.special or ())  # the control tokens that the checkpoint marks special
        self.split = parts.split
        self.eos, self.bos, self.pad, self.add_bos = parts.eos, parts.bos, parts.pad, parts.add_bos
        self.chat_template = parts.chat_template
        self.vocab_size = 1 + max([*parts.vocab.values(), *parts.control.values()])
        self._bpe = _backend(parts)
        self._control_of_id = {i: token for token, i in self.control.items()}
        self._bytes: dict[int, bytes] = {}  # filled as ids are met
        self._control_pattern = control_pattern(self.control)
        is_whole = set(CHAR_OF_BYTE.values()) <= parts.vocab.keys() and any(known.same_as(parts.split) for known in GGUF_SPLITS.values())
        self._longest = max(map(len, parts.vocab)) if is_whole else None  # bytes of a token; None where text may be left out

    # --- text to ids

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: never a control token. A lone surrogate, which has no UTF-8, is read as U+FFFD."""
        if not isinstance(text, str):
            raise ValueError(f"encode takes a string, got {type(text).__name__}")
        text = without_surrogates(text)
        if len(text) < LONG:
            ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        else:  # the same ids without offsets, in a fifth of the time, and other threads of Python run meanwhile
            ids = self._bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def check_fits(self, texts: Iterable[str], most: int) -> None:
        """ValueError where the texts have more than `most` tokens however they are cut, which is found without encoding them.

        Those of less than COUNTED bytes are encoded and counted in no time: let them pass, and say how many too many there are.
        """
        if self._longest is None:
            return
        fewest = sum(map(self._fewest_bytes, texts))
        least = fewest // self._longest
        if fewest >= COUNTED and least > most:
            raise ValueError(f"prompt has at least {least:,} tokens, the window is {most:,}: shorten the prompt")

    def _fewest_bytes(self, text: str) -> int:
        """Of the text as it is encoded."""
        if text.isascii():
            return len(text)
        return len(text.encode("utf-8", "surrogatepass")) // (1 if self.split.normalizer is None else JOINED)

    def encode_trusted(self, text: str) -> list[int]:
        """Ids of text that we wrote ourselves: control strings in it become control tokens. Never for text of users or documents."""
        ids: list[int] = []
        for piece in self.split_control(text):
            ids += [self.control[piece]] if piece in self.control else self.encode(piece)
        return ids

    def split_control(self, text: str) -> list[str]:
        """Cut so that every control string stands alone; longest match first, empty pieces dropped."""
        if self._control_pattern is None:
            return [text] if text else []
        return [piece for piece in self._control_pattern.split(text) if piece]

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """`encode`, and for each id the index of the first character of `text` that it covers."""
        encoding = self._bpe.encode(without_surrogates(text), add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    # --- ids to text

    def token_bytes(self, id: int) -> bytes:
        """The bytes an id stands for; b"" for ids without an entry, such as the padding rows of an embedding."""
        id = _as_id(id)
        found = self._bytes.get(id)
        if found is None:
            found = self._look_up(id)
            if id < self.vocab_size:  # so that made-up ids cannot grow the table
                self._bytes[id] = found
        return found

    def _look_up(self, id: int) -> bytes:
        if id in self._control_of_id:
            return self._control_of_id[id].encode()
        token = self._bpe.id_to_token(id) if id < self.vocab_size else None
        return b"" if token is None else to_bytes(token)

    def is_control(self, id: int) -> bool:
        """Whether the id is an added token."""
        return _as_id(id) in self._control_of_id

    def decode(self, ids: Iterable[int], skip_control: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD, unknown ids nothing. `skip_control` drops control tokens."""
        kept = (i for i in ids if not (skip_control and self.is_control(i)))
        return b"".join(self.token_bytes(i) for i in kept).decode("utf-8", "replace")

    def decoder(self, skip_control: bool = False) -> StreamDecoder:
        """A decoder for one stream of ids."""
        return StreamDecoder(self, skip_control)

    def same_tokens(self, other: Tokenizer) -> bool:
        """Whether every id stands for the same in both, so that one model's ids are another's."""
        return self.control == other.control and self._bpe.get_vocab() == other._bpe.get_vocab()

    # --- sources

    @classmethod
    def from_parts(cls, parts: Parts) -> Tokenizer:
        """From a vocabulary in memory."""
        return cls(parts)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """From a Hugging Face folder: tokenizer.json, else vocab.json + merges.txt, else one *.tiktoken; with tokenizer_config.json."""
        return cls(load.folder_parts(Path(folder)))

    @classmethod
    def from_json(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json alone."""
        return cls(load.json_parts(Path(path)))

    @classmethod
    def from_vocab_merges(cls, vocab: str | Path, merges: str | Path, control: Mapping[str, int] | None = None) -> Tokenizer:
        """From vocab.json + merges.txt, cut by Qwen2's pattern; `control` defaults to Qwen2's three."""
        return cls(load.vocab_merges_parts(Path(vocab), Path(merges), control))

    @classmethod
    def from_tiktoken(cls, path: str | Path, control: Mapping[str, int] | None = None) -> Tokenizer:
        """From lines of `base64 rank`, cut by Qwen2's pattern; the merges are recovered from the ranks."""
        return cls(load.tiktoken_parts(Path(path), control))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """From the tokenizer.* keys of a GGUF file."""
        return cls(gguf.gguf_parts(metadata))

    # --- destinations

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt for the `transformers` library."""
        save.save(self, Path(folder))

    def to_gguf(self, vocab_size: int | None = None) -> dict[str, object]:
        """The tokenizer.* keys of a GGUF file; `vocab_size`, the rows of the embedding, is reached with [PADn] entries."""
        return gguf.to_gguf(self, vocab_size)

    def model_spec(self) -> dict[str, Any]:
        """The BPE in the notation of tokenizer.json: `vocab` (token -> id) and `merges` (pairs, in rank order) among its keys."""
        spec: dict[str, Any] = json.loads(self._bpe.to_str())["model"]
        return spec


class StreamDecoder:
    """Ids in, text out, never half a character: what cannot yet be told waits. Joined, the pieces equal `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_control: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_control = skip_control
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that this id completes."""
        data = self._tokenizer.token_bytes(id)
        return "" if self._skip_control and self._tokenizer.is_control(id) else self._utf8.decode(data)

    def flush(self) -> str:
        """End of the stream: U+FFFD if a character was left unfinished."""
        return self._utf8.decode(b"", final=True)


def without_surrogates(text: str) -> str:
    """The text with every lone surrogate replaced by U+FFFD, as browsers encode it."""
    if text.isascii():
        return text
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def control_pattern(control: Iterable[str]) -> re.Pattern[str] | None:
    """Matches any control string, longest first, in one group, so that `split` keeps what it cuts at. None for no control tokens."""
    longest_first = sorted(control, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def _as_id(id: int) -> int:
    try:
        value = operator.index(id)
    except TypeError:
        raise ValueError(f"a token id is a whole number, got {id!r}") from None
    if value < 0:
        raise ValueError(f"a token id is not negative, got {value}")
    return value


def _backend(parts: Parts) -> Backend:
    """The library's tokenizer with our vocabulary and no added tokens at all."""
    skeleton: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "post_processor": None,
        "normalizer": parts.split.normalizer,
        "pre_tokenizer": parts.split.pre_tokenizer,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    try:
        backend = Backend.from_str(json.dumps(skeleton))
    except Exception as error:  # the class that the library raises for a step or a pattern that it does not know
        if type(error) is not Exception:
            raise
        raise ValueError(f"the normalizer or pre-tokenizer is not known: {error}") from None
    try:
        backend.model = BPE(vocab=dict(parts.vocab), merges=list(parts.merges), ignore_merges=parts.split.ignore_merges)
    except Exception as error:  # again that class itself: a merge of what the vocabulary lacks
        if type(error) is not Exception:
            raise
        parts.complain()
        raise ValueError(f"the vocabulary and its merges do not fit each other: {error}") from None
    return backend
