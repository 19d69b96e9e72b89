"""Ids against the published vectors and two reference tokenizers; encode, decode and stream as inverses; control tokens out of reach."""

from __future__ import annotations

import base64
import json
import random
import re
import subprocess
import sys
import sysconfig
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.tokenizer import QWEN2_5_CONTROL, Tokenizer
from qwen2.tokenizer.alphabet import to_bytes
from qwen2.tokenizer.tokenizer import LONG
from tests.tokenizer.conftest import TINY_CONTROL, tiny_parts

# The published split pattern, written out once more
PATTERN = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""

CASES = json.loads((Path(__file__).with_name("data") / "llama_cpp_qwen2.json").read_text(encoding="utf-8"))["cases"]
GOLDEN = dict(CASES) | {  # the 46 cases that llama.cpp tests its Qwen2 vocabulary with, and three more
    "": [],
    "2024年 12345": [17, 15, 17, 19, 7948, 220, 16, 17, 18, 19, 20],
    "<tool_call>": [27, 14172, 13429, 29],
}


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(qwen_tokenizer, text):
    assert qwen_tokenizer.encode(text) == GOLDEN[text]


@pytest.fixture(scope="session")
def sources(qwen_metadata, tmp_path_factory) -> dict[str, Tokenizer]:
    """The same vocabulary from each kind of file; the tiktoken file is made here from the tokens' bytes alone, without the merges."""
    folder = tmp_path_factory.mktemp("sources")
    from_gguf = Tokenizer.from_gguf(qwen_metadata)
    from_gguf.save(folder)
    ranks = [to_bytes(token) for token in qwen_metadata["tokenizer.ggml.tokens"][:151643]]
    (folder / "qwen.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(ranks)))
    return {
        "gguf": from_gguf,
        "tokenizer.json": Tokenizer.from_folder(folder),
        "vocab+merges": Tokenizer.from_vocab_merges(folder / "vocab.json", folder / "merges.txt", QWEN2_5_CONTROL),
        "tiktoken": Tokenizer.from_tiktoken(folder / "qwen.tiktoken", QWEN2_5_CONTROL),
    }


def test_all_sources_hold_the_same_vocabulary(sources):
    model = sources["gguf"].model_spec()
    assert len(model["merges"]) == 151387
    for name, tokenizer in sources.items():
        assert tokenizer.model_spec() == model, name
        assert (tokenizer.control, tokenizer.vocab_size, tokenizer.pad) == (QWEN2_5_CONTROL, 151665, 151643), name
        assert tokenizer.special == set(list(QWEN2_5_CONTROL)[:14]), name  # as tokenizer.json of the releases: not <tool_call>, not fim
        assert tokenizer.split.same_as(sources["gguf"].split), name
        assert [tokenizer.encode(text) for text in GOLDEN] == list(GOLDEN.values()), name


def sentences(paragraphs: list[str]) -> list[str]:
    """Paragraphs, their clauses, and each half of the paragraph cut anywhere: spaces at the edges included."""
    cut = [clause for p in paragraphs for clause in re.split(r"(?<=[.,;:،。、；၊။।])", p)]
    halves = [half for p in paragraphs for half in (p[: len(p) // 2], p[len(p) // 2 :])]
    return list(dict.fromkeys([*paragraphs, *cut, *halves]))


def code_lines(count: int) -> list[str]:
    lines: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        lines.update(dict.fromkeys(path.read_text(encoding="utf-8").splitlines()))
        if len(lines) >= count:
            break
    return list(lines)[:count]


def random_lines(count: int) -> list[str]:
    """Any characters that Unicode 3.2 knew, so that every library's tables agree on what they are; combining ones included."""
    known = [chr(c) for c in range(0x30000) if unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs", "Co")]
    plain = list(" \t\n\r'.,!?0123456789abcdefghijABCDEFGHIJ\u0301\u0308\u3000\u00a0éñ中文🚀👍")
    rng = random.Random(3)
    return ["".join(rng.choice(rng.choice((known, plain))) for _ in range(rng.randrange(1, 40))) for _ in range(count)]


@pytest.fixture(scope="session")
def lines(udhr) -> list[str]:
    assert len(udhr) == 29
    return [*(line for paragraphs in udhr.values() for line in sentences(paragraphs)), *code_lines(9000), *random_lines(6000)]


def test_same_ids_as_tiktoken(qwen_tokenizer, qwen_metadata, lines):
    tokens = qwen_metadata["tokenizer.ggml.tokens"][:151643]
    ranks = {to_bytes(token): id for id, token in enumerate(tokens)}
    theirs = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert len(lines) >= 20_000
    for line in lines:
        assert qwen_tokenizer.encode(line) == theirs.encode_ordinary(unicodedata.normalize("NFC", line)), line


def test_same_ids_and_text_as_transformers(qwen_tokenizer, reference, lines):
    some = random.Random(5).sample(lines, 4000)
    theirs = reference(some)["input_ids"]
    assert [qwen_tokenizer.encode(line) for line in some] == theirs
    assert [qwen_tokenizer.decode(ids) for ids in theirs] == reference.batch_decode(theirs)


# --- large texts


def test_long_texts_have_the_ids_of_the_library_s_other_way(qwen_tokenizer, lines):
    for text in ("\n".join(lines[:2000]), "".join(lines[-3000:]), " " * 50_000, "e\u0301" * 20_000, "\ud800" * 5000):
        assert len(text) > LONG
        ids, _ = qwen_tokenizer.encode_with_starts(text)
        assert qwen_tokenizer.encode(text) == ids


def test_other_threads_run_while_a_long_text_is_encoded(tiny):
    text, begun, done, turns = "the ther " * 100_000, threading.Event(), threading.Event(), 0

    def encode():
        begun.set()
        tiny.encode(text)
        done.set()

    thread, interval = threading.Thread(target=encode), sys.getswitchinterval()
    sys.setswitchinterval(1000)  # a thread gives way only of its own accord
    try:
        thread.start()
        begun.wait()
        while not done.is_set():
            turns += 1
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert turns > 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet=st.characters()) | st.sampled_from(["\u1112\u1161\u11ab" * 9, " " * 300, "\u03b1\u0313\u0300\u0345"])))
def test_no_text_that_fits_is_said_not_to(qwen_tokenizer, texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen2.tokenizer.tokenizer.COUNTED", 0)
        qwen_tokenizer.check_fits(texts, sum(len(qwen_tokenizer.encode(text)) for text in texts))


def test_what_cannot_fit_is_told_unencoded(tiny, monkeypatch):
    tiny.check_fits(["x" * 18, "y" * 18], 11)  # so few are counted
    monkeypatch.setattr("qwen2.tokenizer.tokenizer.COUNTED", 36)
    tiny.check_fits(["x" * 15, "y" * 18], 11)  # its longest token, "the", has three bytes
    with pytest.raises(ValueError, match="at least 12 tokens, the window is 11: "):
        tiny.check_fits(["x" * 18, "y" * 18], 11)


# --- inverses

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
MIXED = st.lists(st.sampled_from(["<|im_end|>", "<|im_", "<tool_call>", "the ther", "é", "e\u0301", "🦙", "\n", "Ⅷ"]) | TEXT).map("".join)


@settings(max_examples=200, deadline=None)
@given(MIXED)
def test_decode_of_encode_is_the_normalised_text(qwen_tokenizer, text):
    ids = qwen_tokenizer.encode(text)
    assert qwen_tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert not set(ids) & set(qwen_tokenizer.control.values())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 151_935) | st.integers(0, 300) | st.sampled_from([151643, 151645, 151657])), st.booleans())
