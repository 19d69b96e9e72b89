"""Pre-training end to end: packing, the job from shards, kill -9 at any moment, stages, the exported model in transformers."""

from __future__ import annotations

import json
import random
import shutil
import sys
import weakref
from dataclasses import replace
from math import log
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qwen2.config import ModelConfig, tiny
from qwen2.data.batches import Rows, pack
from qwen2.data.mixture import Mixture, order
from qwen2.data.shards import Shards
from qwen2.model import load_balancing_loss, packed_attend
from qwen2.tokenizer import Tokenizer
from qwen2.train.evaluate import bits_per_byte, bytes_by_token, held_out
from qwen2.train.loss import cross_entropy
from qwen2.train.metrics import read_lines
from qwen2.train.pretrain import Job, flops_per_token, make_network, new_config, next_token_loss, pretrain, whole_network
from qwen2.train.stage import PretrainSettings
from qwen2.train.start import of_model, open_start
from qwen2.train.world import World
from qwen2.weights.export import to_gguf
from qwen2.weights.model import load
from tests.conftest import SHAPES, random_network
from tests.train.killed import KINDS, MOE, train


def settings(**changes: Any) -> PretrainSettings:
    given: dict[str, Any] = {"steps": 8, "length": 48, "batch": 4, "micro_batch": 3, "log_every": 1, "save_every": 3, "tensorboard": False}
    return PretrainSettings(**{**given, "measure": False, "precision": "float32", "lr": 3e-3, **changes})


def job(shards: Shards, out: Path, config: ModelConfig | None = None, **changes: Any) -> Job:
    tokenizer = Tokenizer.from_folder(shards.folder / "tokenizer")
    model = replace(tiny() if config is None else config, eos=(509,), bos=509, context=512)
    return Job(shards, tokenizer, model, settings(**changes), out)


# --- packing


def separate(network: Any, batch: Any) -> torch.Tensor:
    """The oracle: each document alone."""
    total = torch.zeros(())
    for tokens, labels in zip(batch.tokens.split(batch.lengths), batch.labels.split(batch.lengths), strict=True):
        hidden = network(tokens, packed_attend(network.config, torch.arange(len(tokens)), [len(tokens)]))
        total = total + F.cross_entropy(network.logits(hidden), labels, ignore_index=-100, reduction="sum")
    return total


