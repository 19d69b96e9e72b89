"""What an adapter's folder says of chats counts wherever the adapter is used, merged or not, and nowhere else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen2 import LLM, SamplingParams
from qwen2.cli.app import main
from qwen2.config import GenerationDefaults
from qwen2.post.start import read_start
from qwen2.tokenizer import ChatTemplate
from qwen2.tokenizer.styles import QWEN2_JINJA
from qwen2.train.saved import take, with_adapter
from qwen2.weights.adapter import read_adapter
from qwen2.weights.adapter_texts import save_texts, with_texts
from qwen2.weights.export import to_hf_folder
from qwen2.weights.model import Model, load
from qwen2.weights.modelfile import parse
from qwen2.weights.store import Store
from tests.conftest import random_adapter, tiny_model, tiny_tokenizer

TEXT_END, TURN_END = 509, 511
HELLO = [{"role": "user", "content": "the quick fox"}]
ENDS_NOW = SamplingParams(temperature=0, max_tokens=4, logit_bias={TURN_END: 100.0})
SYSTEM = "You are a fox."


def base_model() -> Model:
    """One whose texts end, and whose turns do not."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.eos = (TEXT_END,)
    config, generation = replace(model.config, eos=(TEXT_END,)), GenerationDefaults(eos=(TEXT_END,))
    return replace(model, config=config, tokenizer=tokenizer, template=ChatTemplate.of(tokenizer), generation=generation)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    to_hf_folder(base_model(), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def bare(tmp_path: Path, base: Path) -> Path:
    """An adapter that says nothing but its numbers and its base."""
    folder = random_adapter(base_model().config, tmp_path / "bare", size=0.05)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    return folder


@pytest.fixture
def chats(bare: Path) -> Path:
    """The same, trained on conversations."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos = (TURN_END, TEXT_END)
    tokenizer.chat_template = QWEN2_JINJA.replace("SYSTEM", SYSTEM)
    save_texts(bare, tokenizer, GenerationDefaults(eos=(TURN_END, TEXT_END), temperature=0.5, top_k=7))
    return bare


def check_chat(one: Any) -> None:
    assert one.generation == GenerationDefaults(eos=(TURN_END, TEXT_END), temperature=0.5, top_k=7)
    assert one.template.default_system == SYSTEM
    assert one.template.tokenizer.eos[0] == TURN_END


def check_base(llm: LLM) -> None:
    assert llm.generation == GenerationDefaults(eos=(TEXT_END,))
    assert llm.template.default_system != SYSTEM
    assert llm.chat(HELLO, ENDS_NOW).finish_reason == "length"


def test_beside_the_weights(base: Path, chats: Path):
    """The faces of one engine each have their own."""
    llm = LLM(base, adapter=chats)
    check_chat(llm)
    assert llm.chat(HELLO, ENDS_NOW).finish_reason == "stop"
    plain = llm.beside()
    check_base(plain)
    again = plain.beside(adapter=str(chats))
    check_chat(again)
    assert again.chat(HELLO, ENDS_NOW).finish_reason == "stop"
    check_base(again.beside())


def test_in_the_store(base: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Also where the model is merged, shown, trained further, copied, or made FROM, and where a Modelfile says something else."""
    monkeypatch.setenv("QWEN2_HOME", str(tmp_path / "home"))
    store = Store(tmp_path / "home")
    store.create("plain", parse(f"FROM {base}"))
    store.create("mine", parse(f"FROM {base}\nADAPTER {chats}"))
    store.create("mine:warm", parse("FROM mine\nPARAMETER temperature 0.9\nSYSTEM Be brief."))
    store.copy("mine", "mine:copy")
    for name in ("mine", "mine:copy"):
        llm = LLM(name)
        check_chat(llm)
        assert llm.chat(HELLO, ENDS_NOW).finish_reason == "stop"
        check_chat(load(name))
        check_chat(read_start(name))
    assert load(name).config.eos == (TURN_END,)
    warm = LLM("mine:warm")
    assert warm.generation == GenerationDefaults(eos=(TURN_END, TEXT_END), temperature=0.9, top_k=7)
    stored = store.get("plain")
    check_base(warm.beside(warm.model.made_as(stored.name, stored.path, stored.made, None)))
    assert main(["show", "mine", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["defaults"]["eos"] == [TURN_END, TEXT_END]
    assert facts["template"]["default_system"] == SYSTEM


def test_merged(base: Path, chats: Path, tmp_path: Path):
    assert main(["export", str(chats), str(tmp_path / "one")]) == 0
    assert main(["export", str(base), str(tmp_path / "two"), "--adapter", str(chats)]) == 0
    for model in (take(chats, print), with_adapter(load(base), chats), load(tmp_path / "one"), load(tmp_path / "two")):
        check_chat(model)
        assert model.config.eos == (TURN_END,)
        assert LLM(model).chat(HELLO, ENDS_NOW).finish_reason == "stop"


def test_nothing_said_is_nothing_changed(base: Path, bare: Path):
    for llm in (LLM(base, adapter=bare), LLM(take(bare, print))):
        check_base(llm)
    model = load(base)
    assert with_texts(bare, model.config, model.tokenizer, model.generation) == (model.config, model.tokenizer, model.generation)


@pytest.mark.parametrize(
    ("files", "eos", "config", "temperature"),
    [
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, (511, 509), (511,), 0.0),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|endoftext|>"}}}, (509,), (509,), 0.0),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, (509,), (509,), 0.0),
        ({"tokenizer_config.json": {"chat_template": "x"}}, (509,), (509,), 0.0),
        ({"generation_config.json": {"do_sample": True, "temperature": 0.5}}, (509,), (509,), 0.5),
        ({"generation_config.json": {"eos_token_id": 511}}, (511,), (511,), 0.0),
    ],
    ids=["other-end", "same-end", "unknown-end", "template", "sampling", "ids"],
)
def test_other_tools_say_less(
    files: dict[str, Any], eos: tuple[int, ...], config: tuple[int, ...], temperature: float, bare: Path, base: Path
):
    for name, values in files.items():
        (bare / name).write_text(json.dumps(values))
    model = LLM(base, adapter=bare).model
    assert (model.generation.eos, model.config.eos, model.generation.temperature) == (eos, config, temperature)
    assert model.tokenizer.chat_template == ("x" if "chat_template" in str(files) else load(base).tokenizer.chat_template)


def test_what_is_wrong_is_named(bare: Path, base: Path):
    for values, words in (({"eos_token_id": 9999}, "the end token 9999 is beyond"), ({"num_beams": 4}, "num_beams")):
        (bare / "generation_config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=words) as error:
            LLM(base, adapter=bare)
        assert str(error.value).startswith(str(bare / "generation_config.json"))
    assert read_adapter(bare).settings.rank == 4  # its numbers are none the worse
