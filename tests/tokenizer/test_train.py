"""Learning a vocabulary: Qwen2's conventions, equal ids in transformers, determinism, shares of languages, bad input."""

from __future__ import annotations

import json
import weakref
from itertools import pairwise
from pathlib import Path

import pytest

from qwen2.tokenizer import Tokenizer
from qwen2.tokenizer.alphabet import CHAR_OF_BYTE
from qwen2.tokenizer.compare import measure, overall
from qwen2.tokenizer.parts import QWEN2_5_CONTROL, QWEN2_CONTROL
from qwen2.tokenizer.texts import read_texts
from qwen2.tokenizer.train import Learned, Sample, Settings, count, learn, sample_weights

SMALL = Settings(vocab=700)
HOSTILE = ["", "\x00\xff", "a\r\n\r\n  b", "It's 12345", "e\u0301\u1112\u1161\u11ab", "<|im_end|>", "\U0001f600\u200d", "  \u3000x\t"]


@pytest.fixture(scope="module")
def texts(udhr: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(code, paragraph) for code, paragraphs in udhr.items() for paragraph in paragraphs[:20]]


@pytest.fixture(scope="module")
def learned(texts: list[tuple[str, str]]) -> Learned:
    return learn(lambda: texts, SMALL)


def test_ids_are_laid_out_as_qwen2s(learned: Learned):
    tokenizer = learned.tokenizer
    spec = tokenizer.model_spec()
    assert learned.full
    assert tokenizer.vocab_size == 700
    assert [token for token, id in sorted(spec["vocab"].items(), key=lambda x: x[1])][:256] == sorted(CHAR_OF_BYTE.values())
    for rank, (left, right) in enumerate(spec["merges"]):
        assert spec["vocab"][left + right] == 256 + rank
    assert tokenizer.control == dict(zip(QWEN2_CONTROL, (697, 698, 699), strict=True))
    assert tokenizer.eos == (697,)
    assert tokenizer.pad == 697
    assert tokenizer.bos is None


def test_control_tokens_of_qwen2_5(texts: list[tuple[str, str]]):
    tokenizer = learn(lambda: texts, Settings(vocab=700, control="qwen2.5")).tokenizer
    assert list(tokenizer.control) == list(QWEN2_5_CONTROL)
    assert tokenizer.vocab_size == 700
    assert "<tool_call>" not in tokenizer.special
    assert "<|im_end|>" in tokenizer.special


def test_ours_and_transformers_give_equal_ids(learned: Learned, texts: list[tuple[str, str]], tmp_path: Path):
    from transformers import AutoTokenizer

    learned.save(tmp_path / "tokenizer")
    ours = Tokenizer.from_folder(tmp_path / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for text in [text for _, text in texts] + HOSTILE:
        ids = ours.encode(text)
        assert ids == learned.tokenizer.encode(text)
        if "<|" not in text:  # control strings in text are control tokens to the reference, and text to us
            assert ids == theirs.encode(text)
    assert theirs.eos_token == "<|endoftext|>"
    turn = "<|im_start|>user\nhi<|im_end|>"
    assert ours.encode_trusted(turn) == theirs.encode(turn)


def test_the_text_is_normalised_and_split_as_qwen2_does():
    """No token spans two digits or joins what the pattern cuts, and composed and decomposed letters are one."""
    many = [("en", "2024 2024 2024. can't can't e\u0301e\u0301e\u0301 " * 50)]
    tokenizer = learn(lambda: many, Settings(vocab=300)).tokenizer
    vocab = tokenizer.model_spec()["vocab"]
    assert not any(token.strip("\u0120").isdigit() and len(token) > 1 for token in vocab)
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert len(tokenizer.encode("can't")) == 2


def test_the_same_texts_give_the_same_file(learned: Learned, texts: list[tuple[str, str]], tmp_path: Path):
    learned.save(tmp_path / "one")
    learn(lambda: iter(texts), SMALL).save(tmp_path / "two")
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "training.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_small_languages_get_tokens(udhr: dict[str, list[str]]):
    big = [("en", text) for code in ("eng", "deu_1996", "fra", "pol") for text in udhr[code]]
    lao = [("lo", text) for text in udhr["lao"]]

    def fit(temperature: float) -> float:
        settings = Settings(vocab=700, temperature=temperature, repeats=50)
        learned = learn(lambda: big + lao[:5], settings)
        return measure({"it": learned.tokenizer}, lao[5:])["lo"].per_token["it"]

    assert fit(100.0) > 1.15 * fit(1.0)


def test_weights_follow_the_temperature_and_their_limits():
    sizes = {"en": 9_000_000, "lo": 1_000_000}
    even = sample_weights(sizes, Settings(temperature=1.0, sample=1_000_000))
    assert even == pytest.approx({"en": 0.1, "lo": 0.1})
    warm = sample_weights(sizes, Settings(temperature=2.0, sample=4_000_000))
    assert warm == pytest.approx({"en": 3 / 9, "lo": 1.0})  # shares 3 : 1
    capped = sample_weights(sizes, Settings(temperature=2.0, sample=4_000_000, repeats=0.5))
    assert capped == pytest.approx({"lo": 0.5, "en": 3.5 / 9})  # what Lao cannot give goes to English
    everything = sample_weights({"en": 5000, "lo": 0}, Settings(sample=None))
    assert everything == pytest.approx({"en": 1.0})


def test_a_sample_is_spread_evenly():
    texts = [("de", f"{i:03d} " * 5) for i in range(100)] + [("lo", "x" * 10)] * 3
    sample = Sample(texts, {"de": 0.1, "lo": 2.5})
    given = list(sample)
    numbers = [int(text[:3]) for text in given if text[0] != "x"]
    assert len(numbers) == 10
    assert {b - a for a, b in pairwise(numbers)} == {10}
    assert given.count("x" * 10) in (7, 8)
    assert sample.taken == {"de": 200, "lo": 10 * given.count("x" * 10)}


def test_long_documents_among_short_ones_are_given_their_share_and_no_more():
    texts = [("de", "y" * 10_000), *[("de", "x")] * 10_000]
    sample = Sample(texts, {"de": 0.5})
    list(sample)
    assert abs(sample.taken["de"] - 10_000) <= 1


def test_texts_are_not_held():
    class Watched(str):
        __slots__ = ("__weakref__",)

    alive: weakref.WeakSet[Watched] = weakref.WeakSet()
    most = 0

    def stream():
        nonlocal most
        for i in range(4000):
            text = Watched(f"some words and the number {i}")
            alive.add(text)
            most = max(most, len(alive))
            yield "en", text

    learn(stream, Settings(vocab=400, sample=None))
    assert most < 1500


def test_too_little_text_is_said(tmp_path: Path):
    few = learn(lambda: [("en", "abc abc")], Settings(vocab=5000))
    assert not few.full
    assert few.tokenizer.vocab_size < 300
    few.save(tmp_path / "few")
    assert json.loads((tmp_path / "few" / "training.json").read_text())["vocab"] == few.tokenizer.vocab_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": 259}, "vocab 259: must be above 259"),
        ({"vocab": 270, "control": "qwen2.5"}, "must be above 278"),
        ({"control": "gpt"}, "control 'gpt': must be one of qwen2, qwen2.5"),
        ({"temperature": 0.5}, "temperature 0.5"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"sample": 10}, "sample 10"),
        ({"repeats": 0.0}, "repeats 0.0"),
        ({"least": 0}, "least 0"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="no text to learn"):
        learn(list, SMALL)
    with pytest.raises(ValueError, match="no text to learn"):
        count([("en", ""), ("de", "")])


