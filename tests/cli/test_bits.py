"""`qwen2 bits`: the figures that training's own evaluation gives, and what cannot be measured."""

from __future__ import annotations

import json
from collections import Counter
from math import log
from pathlib import Path

import pytest
import torch

from qwen2.cli.app import main
from qwen2.config import tiny
from qwen2.data.shards import Shards
from qwen2.model import packed_attend
from qwen2.train.evaluate import bits_per_byte, bytes_by_token, held_out
from qwen2.train.world import World
from qwen2.weights.export import to_hf_folder
from qwen2.weights.model import load
from tests.conftest import tiny_model
from tests.train.conftest import write_shards


def test_the_same_as_a_run_s_evaluation(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shards(tmp_path / "shards")
    assert main(["bits", str(tiny_folder), str(shards), "--bytes", "900", "--length", "32", "--out", str(tmp_path / "bits.json")]) == 0
    found = json.loads((tmp_path / "bits.json").read_text())
    model = load(tiny_folder, dtype="float32")
    with torch.no_grad():
        batches = held_out(Shards.open(shards), model.tokenizer, 32, 64, 900)
        expected = bits_per_byte(batches, bytes_by_token(model.tokenizer), World())(model.network)
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert found["bits_per_byte"].keys() == {"de", "en"}
    assert found["mean"] == pytest.approx(sum(expected.values()) / 2)
    assert capsys.readouterr().out.splitlines()[-1] == f"{found['mean']:.3f} bits per byte, the mean of 2 languages"


def test_texts_are_in_the_models_own_tokens(tiny_folder: Path, tmp_path: Path) -> None:
    documents = [("de", "Der Hund schläft."), ("en", "A dog sleeps here all day."), ("en", "Not long")]
    lines = [{"text": text, "language": language} for language, text in documents] + [
        {"text": "learned", "language": "en", "split": "train"}
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["bits", str(tiny_folder), str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / "bits.json")]) == 0
    model, bits, sizes = load(tiny_folder, dtype="float32"), Counter[str](), Counter[str]()
    for language, text in documents:
        ids = model.tokenizer.encode(text)
        with torch.no_grad():
            rows = model.network.logits(model.network(torch.tensor(ids), packed_attend(model.config, torch.arange(len(ids)), [len(ids)])))[
                :-1
            ].log_softmax(-1)
        bits[language] -= float(rows.gather(1, torch.tensor(ids[1:])[:, None]).sum()) / log(2)
        sizes[language] += sum(len(model.tokenizer.token_bytes(id)) for id in ids[1:])
    found = json.loads((tmp_path / "bits.json").read_text())["bits_per_byte"]
    assert found == pytest.approx({language: bits[language] / sizes[language] for language in ("de", "en")}, rel=1e-4)


@pytest.mark.parametrize(("context", "length"), [(64, 64), (2048, 512)])
def test_rows_fit_the_models_window_where_nothing_is_said(
    context: int, length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to_hf_folder(tiny_model(tiny(context=context)), tmp_path / "model")
    shards = write_shards(tmp_path / "shards")
    measured = ["bits", str(tmp_path / "model"), str(shards), "--bytes", "900"]
    assert main([*measured, "--out", str(tmp_path / "bits.json")]) == 0
    assert json.loads((tmp_path / "bits.json").read_text())["length"] == length
    if context < 512:
        assert main([*measured, "--length", "65"]) == 1
        assert "--length 65: the window of" in capsys.readouterr().err


def test_what_cannot_be_measured(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shards(tmp_path / "shards")
    for arguments, message in (
        (["--bytes", "0"], "--bytes 0: must be at least 1"),
        (["--length", "999999"], "--length 999,999: the window of"),
        (["--device", "tpu"], "tpu"),
    ):
        assert main(["bits", str(tiny_folder), str(shards), *arguments]) == 1
        assert message in capsys.readouterr().err


def test_the_place_of_the_figures_is_made_before_a_model_is_read(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, out = write_shards(tmp_path / "shards"), tmp_path / "new" / "bits.json"
    assert main(["bits", str(tiny_folder), str(shards), "--bytes", "900", "--length", "32", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["bits_per_byte"].keys() == {"de", "en"}
    capsys.readouterr()
    for place, message in ((tmp_path, "is a folder; name the file to write"), (out / "bits.json", "cannot be written: ")):
        assert main(["bits", str(tmp_path / "no-model"), str(shards), "--out", str(place)]) == 1
        assert f"{place}: {message}" in capsys.readouterr().err