def test_streamed_pieces_join_to_the_whole(qwen_tokenizer, ids, skip):
    decoder = qwen_tokenizer.decoder(skip_control=skip)
    pieces = [decoder.push(id) for id in ids]
    assert "".join(pieces) + decoder.flush() == qwen_tokenizer.decode(ids, skip_control=skip)


def test_stream_never_gives_half_a_character(qwen_tokenizer):
    decoder = qwen_tokenizer.decoder()
    assert [decoder.push(id) for id in qwen_tokenizer.encode(" 🦙!")] == [" ", "", "🦙", "!"]
    assert decoder.push(qwen_tokenizer.encode(" 🦙")[0]) == " "
    assert decoder.flush() == "\ufffd"


def test_stream_matches_the_reference_on_broken_bytes(qwen_tokenizer, reference):
    rng = random.Random(7)
    for _ in range(300):
        ids = [rng.randrange(256) for _ in range(8)]
        assert qwen_tokenizer.decode(ids) == reference.decode(ids)


# --- control tokens


def test_text_never_becomes_a_control_token(qwen_tokenizer, reference):
    text = "".join(f"a{token} {token}" for token in qwen_tokenizer.control) + "<|im_end|"
    ids = qwen_tokenizer.encode(text)
    assert max(ids) < 151643
    assert qwen_tokenizer.decode(ids) == text
    trusted = qwen_tokenizer.encode_trusted(text)
    assert trusted == reference.encode(text)
    assert [id for id in trusted if id >= 151643] == [id for id in range(151643, 151665) for _ in (0, 1)]