# --------------------------------------------------------------------------------------------------------------- files


def test_texts_of_files_and_folders(tmp_path: Path):
    (tmp_path / "in").mkdir()
    documents = [{"text": "eins", "language": "de"}, {"text": "one", "metadata": {"language": "en"}}, {"text": "?"}]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(map(json.dumps, documents)) + "\n\n")
    (tmp_path / "in" / "b.txt").write_text("plain\n" * 30_000)
    (tmp_path / "uno.txt").write_text("uno")
    (tmp_path / "in" / "manifest.json").write_text("{}")
    texts = list(read_texts([tmp_path / "in", f"es={tmp_path / 'uno.txt'}"]))
    assert texts[:3] == [("de", "eins"), ("en", "one"), ("und", "?")]
    assert texts[-1] == ("es", "uno")
    assert "".join(text for _, text in texts[3:-1]) == "plain\n" * 30_000
    assert len(texts) == 3 + 3 + 1  # two pieces of 64 KiB, and the rest


def test_documents_of_a_split(tmp_path: Path):
    documents = [{"text": "a", "split": "train"}, {"text": "b", "metadata": {"role": "held-out"}}, {"text": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, documents)))
    assert [text for _, text in read_texts([tmp_path])] == ["a", "b", "c"]
    assert [text for _, text in read_texts([tmp_path], "train")] == ["a", "c"]
    assert [text for _, text in read_texts([tmp_path], "held-out")] == ["b", "c"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"fine\nbro\xffken\n", "a.txt: line 2 is not UTF-8: byte 4 is 0xff"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xc3"}\n', "a.jsonl: line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "a.jsonl: line 2 is not JSON"),
        ("a.jsonl", b'{"content": "x"}\n', "a.jsonl: line 1 has no text"),
        ("a.jsonl", b'{"text": "x", "language": 7}\n', "a.jsonl: line 1: language is 7"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "a.jsonl.gz: not a whole gzip file"),
    ],
)
def test_broken_files_are_named(name: str, data: bytes, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError) as caught:
        list(read_texts([tmp_path]))
    assert message in str(caught.value)


def test_places_without_texts(tmp_path: Path):
    with pytest.raises(ValueError, match=r"the folder has no files that end in \.jsonl, \.txt"):
        list(read_texts([tmp_path]))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        list(read_texts([tmp_path / "gone"]))


def test_an_existing_folder_is_left_alone(learned: Learned, tmp_path: Path):
    with pytest.raises(FileExistsError, match="exists already"):
        learned.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- comparison


def test_bytes_a_token(learned: Learned, tiny: Tokenizer):
    fits = measure({"learned": learned.tokenizer, "tiny": tiny}, [("en", "the the"), ("en", "\u00e9"), ("de", "ab"), ("xx", "")])
    assert list(fits) == ["de", "en"]
    assert fits["en"].bytes == 9
    assert fits["en"].tokens["tiny"] == len(tiny.encode("the the")) + 2
    assert fits["de"].per_token["tiny"] == 1.0
    assert overall(fits)["tiny"] == pytest.approx((1.0 + 9 / fits["en"].tokens["tiny"]) / 2)
    with pytest.raises(ValueError, match="no text to measure on"):
        measure({"tiny": tiny}, [])


def test_only_so_many_bytes_of_a_language(tiny: Tokenizer):
    fits = measure({"tiny": tiny}, [("en", "x" * 10)] * 10 + [("de", "y")], most=25)
    assert fits["en"].bytes == 30
    assert fits["de"].bytes == 1
