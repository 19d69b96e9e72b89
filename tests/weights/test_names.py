"""Names: what the grammar takes, and that nothing it takes leaves the store."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.weights.names import Name, nearest, parse
from qwen2.weights.store import Store

TRAVERSAL = [
    "../../x", "..", ".", "", ":", "a:", ":b", "a:b:c", "/etc/passwd", "a/b", "a/../b", "a:../b", "..:..", "a\\b", "..\\x",
    "C:\\x", "a:b/c", "a..b", "a.", ".a", "a:.b", "-a", "a-", "a b", "a\nb", "a\0b", "a:b\n", "~", "~root", "$HOME", "%2e%2e",
    "a;b", "a|b", "*", "a:*", "con:1b", "nul", "com1:x", "a:lpt9", "aux.x:1b", "x" * 65, "a:" + "x" * 65, "\uff0e\uff0e",
    "qwen\u0131", "\u2024\u2024/x", "\N{KELVIN SIGN}",
]  # fmt: skip


REFUSED = r"is not a model's name|^the model's name is empty$|^a/b: of the hubs' names only"


@pytest.mark.parametrize("text", TRAVERSAL)
def test_names_that_are_none_are_refused_everywhere(text: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    with pytest.raises(ValueError, match=REFUSED):
        parse(text)
    for verb in (store.pull, store.get, store.find, store.remove, store.hold):
        with pytest.raises(ValueError, match=REFUSED):
            verb(text)
    assert not (tmp_path / "home").exists()


def test_message_of_a_name_that_is_none() -> None:
    with pytest.raises(ValueError) as error:
        parse("../../x")
    assert str(error.value) == (
        "'../../x' is not a model's name: write family:tag in letters, digits and single . - _ (such as qwen2.5-coder:0.5b), "
        "or ./PATH for a file or folder"
    )


@given(st.text(alphabet="ab0.-_:/\\~ ", max_size=20))
def test_what_is_taken_stays_in_the_store(text: str) -> None:
    try:
        name = parse(text)
    except ValueError:
        return
    home = Path("/home/store/models")
    folder = home / name.family / str(name.tag)
    assert folder.resolve().parent.parent == home
    assert re.fullmatch(r"[a-z0-9._-]+(:[a-z0-9._-]+)?", str(name))
    assert parse(str(name)) == name


def test_case_is_forgotten() -> None:
    assert parse("Qwen2.5-Coder:0.5B-Q4_K_M") == Name("qwen2.5-coder", "0.5b-q4_k_m")
    assert parse("qwen2") == Name("qwen2", None)


def test_nearest_names_come_best_first() -> None:
    assert nearest("qwen2:7bb", ["smollm2:135m", "qwen2:72b", "qwen2:7b"])[0] == "qwen2:7b"
    assert nearest("zzz", ["qwen2:7b"]) == []
