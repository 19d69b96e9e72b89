"""`qwen2 create` and what the other verbs show of the model that it made, without a server."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from qwen2.cli.app import main
from qwen2.train.folder import write_json
from qwen2.weights.adapter import read_adapter
from qwen2.weights.modelfile import parse
from qwen2.weights.store import Store
from tests.conftest import random_adapter, tiny_model

Out = pytest.CaptureFixture[str]


@pytest.fixture
def store(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("QWEN2_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    store = Store()
    store.copy(str(tiny_folder), "tiny:one")
    return store


def test_from_a_file_to_an_answer(store: Store, tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Modelfile").write_text('FROM tiny:one\nSYSTEM """You are\nMario."""\nPARAMETER temperature 0\nPARAMETER num_predict 6\n')
    assert main(["create", "mario"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("mario:latest is here: made from tiny:one, ")
    assert out.endswith(", no disk used\n")
    assert err == "mario: writing manifest\n"
    assert main(["list"]) == 0
    assert "mario:latest" in capsys.readouterr().out
    assert main(["show", "mario"]) == 0
    shown = capsys.readouterr().out
    assert "default_system 'You are\\nMario.'" in shown
    assert "max_tokens 6" in shown
    assert main(["show", "mario", "--modelfile"]) == 0
    modelfile = capsys.readouterr().out
    assert modelfile.splitlines()[:2] == ["# Made from tiny:one.", "FROM tiny:one"]
    (tmp_path / "again").write_text(modelfile)
    assert main(["create", "luigi", "-f", "again", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["show", "luigi", "--modelfile", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["system"] == "You are\nMario."
    assert main(["cp", "luigi", "peach"]) == 0
    assert main(["rm", "mario", "luigi"]) == 0
    capsys.readouterr()
    answers = []
    for words in (["peach", "Hi"], ["tiny:one", "Hi", "--system", "You are\nMario.", "--temperature", "0", "--max-tokens", "6"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        assert main(["run", *words, "--local"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_a_run_of_adapters_stands_for_its_adapter(store: Store, tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ADAPTER and in --adapter of run and export; where a model is asked for, the message names RUN/adapter and the ways on."""
    run = tmp_path / "tuned"
    run.mkdir()
    random_adapter(tiny_model().config, run / "adapter")
    write_json(run / "config.json", {"settings": {"steps": 1}, "lora": {"rank": 4}, "from": {"model": "tiny:one"}})
    (tmp_path / "Modelfile").write_text("FROM tiny:one\nADAPTER ./tuned\nPARAMETER temperature 0\nPARAMETER num_predict 6\n")
    assert main(["create", "mine"]) == 0
    adapter = store.get("mine").adapter_path
    assert adapter is not None
    assert (adapter / "adapter_model.safetensors").read_bytes() == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    answers = []
    for words in (["mine"], ["tiny:one", "--adapter", "tuned"], ["tiny:one", "--adapter", "tuned/adapter"], ["tiny:one"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        assert main(["run", *words[:1], "Hi", *words[1:], "--temperature", "0", "--max-tokens", "6", "--local"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2] != answers[3]
    assert main(["export", "tiny:one", "merged", "--adapter", "tuned"]) == 0
    assert main(["export", "tuned", "again"]) == 0
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    capsys.readouterr()
    for words, message in (
        (
            ["run", "./tuned", "Hi", "--local"],
            "./tuned: a training run of adapters: its end is RUN/adapter, qwen2 run BASE --adapter ./tuned",
        ),
        (["run", "./tuned/adapter", "Hi", "--local"], "./tuned/adapter: an adapter, and no model: name the one that it is for: qwen2 run"),
        (["cp", "./tuned", "copy"], f"{run}: a run, and no model: name {run / 'adapter'} in ADAPTER"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        assert main(words) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"tuned is a run of adapters, and its adapter is .*tuned/adapter$"):
        read_adapter(run)


def remade(store: Store, tmp_path: Path, capsys: Out, *flags: str) -> str:
    """Removes mario, makes it again of what was shown of it, and says what that is made from."""
    before = store.get("mario")
    capsys.readouterr()
    assert main(["show", "mario", "--modelfile"]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "shown").write_text(shown)
    assert main(["rm", "mario"]) == 0
    assert not store.has("mario")
    assert main(["create", "mario", "-f", "shown", "--quiet", *flags]) == 0
    after = store.get("mario")
    assert after.digest == before.digest
    assert (after.made, after.source, after.location) == (before.made, before.source, before.location)
    return next(line for line in shown.splitlines() if line.startswith("FROM ")).removeprefix("FROM ")


SAID = "SYSTEM You are Mario.\nPARAMETER top_k 3\nPARAMETER stop a\nPARAMETER stop b\nMESSAGE user Hi\nMESSAGE assistant Ho\nLICENSE mine\n"


def test_what_is_shown_makes_it_again_after_rm(store: Store, tmp_path: Path, tiny_folder: Path, capsys: Out) -> None:
    for source in ("tiny:one", str(tiny_folder)):
        store.create("mario", parse(f"FROM {source}\n{SAID}"))
        assert remade(store, tmp_path, capsys) == source
    store.create("luigi", parse("FROM tiny:one\nSYSTEM Luigi\nPARAMETER top_p 0.5"))
    store.create("mario", parse("FROM luigi\nPARAMETER top_k 3"))
    assert remade(store, tmp_path, capsys) == "luigi:latest"
    store.create("mario", parse(f"FROM {tiny_folder}\n{SAID}"), mix="q8_0")
    assert remade(store, tmp_path, capsys, "--quantize", "q8_0") == str(tiny_folder)
    assert "# Its weights were made smaller on the way: qwen2 create NAME --quantize q8_0 makes" in (tmp_path / "shown").read_text()


def test_what_is_shown_names_another_where_its_base_has_changed(store: Store, tmp_path: Path, tiny_folder: Path, capsys: Out) -> None:
    """Or is gone: what stands for the same weights, or the weights."""

    def source() -> str:
        capsys.readouterr()
        assert main(["show", "mario", "--modelfile"]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("FROM "))

    store.create("luigi", parse("FROM tiny:one"))
    store.create("mario", parse("FROM luigi\nSYSTEM Mario"))
    assert source() == "FROM luigi:latest"
    store.create("luigi", parse("FROM tiny:one\nPARAMETER top_k 3"))  # which mario does not say
    assert source() == f"FROM {tiny_folder}"
    store.create("small", parse("FROM tiny:one"), mix="q8_0")
    store.create("mario", parse("FROM small\nSYSTEM Mario"))
    store.copy("small", "other:name")
    store.remove("small")
    assert source() == "FROM other:name"
    store.remove("other:name")
    assert source() == f"FROM {store.find('mario')}"


def test_quantized_and_by_a_path_seen_from_the_file(
    store: Store, tmp_path: Path, tiny_folder: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"FROM {tiny_folder}".encode())))
    assert main(["create", "small", "-f", "-", "--quantize", "q8_0"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith(" written\n")
    assert "small: quantizing to q8_0" in err
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "x.gguf").write_bytes(store.find("small").read_bytes())
    (tmp_path / "files" / "Modelfile").write_text("FROM ./x.gguf")
    assert main(["create", "linked", "-f", "files/Modelfile"]) == 0
    assert store.find("linked") == tmp_path / "files" / "x.gguf"
    assert store.get("linked").digest == store.get("small").digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM tiny:one\nPARAMETER temprature 1", "Modelfile: line 2: unknown parameter 'temprature': did you mean temperature?"),
        ("FROM tiny:one\nADAPTER x", "ADAPTER x: no such folder, seen from "),
        ("FROM nothing:here", "no model is named 'nothing:here'"),
        ("FROM ./x.gguf", "FROM ./x.gguf: no such file or folder, seen from "),
        ("FROM tiny:one\nTEMPLATE {{ .Prompt }}", "Modelfile: line 2: TEMPLATE: this is a template in Go's language"),
        (b"FROM tiny:one\nSYSTEM \xff", "Modelfile: line 2: not UTF-8 text"),
        (None, "Modelfile: no such file; write a Modelfile, or name one with -f"),
    ],
)
def test_refusals_are_one_line(store: Store, tmp_path: Path, capsys: Out, text: str | bytes | None, message: str) -> None:
    if text is not None:
        (tmp_path / "Modelfile").write_bytes(text.encode() if isinstance(text, str) else text)
    assert main(["create", "mario"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"qwen2: {message}")
    assert error.count("\n") == 1
    assert not store.has("mario")


def test_names_of_published_models_stay(store: Store, tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "Modelfile").write_text("FROM tiny:one")
    for name in ("qwen2:7b", "../x", "qwen2.5-coder"):
        assert main(["create", name]) == 1
    assert main(["show", str(tmp_path / "Modelfile"), "--modelfile"]) == 1
    assert "a file has no Modelfile" in capsys.readouterr().err