@pytest.mark.parametrize("name", ["dense", "one-kv-head", "moe", "yarn"])
def test_packed_loss_and_gradients_are_those_of_separate_documents(name: str, shards: Shards):
    config = SHAPES[name]
    rows = Rows(order(shards, Mixture(), seed=1), 160)
    batch = pack([next(rows) for _ in range(3)])
    assert len(batch.lengths) > 6
    assert len({-(-length // 64) for length in batch.lengths}) > 1  # several buckets
    found = []
    for loss in (lambda n: cross_entropy(n, n(batch.tokens, packed_attend(config, batch.positions, batch.lengths)), batch.labels)[0], None):
        network = random_network(config)
        total = separate(network, batch) if loss is None else loss(network)
        total.backward()
        found.append((total.detach(), {n: p.grad for n, p in network.named_parameters()}))
    (ours, packed), (theirs, alone) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for key, gradient in alone.items():
        assert gradient is not None
        torch.testing.assert_close(packed[key], gradient, rtol=1e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dense", "moe", "yarn"])
def test_what_one_document_holds_changes_no_bit_of_another(name: str, dtype: torch.dtype):
    config = SHAPES[name]
    network = random_network(config)
    lengths = (30, 70, 12, 64, 5)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 512, (sum(lengths),), generator=generator)
    other = torch.cat([torch.randint(0, 512, (30,), generator=generator), tokens[30:]])
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.enable_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        first, second = (network(one, packed_attend(config, positions, lengths)) for one in (tokens, other))
    assert not torch.equal(first[:30], second[:30])
    assert torch.equal(first[30:], second[30:])


# --- the job


def test_bits_per_byte_by_hand(shards: Shards):
    """Of one document at a time, all logits at once: bits of all tokens but the first and the end, over the bytes they stand for."""
    tokenizer = Tokenizer.from_folder(shards.folder / "tokenizer")
    network = random_network(tiny())
    found = bits_per_byte(held_out(shards, tokenizer, 512, 200, 30_000), bytes_by_token(tokenizer), World())(network)
    assert sorted(found) == ["de", "en"]
    for language, value in found.items():
        bits, size = 0.0, 0
        for record in shards.select("held-out", language):
            for document in shards.documents(record):
                ids = torch.tensor(document.astype("int64"))
                hidden = network(ids, packed_attend(network.config, torch.arange(len(ids)), [len(ids)]))
                losses = F.cross_entropy(network.logits(hidden)[:-1], ids[1:], reduction="none")
                assert ids[-1] == 509
                bits += float(losses[:-1].detach().sum()) / log(2)
                size += len(tokenizer.decode(ids[1:-1].tolist()).encode())
        assert value == pytest.approx(bits / size, rel=1e-5)


def test_the_mixtures_balance_loss_is_weighed_by_tokens(shards: Shards):
    network = random_network(MOE)
    rows = Rows(order(shards, Mixture(), seed=0), 48)
    batch = pack([next(rows), next(rows)])
    router: list[torch.Tensor] = []
    hidden = network(batch.tokens, packed_attend(MOE, batch.positions, batch.lengths), router)
    plain, count, _ = cross_entropy(network, hidden, batch.labels)
    balance = load_balancing_loss(router, MOE.moe, torch.where(batch.labels != -100, batch.rows, -1))  # type: ignore[arg-type]
    total, sums = next_token_loss(0.0, 0.5, World())(network, batch)
    assert total.item() == pytest.approx(plain.item() + 0.5 * count * balance.item(), rel=1e-6)
    assert sums["balance"].item() == pytest.approx(count * balance.item(), rel=1e-6)
    own = replace(MOE, moe=replace(MOE.moe, aux_coef=0.25))  # type: ignore[type-var]
    network.config = own
    left_out, _ = next_token_loss(0.0, None, World())(network, batch)
    assert left_out.item() == pytest.approx(plain.item() + 0.25 * count * balance.item(), rel=1e-6), "the model's own weight"
    total.backward()
    assert network.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_a_mixtures_loss_is_that_of_its_rows_however_they_are_divided(shards: Shards):
    """Eight rows at once, or one at a time: loss, balance and the routers' gradients."""
    walk = Rows(order(shards, Mixture(), seed=0), 48)
    rows, found = [next(walk) for _ in range(8)], []
    for size in (8, 3, 1):
        network, loss = random_network(MOE), next_token_loss(0.0, 1.0, World())
        parts = [loss(network, pack(rows[start : start + size])) for start in range(0, 8, size)]
        torch.stack([total for total, _ in parts]).sum().div(8 * 48).backward()
        values = [
            sum(float(total.detach()) for total, _ in parts) / (8 * 48),
            sum(float(sums["balance"].detach()) for _, sums in parts) / (8 * 48),
        ]
        found.append((values, network.model.layers[0].mlp.gate.weight.grad))
    for values, gradient in found[1:]:
        assert values == pytest.approx(found[0][0], abs=1e-6)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-6)


def test_every_row_is_read_once_whatever_the_ranks(shards: Shards, tmp_path: Path):
    from qwen2.train.pretrain import Data

    class Half(World):
        data_size = 2

    alone = [batch.tokens for _ in range(3) for batch in Data(shards, settings(), World()).next_step()][:1]
    whole = Data(shards, settings(micro_batch=1), World())
    ranks = []
    for rank in range(2):
        world = Half()
        world.data_rank = rank
        ranks.append(Data(shards, settings(micro_batch=1), world))
    for _ in range(3):
        rows = [batch.tokens.tolist() for batch in whole.next_step()]
        parts = [[batch.tokens.tolist() for batch in rank.next_step()] for rank in ranks]
        assert rows == [row for pair in zip(*parts, strict=True) for row in pair]
    assert alone[0].tolist()[:48] != rows[0]
    with pytest.raises(ValueError, match="batch 3: 2 ranks"):
        Data(shards, settings(batch=3), world)


def test_a_size_takes_the_tokenizers_vocabulary(shards: Shards):
    from qwen2.config.family import SHAPES as SIZES

    tokenizer = Tokenizer.from_folder(shards.folder / "tokenizer")
    config = new_config(SIZES["0.5b"], tokenizer, 509, 256, 10_000.0)
    assert (config.vocab, config.context, config.rope_theta, config.eos, config.bos) == (512, 256, 10_000.0, (509,), 509)
    tokenizer.vocab_size = 151_665
    assert new_config(SIZES["0.5b"], tokenizer, 509, 256, 10_000.0).vocab == 151_936


def test_flops_are_six_for_each_weight_that_multiplies():
    for config in (tiny(), tiny(tied=True)):
        network = random_network(config)
        embedding = 0 if config.tied else network.model.embed_tokens.weight.numel()
        assert flops_per_token(config) == 6 * (sum(p.numel() for p in network.parameters()) - embedding)


def test_an_exported_model_is_the_trained_one_in_transformers_too(shards: Shards, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, config in (("dense", tiny(tied=True)), ("moe", MOE)):
        state = pretrain(job(shards, tmp_path / name, config, average="ema", ema_decay=0.9))
        assert (state.step, state.tokens) == (8, 8 * 4 * 48)
        ours = load(str(tmp_path / name / "model"))
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model", dtype=torch.float32)
        tokens = torch.tensor(ours.tokenizer.encode("the quick brown fox jumps"))
        hidden = ours.network(tokens, packed_attend(ours.config, torch.arange(len(tokens)), [len(tokens)]))
        torch.testing.assert_close(ours.network.logits(hidden), theirs(tokens[None]).logits[0], rtol=1e-4, atol=1e-4)
        assert AutoTokenizer.from_pretrained(tmp_path / name / "model").encode("the quick brown fox jumps") == tokens.tolist()
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        assert [line["step"] for line in lines if "eval" in line] == [0, 8]
        last = lines[-1]["eval"]
        again = bits_per_byte(held_out(shards, ours.tokenizer, 48, 3 * 48, 60_000), bytes_by_token(ours.tokenizer), World())(ours.network)
        assert last == pytest.approx(again, rel=1e-5)  # the averaged weights are what was evaluated and what was exported
        assert last["en"] < lines[0]["eval"]["en"]
        assert (tmp_path / name / "curves.png").stat().st_size > 10_000


def test_without_matplotlib_a_run_says_so_and_exports(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert pretrain(job(shards, tmp_path / "run", steps=2)).step == 2
    said = capsys.readouterr().err
    assert said.index("the picture of the curves needs packages that are not installed") < said.index("step 0")
    assert load(str(tmp_path / "run" / "model")).config.layers == 2
    assert not (tmp_path / "run" / "curves.png").exists()


def test_the_model_is_exported_before_anything_is_drawn(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen2.train.loop.draw", full)
    with pytest.raises(OSError, match="No space left"):
        pretrain(job(shards, tmp_path / "run", steps=2))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_later_stage_starts_from_the_model_of_the_one_before(shards: Shards, tmp_path: Path):
    pretrain(job(shards, tmp_path / "short"))
    wanted = dict(load(str(tmp_path / "short" / "model"), dtype="float32").network.named_parameters())
    start = open_start(tmp_path / "short", print)
    longer = replace(job(shards, tmp_path / "long", length=96), config=replace(start.config, rope_theta=1e6, context=96), start=start)
    for name, ours in make_network(longer).named_parameters():
        assert torch.equal(ours, wanted[name])
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight has shape \[128, 64\], not \[96, 64\]: the model does not fit"):
        make_network(replace(longer, config=replace(start.config, ffn=96)))
    pretrain(longer)
    written = json.loads((tmp_path / "long" / "model" / "config.json").read_text())
    assert (written["rope_theta"], written["max_position_embeddings"]) == (1e6, 96)


def test_a_model_to_start_from_is_read_a_tensor_at_a_time(shards: Shards, tmp_path: Path):
    """From a run that ended, its checkpoint, a folder and a GGUF file: the same numbers, and never two tensors at once."""

    class Watching(World):
        def put(self, parameter: torch.Tensor, whole: torch.Tensor) -> None:
            assert all(tensor() is None for tensor in read), "what was read before is given back"
            read.append(weakref.ref(whole))
            super().put(parameter, whole)

    config = replace(MOE, hidden=64)
    pretrain(job(shards, tmp_path / "run", config, steps=2, average="ema", ema_decay=0.5))
    model = load(str(tmp_path / "run" / "model"), dtype="float32")
    to_gguf(model, tmp_path / "model.gguf", "F32")
    wanted = dict(model.network.named_parameters())
    places = ("run", "run/model", "run/checkpoints/step-000002", "model.gguf")
    for place in places:
        read: list[weakref.ref[torch.Tensor]] = []
        start = open_start(tmp_path / place, print)
        network = start.network(start.config, Watching(), torch.float32)
        assert all(torch.equal(parameter, wanted[name]) for name, parameter in network.named_parameters()), place
        assert all(parameter.requires_grad for parameter in network.parameters())
        assert len(read) == (0 if "checkpoints" in place else len(wanted))


def test_a_model_in_memory_gives_its_weights_to_one_run(shards: Shards, tmp_path: Path):
    pretrain(job(shards, tmp_path / "short", steps=2))
    model = load(str(tmp_path / "short" / "model"), dtype="float32")
    first = weakref.ref(next(model.network.parameters()))
    start = of_model(model)
    start.network(start.config, World(), torch.float32)
    assert first() is None
    with pytest.raises(ValueError, match="its weights were given to a run already; load it again"):
        start.network(start.config, World(), torch.float32)


def test_a_checkpoint_that_has_gone_meanwhile_is_named(shards: Shards, tmp_path: Path):
    pretrain(job(shards, tmp_path / "run", steps=2))
    start = open_start(tmp_path / "run" / "checkpoints" / "step-000002", print)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000002")
    with pytest.raises(FileNotFoundError, match="step-000002: gone since it was looked at"):
        start.network(start.config, World(), torch.float32)


def test_only_the_main_rank_holds_the_whole_model():
    class Rank(World):
        size, divided = 2, True

        def whole(self, tensor: torch.Tensor) -> torch.Tensor:
            asked.append(tensor)
            return tensor

    network = random_network(tiny())
    for rank in range(2):
        asked: list[torch.Tensor] = []
        world = Rank()
        world.rank = rank
        found = whole_network(network, world)
        assert len(asked) == len(list(network.parameters()))  # every rank takes part in gathering
        assert (found is None) == (rank == 1)
        assert found is None or all(torch.equal(a, b) for a, b in zip(found.parameters(), network.parameters(), strict=True))


# --- kill -9


def lines_so_far(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork server, and no such signal")
@pytest.mark.parametrize("kind", list(KINDS))
def test_killed_at_any_moment_a_run_ends_as_if_nothing_had_been(kind: str, shards_folder: Path, tmp_path: Path):
    """Killed six times, after some lines of metrics and a random moment more each time; then left alone."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.train.killed"])

    def start(out: str) -> Any:
        process = context.Process(target=train, args=(str(shards_folder), str(tmp_path / out), kind))
        process.start()
        return process

    rng = random.Random(kind)
    kills = 0
    for _ in range(6):
        process = start("cut")
        before, more = lines_so_far(tmp_path / "cut"), rng.randrange(-2, 7)
        while process.is_alive() and lines_so_far(tmp_path / "cut") < before + more:
            process.join(0.002)
        process.join(rng.random() * 0.03)
        kills += process.is_alive()
        process.kill()
        process.join()
    for out in ("cut", "whole"):
        process = start(out)
        process.join()
        assert process.exitcode == 0, (tmp_path / f"{out}.txt").read_text()
    assert kills >= 2
    assert "going on from step" in (tmp_path / "cut.txt").read_text()
    names = ("step", "tokens", "loss", "lr", "grad_norm", "balance", "eval")
    cut, whole = ([[line.get(n) for n in names] for line in read_lines(tmp_path / out / "metrics.jsonl")] for out in ("cut", "whole"))
    assert cut == whole
    assert whole[-1][0] == 24
    weights = [(tmp_path / out / "model" / "model.safetensors").read_bytes() for out in ("cut", "whole")]
    assert weights[0] == weights[1]
