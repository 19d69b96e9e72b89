"""Vocabulary files: what they mean, what is refused and with which words, and what `transformers` makes of the ones we write."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qwen2.tokenizer import QWEN2_CONTROL, ChatTemplate, Parts, Tokenizer
from qwen2.tokenizer.splits import GPT2, LLAMA3, SMOLLM
from tests.tokenizer.conftest import TINY_CONTROL, tiny_parts


@pytest.fixture
def folder(tiny: Tokenizer, tmp_path: Path) -> Path:
    tiny.save(tmp_path)
    return tmp_path


def edit(path: Path, change) -> None:
    spec = json.loads(path.read_text())
    change(spec)
    path.write_text(json.dumps(spec))


TEXT = "the other thread's 12345 <|im_end|>\r\n\r\n  \tÉé e\u0301 中文 🦙 it'S"


@pytest.mark.parametrize("split", [None, GPT2, SMOLLM, LLAMA3], ids=["qwen2", "gpt2", "smollm", "llama3"])
def test_transformers_loads_what_we_save_with_the_same_ids(split, tmp_path):
    ours = Tokenizer(tiny_parts(**({} if split is None else {"split": split}), chat_template="{{ messages }}"))
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(TEXT, add_special_tokens=False) == ours.encode_trusted(TEXT)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (262, 260, None)
    assert theirs.chat_template == "{{ messages }}"
    assert theirs.decode(ours.encode_trusted(TEXT), skip_special_tokens=True) == ours.decode(
        [id for id in ours.encode_trusted(TEXT) if ours.decode([id]) not in ours.special]
    )


def test_control_ids_between_text_ids_survive_saving(tmp_path):
    vocab = {token: id + 3 for token, id in tiny_parts().vocab.items()}
    control = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<x>": 500}
    ours = Tokenizer(tiny_parts(vocab=vocab, control=control, eos=(2, 0), pad=0))
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "the<x> other<|im_end|>"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode_trusted(text)
    again = Tokenizer.from_folder(tmp_path)
    assert again.control == ours.control
    assert again.encode(text) == ours.encode(text)
    assert not set(again.encode(text)) & set(ours.control.values())


def test_a_leading_token_survives_saving(tmp_path):
    ours = Tokenizer(tiny_parts(bos=260, add_bos=True))
    ours.save(tmp_path)
    again = Tokenizer.from_json(tmp_path / "tokenizer.json")
    assert (again.bos, again.add_bos) == (260, True)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("the") == [260, *ours.encode("the")]


def test_a_folder_read_again_is_the_same(folder, tiny):
    again = Tokenizer.from_folder(folder)
    assert again.model_spec() == tiny.model_spec()
    assert (again.control, again.special, again.eos, again.bos, again.pad, again.add_bos, again.chat_template) == (
        TINY_CONTROL, {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}, (262, 260), None, 260, False, ChatTemplate.of(tiny).jinja,
    )  # fmt: skip
    assert again.split.same_as(tiny.split)


def test_the_format_that_we_chat_in_without_a_template_is_in_the_folder(folder, tiny):
    theirs, ours = AutoTokenizer.from_pretrained(folder), ChatTemplate.of(tiny)
    messages = [{"role": "user", "content": "the other"}, {"role": "assistant", "content": "there"}, {"role": "user", "content": "x"}]
    for chat in (messages, [{"role": "system", "content": "er"}, *messages]):
        rendered = ours.render(chat)
        assert theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == rendered.text
        assert theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == rendered.ids
        assert ChatTemplate.of(Tokenizer.from_folder(folder)).render(chat).ids == rendered.ids


def test_a_vocabulary_that_cannot_chat_gets_no_template(tmp_path):
    Tokenizer(tiny_parts(control={"<|endoftext|>": 260}, eos=(260,))).save(tmp_path)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_file_too_large_is_refused_before_it_is_read(folder, name):
    with (folder / name).open("ab") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(ValueError, match=name + r": 67108865 bytes is no tokenizer file; at most 67108864 are read$"):
        Tokenizer.from_folder(folder)


def test_a_folder_without_tokenizer_json_uses_vocab_and_merges(folder, tiny):
    (folder / "tokenizer.json").unlink()
    again = Tokenizer.from_folder(folder)
    assert again.control == TINY_CONTROL
    assert again.special == tiny.special
    assert again.encode_trusted(TEXT) == tiny.encode_trusted(TEXT)
    edit(folder / "tokenizer_config.json", lambda c: c.pop("added_tokens_decoder"))
    (folder / "added_tokens.json").write_text(json.dumps(TINY_CONTROL))
    assert Tokenizer.from_folder(folder).control == TINY_CONTROL


def test_first_line_of_merges_may_be_a_comment_and_only_the_first(tmp_path):
    vocab = dict(tiny_parts().vocab) | {"##": 265}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\n# #\nth e\n", encoding="utf-8")
    tokenizer = Tokenizer.from_vocab_merges(tmp_path / "vocab.json", tmp_path / "merges.txt", TINY_CONTROL)
    assert tokenizer.encode("##the") == [265, 257]


def test_the_default_control_tokens_are_the_three_of_qwen2(tmp_path):
    tiny = tiny_parts()
    (tmp_path / "vocab.json").write_text(json.dumps(tiny.vocab))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(m) for m in tiny.merges), encoding="utf-8")
    tokenizer = Tokenizer.from_vocab_merges(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert tokenizer.control == QWEN2_CONTROL
    assert (tokenizer.eos, tokenizer.pad) == ((151643,), 151643)


def test_the_chat_template_comes_from_its_own_file_or_the_default_of_several(folder):
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=several))
    assert Tokenizer.from_folder(folder).chat_template == "d"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_folder(folder).chat_template == "file"


def test_control_tokens_listed_in_the_vocabulary_are_out_of_reach_of_text(folder):
    """Also where merges would build one: `the` is made an added token here."""
    edit(folder / "tokenizer.json", lambda s: s["added_tokens"].append({"id": 257, "content": "the", "special": False}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("the") == [256, ord("e")]
    assert tokenizer.encode_trusted("the") == [257]


# --- tiktoken


def tiktoken_file(path: Path, tokens: list[bytes]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def test_merges_come_back_from_ranks(tmp_path):
    # "abc" can be split as a+bc and ab+c; ab has the lower rank, so it is ab+c that BPE does
    path = tiktoken_file(tmp_path / "x.tiktoken", [*(bytes([b]) for b in range(256)), b"ab", b"bc", b"abc", b"abcabc"])
    tokenizer = Tokenizer.from_tiktoken(path, {"<|endoftext|>": 260})
    assert [tuple(merge) for merge in tokenizer.model_spec()["merges"]] == [("a", "b"), ("b", "c"), ("ab", "c"), ("abc", "abc")]
    assert tokenizer.encode("abcabc bc") == [259, 32, 257]
    assert Tokenizer.from_folder(tmp_path).encode("abc") == [258]


def test_a_rank_that_no_merge_reaches_is_named(tmp_path):
    path = tiktoken_file(tmp_path / "x.tiktoken", [*(bytes([b]) for b in range(256)), b"abcd"])
    with pytest.raises(ValueError, match=r"x.tiktoken: token b'abcd' of rank 256 cannot be built from two tokens of lower rank"):
        Tokenizer.from_tiktoken(path)


@pytest.mark.parametrize("line", [b"IQ==", b"IQ== x", b"@@@ 1", b"IQ== 1 2", b"\xff\xfe 1"])
def test_a_broken_tiktoken_line_is_named(tmp_path, line):
    (tmp_path / "x.tiktoken").write_bytes(b"IQ== 0\n" + line + b"\n")
    with pytest.raises(ValueError, match=r"x.tiktoken, line 2: .* is not `base64 rank`"):
        Tokenizer.from_tiktoken(tmp_path / "x.tiktoken")


# --- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"].update(type="Unigram"), "model.type is 'Unigram'; only plain byte-level BPE is supported"),
        (lambda s: s["model"].update(byte_fallback=True), "model.byte_fallback is True"),
        (lambda s: s["model"].update(dropout=0.1), "model.dropout is 0.1"),
        (lambda s: s.update(pre_tokenizer={"type": "Metaspace", "replacement": "_"}), "the pre-tokenizer is not byte-level"),
        (lambda s: s.update(model=[]), "model is missing or not a dict"),
        (lambda s: s["model"].pop("vocab"), "vocab is missing or not a dict"),
        (lambda s: s["model"].update(merges=["t h e"]), "'t h e' is not a merge"),
        (lambda s: s["model"].update(merges=[["t", "zz"]]), "the merge 't' \\+ 'zz' needs 'zz', which the vocabulary lacks"),
        (lambda s: s["model"]["vocab"].update(zz=38), "id 38 belongs to both '&' and 'zz'"),
        (lambda s: s["model"]["vocab"].update(zz=2**62), "token 'zz' has id 4611686018427387904; ids go from 0 to"),
        (lambda s: s["model"]["vocab"].update(zz="5"), "token 'zz' has id '5'"),
        (lambda s: s["added_tokens"].append({"id": 256, "content": "<y>"}), "id 256 belongs to both 'th' and '<y>'"),
        (lambda s: s["added_tokens"].append({"content": "<y>"}), "is not an added token; it needs content and id"),
        (lambda s: s["added_tokens"].append({"id": 300, "content": ""}), "a control token is an empty string"),
        (lambda s: s["added_tokens"][0].update(lstrip=True), "added token '<|endoftext|>' has lstrip, which is not supported"),
    ],
)
def test_a_wrong_tokenizer_json_is_refused_with_the_reason(folder, change, message):
    edit(folder / "tokenizer.json", change)
    with pytest.raises(ValueError, match=message.replace("|", "\\|")):
        Tokenizer.from_json(folder / "tokenizer.json")


def test_broken_json_names_the_file(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is not JSON"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"tokenizer.json is not JSON"):
        Tokenizer.from_folder(folder)


def test_a_named_token_outside_the_vocabulary_is_refused(folder):
    edit(folder / "tokenizer_config.json", lambda c: c.update(eos_token={"content": "</s>"}))
    with pytest.raises(ValueError, match=r"eos_token is '</s>', which is not in the vocabulary"):
        Tokenizer.from_folder(folder)


def test_a_folder_without_a_vocabulary_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json, no vocab.json with merges.txt, and 0 \*.tiktoken files"):
        Tokenizer.from_folder(tmp_path)


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"the vocabulary is empty"):
        Tokenizer(Parts({}, [], {}))