def test_longest_control_token_wins():
    tokenizer = Tokenizer(tiny_parts(control={"<a>": 300, "<a><b>": 301, "<b>": 302}, eos=(), pad=None))
    assert tokenizer.encode_trusted("<a><b><a>x<b>") == [301, 300, ord("x"), 302]
    assert tokenizer.encode_trusted("") == []


def test_skip_control_hides_exactly_the_control_tokens(tiny):
    ids = [261, *tiny.encode("the user"), 262, 263, 256]
    assert tiny.decode(ids) == "<|im_start|>the user<|im_end|><tool_call>th"
    assert tiny.decode(ids, skip_control=True) == "the userth"


def test_padding_rows_and_unknown_ids_are_nothing(qwen_tokenizer):
    assert qwen_tokenizer.vocab_size == 151665
    assert qwen_tokenizer.decode([9707, 151665, 151935, 10**30, 1879]) == "Hello world"
    assert qwen_tokenizer.token_bytes(151700) == b""


def test_token_bytes(qwen_tokenizer):
    assert qwen_tokenizer.token_bytes(188) == b"\x00"
    assert qwen_tokenizer.token_bytes(1879) == b" world"
    assert qwen_tokenizer.token_bytes(np.int64(151645)) == b"<|im_end|>"
    assert b"".join(map(qwen_tokenizer.token_bytes, qwen_tokenizer.encode("🦙 é"))) == "🦙 é".encode()


@pytest.mark.parametrize("id", [-1, 1.0, "1", None])
def test_what_is_no_id_is_refused(tiny, id):
    with pytest.raises(ValueError, match="token id"):
        tiny.token_bytes(id)
    with pytest.raises(ValueError, match="token id"):
        tiny.decode([id])


def test_lone_surrogates_become_replacement_characters(tiny):
    assert tiny.decode(tiny.encode("a\ud83e b\udd99")) == "a\ufffd b\ufffd"
    with pytest.raises(ValueError, match="encode takes a string, got bytes"):
        tiny.encode(b"the")


def test_starts_of_tokens_count_characters_of_the_original(qwen_tokenizer):
    text = "e\u0301e\u0301 🦙x"
    ids, starts = qwen_tokenizer.encode_with_starts(text)
    assert ids == qwen_tokenizer.encode(text)
    assert starts[-1] == text.index("x")
    assert starts == sorted(starts)


def test_tokenizing_needs_no_torch():
    code = "import sys, qwen2.tokenizer; print(sorted({'torch', 'transformers', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_merges_apply_in_rank_order(tiny):
    # "there": th, then the, then r+e is no merge; "er" cannot form because its e is taken
    assert [tiny.token_bytes(id) for id in tiny.encode("there other")] == [b"the", b"r", b"e", b" ", b"o", b"the", b"r"]
    assert tiny.control == TINY_CONTROL
    assert tiny.eos == (262, 260)


def test_more_control_tokens_than_any_model_has_are_refused():
    control = {f"<{i}>": 300 + i for i in range(4097)}
    with pytest.raises(ValueError, match=r"^the vocabulary has 4097 control tokens; at most 4096 are read$"):
        Tokenizer(tiny_parts(control=control, eos=(), pad=None))
    control.popitem()
    assert Tokenizer(tiny_parts(control=control, eos=(), pad=None)).encode_trusted("<4095>") == [4395]
