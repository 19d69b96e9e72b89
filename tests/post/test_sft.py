"""Fine-tuning end to end: packing changes nothing, masks hold, resuming is exact, and what comes out stops."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qwen2.config import GenerationDefaults, MoEConfig, tiny
from qwen2.config.lora import LoraSettings
from qwen2.data.batches import Batch, pack
from qwen2.engine.llm import LLM
from qwen2.engine.request import SamplingParams
from qwen2.model import Qwen2, packed_attend
from qwen2.model.lora import add_lora, lora_parameters
from qwen2.post.finetuning.noise import with_noise
from qwen2.post.finetuning.samples import Samples
from qwen2.post.finetuning.settings import SftSettings
from qwen2.post.finetuning.sft import HELD_OUT_LOSS, Data, Job, evaluation, has_text, held_out_batches, held_out_loss, sft, steps_of
from qwen2.post.rows.examples import Examples
from qwen2.post.rows.records import Example, PlainText
from qwen2.tokenizer import ChatTemplate
from qwen2.train import standard_error
from qwen2.train.faults import TrainingError
from qwen2.train.loss import cross_entropy
from qwen2.train.metrics import read_lines
from qwen2.train.saved import take
from qwen2.train.world import World
from qwen2.weights.export import to_gguf, to_hf_folder
from qwen2.weights.model import Model, load
from tests.conftest import random_network, tiny_model
from tests.post.conftest import gathered, run, small, talk, talks
from tests.train.conftest import logged


def loss_and_gradients(network: Qwen2, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss of all learned tokens of the batches, and its gradients."""
    network.zero_grad()
    network.requires_grad_(True)
    count, value = sum(batch.targets for batch in batches), 0.0
    for batch in batches:
        hidden = network(batch.tokens, packed_attend(network.config, batch.positions, batch.lengths))
        total, _, _ = cross_entropy(network, hidden, batch.labels)
        (total / count).backward()
        value += float(total.detach()) / count
    return value, {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def padded(network: Qwen2, examples: Examples) -> tuple[float, dict[str, torch.Tensor]]:
    """The same by brute force: a matrix of rows filled up with <|endoftext|>, full logits, a mean over the learned tokens."""
    network.zero_grad()
    network.requires_grad_(True)
    made = [examples.example(index) for index in range(len(examples))]
    longest = max(len(ids) for ids, _ in made)
    loss, count = torch.zeros(()), sum(sum(mask[1:]) for _, mask in made)
    for ids, mask in made:
        filled = torch.tensor(ids + [509] * (longest - len(ids)))
        hidden = network(filled, packed_attend(network.config, torch.arange(longest), (longest,)))
        logits = network.logits(hidden[:-1]).float()
        wanted = torch.tensor([*mask[1:], *[False] * (longest - len(ids))])
        loss = loss + torch.nn.functional.cross_entropy(logits, filled[1:], reduction="none")[wanted].sum() / count
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def close(a: tuple[float, dict[str, torch.Tensor]], b: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    for name, gradient in a[1].items():
        torch.testing.assert_close(gradient, b[1][name], rtol=1e-3, atol=1e-6 + 1e-4 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("kind", ["dense", "tied", "moe"])
def test_packed_rows_have_the_loss_and_gradients_of_separate_and_of_padded_examples(kind: str) -> None:
    moe = MoEConfig(experts=4, active=2, expert_ffn=32, shared_ffn=64)
    network = random_network({"dense": tiny(), "tied": tiny(tied=True), "moe": tiny(moe=moe)}[kind])
    examples = gathered(small(), talks(6)).examples
    together = [pack([examples.row([3, 0, 5]), examples.row([1, 4, 2])])]
    apart = [pack([examples.row([index])]) for index in range(6)]
    packed = loss_and_gradients(network, together)
    close(packed, loss_and_gradients(network, apart))
    close(packed, padded(network, examples))


@pytest.mark.parametrize("learns", ["nothing", "all weights", "adapters", "adapters over blocks"])
def test_a_neighbours_words_change_nothing(learns: str, tmp_path: Path) -> None:
    """Change example A: the logits of B, in the same row, are the same bits, by the code that records what training needs too."""
    network = random_network(tiny())
    if learns == "adapters over blocks":
        to_gguf(tiny_model(), tmp_path / "base.gguf", "Q4_1")
        network = load(tmp_path / "base.gguf", packed=True).network
    if learns.startswith("adapters"):
        add_lora(network, LoraSettings(rank=4), torch.Generator().manual_seed(0))
        for name, parameter in lora_parameters(network).items():
            if "lora_B" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    elif learns == "all weights":
        network.requires_grad_(True)
    examples = gathered(small(), talks(3)).examples
    row = examples.row([0, 1, 2])
    start = sum(row.lengths[:2])
    found = []
    for change in (False, True):
        tokens = torch.from_numpy(row.tokens.copy())
        if change:
            tokens[: row.lengths[0]] = torch.randint(508, (row.lengths[0],), generator=torch.Generator().manual_seed(1))
        batch = pack([row])
        with torch.set_grad_enabled(learns != "nothing"):
            hidden = network.train()(tokens, packed_attend(network.config, batch.positions, batch.lengths))
            found.append(network.logits(hidden))
    assert not torch.equal(found[0][:start], found[1][:start])
    assert torch.equal(found[0][start:], found[1][start:])


def test_no_prompt_token_has_a_loss() -> None:
    """Gradients with respect to the prompt's targets are none: other words of a user's turn behind the answer change no loss."""
    network = random_network(tiny())
    base = talk(random.Random(1), 1)
    ends = [[*base, {"role": "user", "content": words}] for words in ("the fox", "some more of it and then the lazy dog")]
    losses = [loss_and_gradients(network, [pack([gathered(small(), [Example(turns, None, "x")]).examples.row([0])])])[0] for turns in ends]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_steps_with_texts_are_told_from_those_of_conversations_alone() -> None:
    examples = gathered(small(), [*talks(2), PlainText("some more of it and then the lazy dog", "x")]).examples
    found = [has_text(pack([examples.row(indices)])) for indices in ([0, 1], [2], [0, 2], [1])]
    assert found == [False, True, True, False]


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_by_epochs_learns_every_token_as_often_as_it_has_epochs(world: int) -> None:
    """However a step is split over micro-batches and ranks; the last step has what is left."""

    class Rank(World):
        data_size = world

        def __init__(self, rank: int) -> None:
            super().__init__()
            self.data_rank = rank

    examples = gathered(small(), talks(32)).examples
    settings = small(epochs=3.0, batch=4, micro_batch=2, length=128)
    settings = replace(settings, steps=steps_of(examples, settings))
    ranks = [Data(examples, settings, Rank(rank)) for rank in range(world)]
    assert ranks[0].last is not None
    assert ranks[0].last % 4, "the last step is not full"
    counts: list[int] = []
    for _ in range(settings.steps):
        steps = [data.next_step() for data in ranks]
        assert len({len(step) for step in steps}) == 1, "as many micro-batches on every rank"
        counts.append(sum(batch.targets for step in steps for batch in step))
    assert sum(counts) == 3 * examples.targets
    assert ranks[0].rows.taken == ranks[0].last


def test_how_a_step_is_split_changes_nothing(tmp_path: Path) -> None:
    for micro in (1, 3, 4):
        run(tmp_path / str(micro), micro_batch=micro)
    numbers = [logged(tmp_path / str(micro), "loss", "grad_norm", "tokens") for micro in (1, 3, 4)]
    for other in numbers[1:]:
        assert [line[2] for line in other] == [line[2] for line in numbers[0]]
        for ours, theirs in zip(other, numbers[0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


def test_resumed_at_any_step_a_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    """With packing, by epochs, over the border of an epoch, with a last step that is not full, and with an average."""
    examples = talks(31)
    given: dict[str, Any] = {
        "epochs": 2.0,
        "save_every": 1,
        "keep": 20,
        "average": "ema",
        "eval_share": 0.2,
        "samples": 1,
        "sample_tokens": 4,
    }
    settings = small(**given)
    given["steps"] = steps_of(gathered(settings, examples).examples, settings)
    run(tmp_path / "whole", examples, **given)
    rows = len(Data(gathered(settings, examples).examples, small(**given), World()).rows.plan(0))
    assert rows % 4, "the border of an epoch lies within a step"
    for stop in (1, rows // 4 + 1):
        part = tmp_path / f"part-{stop}"
        shutil.copytree(tmp_path / "whole", part)
        shutil.rmtree(part / "model")
        for place in (part / "checkpoints").iterdir():
            if int(place.name.partition("-")[2]) > stop:
                shutil.rmtree(place)
        run(part, examples, resume=True, **given)
        names = ("step", "loss", "grad_norm", "lr", "tokens")
        assert logged(part, *names) == logged(tmp_path / "whole", *names)
        assert (part / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
        ours, theirs = load(part / "model").network, load(tmp_path / "whole" / "model").network
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_run_is_not_resumed_with_other_data(tmp_path: Path) -> None:
    run(tmp_path / "run", talks(20))
    with pytest.raises(ValueError, match="data: sha256 is"):
        run(tmp_path / "run", talks(21), resume=True)
    with pytest.raises(ValueError, match="settings: last_turn is False in the run, True here"):
        run(tmp_path / "run", talks(20), resume=True, last_turn=True)


def base_model() -> Model:
    """What pre-training leaves behind: it stops at <|endoftext|> alone, and has no template of its own."""
    model = tiny_model(tiny(layers=2, hidden=64))
    model.config = replace(model.config, eos=(509,))
    model.tokenizer.eos = (509,)
    return replace(model, generation=GenerationDefaults(eos=(509,)), template=ChatTemplate.of(model.tokenizer))


def test_a_base_model_becomes_one_that_answers_and_stops(tmp_path: Path) -> None:
    """Pad = EOS and a base model's eos are what others' chat models run on for: here <|im_end|> is learned, and saved where it counts."""
    examples = [
        Example([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], None, "x")
        for question, answer in (("the fox?", "quick and brown"), ("the dog?", "lazy"), ("some more?", "of it"))
    ]
    network = Qwen2(base_model().config, dtype=torch.float32).init_weights(torch.Generator().manual_seed(0))
    run(tmp_path / "run", examples, replace(base_model(), network=network), steps=60, lr=1e-2, batch=1, micro_batch=1, eval_every=0)
    folder = tmp_path / "run" / "model"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [511, 509]
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 511
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    to_gguf(load(folder), tmp_path / "model.gguf", "F32")
    for source in (folder, tmp_path / "run" / "checkpoints" / "step-000060", tmp_path / "model.gguf"):
        llm = LLM(take(source, print))
        for example in examples:
            output = llm.chat(example.messages[:1], SamplingParams(max_tokens=32))
            assert (output.text, output.finish_reason) == (example.messages[1]["content"], "stop")


def test_adapters_of_a_base_model_stop_wherever_they_are_used(tmp_path: Path) -> None:
    """Beside the base and merged into it, from the run, a checkpoint or the adapter's folder: the base alone goes on for ever."""
    to_hf_folder(base_model(), tmp_path / "base")
    start, settings = load(tmp_path / "base", dtype="float32"), small(steps=2)
    sft(Job(gathered(settings, talks(8), start), start, settings, tmp_path / "run", str(tmp_path / "base"), lora=LoraSettings(rank=4)))
    adapter = tmp_path / "run" / "adapter"
    assert {"adapter_config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {
        path.name for path in adapter.iterdir()
    }
    ends_now = SamplingParams(temperature=0, max_tokens=3, logit_bias={511: 100.0})
    hello = talk(random.Random(1))[:1]
    assert LLM(tmp_path / "base").chat(hello, ends_now).finish_reason == "length"
    llms = [LLM(tmp_path / "base", adapter=adapter)]
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-000002", adapter):
        model = take(source, print)
        assert (model.config.eos, model.generation.eos, model.tokenizer.eos) == ((511,), (511, 509), (511, 509))
        llms.append(LLM(model))
    for llm in llms:
        assert llm.chat(hello, ends_now).finish_reason == "stop"


def test_transformers_reads_what_was_saved(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    run(tmp_path / "run", talks(8), base_model(), steps=1)
    folder = tmp_path / "run" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [511, 509]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (511, 509)
    messages = talk(random.Random(1), 2)
    theirs = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    assert theirs == take(folder, print).template.render(messages[:3]).ids


def test_held_out_rows_are_evaluated_by_learned_tokens(tmp_path: Path) -> None:
    examples = talks(40)
    run(tmp_path / "run", examples, eval_share=0.3, steps=6, samples=2, sample_tokens=5)
    evaluations = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "eval" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    network, settings = tiny_model().network, small(eval_share=0.3)
    held_out = gathered(settings, examples).held_out
    by_hand = loss_and_gradients(network, [pack([held_out.row([index])]) for index in range(len(held_out))])[0]
    assert evaluations[0]["eval"][HELD_OUT_LOSS] == pytest.approx(by_hand, rel=1e-5)
    assert evaluations[2]["eval"][HELD_OUT_LOSS] < evaluations[0]["eval"][HELD_OUT_LOSS]
    few = held_out_batches(held_out, replace(settings, eval_rows=1))
    assert held_out_loss(network, few, World()) == pytest.approx(loss_and_gradients(network, few)[0], rel=1e-5)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == [0, 0, 3, 3, 6, 6]
    assert set(samples[0]) == {"step", "prompt", "answer", "reference", "ended"}


@pytest.mark.parametrize("packed", [False, True], ids=["weights", "blocks"])
def test_an_evaluation_has_the_error_of_its_examples(packed: bool, tmp_path: Path) -> None:
    network, examples, world = tiny_model().network, gathered(small()).examples, World()
    if packed:
        to_gguf(tiny_model(), tmp_path / "base.gguf", "Q4_1")
        network = load(tmp_path / "base.gguf", packed=True).network
    batches = held_out_batches(examples, small())
    assert max(len(batch.lengths) for batch in batches) > 1
    with torch.no_grad():
        found = evaluation(network, batches, world)
        assert found[HELD_OUT_LOSS] == pytest.approx(held_out_loss(network, batches, world), rel=1e-6)
        alone = [pack([examples.row([i])]) for i in range(len(examples))]
        losses = torch.tensor([held_out_loss(network, [batch], world) for batch in alone])
    counts = torch.tensor([batch.targets for batch in alone])
    assert found[standard_error.named(HELD_OUT_LOSS)] == pytest.approx(standard_error.of_ratio(losses * counts, counts), rel=1e-4)
    assert evaluation(network, alone[:1], world).keys() == {HELD_OUT_LOSS}  # one example tells nothing of others


def test_samples_are_what_the_engine_answers_to_the_same_prompt(tmp_path: Path) -> None:
    examples, model = talks(4), tiny_model()
    before = LLM(tiny_model()).chat(examples[0].messages[:-1], SamplingParams(temperature=0, repetition_penalty=1, max_tokens=6)).text
    run(tmp_path / "run", examples, model, steps=1, samples=1, sample_tokens=6)
    first = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == examples[0].messages[-2]["content"]
    assert first["answer"] == before
    assert first["reference"] == examples[0].messages[-1]["content"]


def test_a_step_is_sampled_once_however_often_it_comes(tmp_path: Path) -> None:
    """After a spike a run goes back and comes to the same steps again; so does one that is resumed."""
    path, model = tmp_path / "samples.jsonl", tiny_model()
    ask = lambda: Samples(talks(2), model, small(samples=2, sample_tokens=2), path)  # noqa: E731
    steps = lambda: [line["step"] for line in read_lines(path)]  # noqa: E731
    samples = ask()
    for step in (0, 3, 6):
        samples(model.network, step)
    samples(model.network, 3)
    assert steps() == [0, 0, 3, 3]
    samples(model.network, 6)
    assert steps() == [0, 0, 3, 3, 6, 6]
    ask()(model.network, 3)
    assert steps() == [0, 0, 3, 3]


def test_noise_on_the_embeddings_is_bounded_and_drawn_again_by_a_resumed_run(tmp_path: Path) -> None:
    """NEFTune: within alpha over the root of an example's tokens times the width, in training alone, and the same draws after a pause."""
    network = random_network(tiny())
    batch = pack([gathered(small(), talks(3)).examples.row([0, 1, 2])])
    found: list[torch.Tensor] = []
    loss = with_noise(lambda network, batch: found.append(network.model.embed_tokens(batch.tokens)), 5.0)
    loss(network, batch)
    noise = (found[0] - network.model.embed_tokens(batch.tokens)).detach()
    bounds = 5.0 / (torch.tensor(batch.lengths) * 64.0).sqrt()
    for part, bound in zip(noise.split(batch.lengths), bounds, strict=True):
        assert 0.95 * bound < float(part.abs().max()) <= bound * (1 + 1e-5)
        assert abs(float(part.mean())) < 0.1 * bound
    with torch.no_grad():
        loss(network, batch)
    assert torch.equal(found[1], network.model.embed_tokens(batch.tokens))
    given: dict[str, Any] = {"neftune": 5.0, "steps": 4, "eval_share": 0.3}
    run(tmp_path / "whole", **given)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step-000004")
    run(tmp_path / "part", resume=True, **given)
    assert logged(tmp_path / "part", "loss", "grad_norm") == logged(tmp_path / "whole", "loss", "grad_norm")
    run(tmp_path / "without", steps=4, eval_share=0.3)
    evaluated = [
        [line["eval"][HELD_OUT_LOSS] for line in read_lines(tmp_path / name / "metrics.jsonl") if "eval" in line]
        for name in ("whole", "without")
    ]
    assert evaluated[0][0] == evaluated[1][0]
    assert evaluated[0][-1] != evaluated[1][-1]


def test_what_is_not_finite_stops_a_run_and_is_named(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.network.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(TrainingError, match=r"step 1: the loss of micro-batch 1 of 2 is not finite: .*layers\.1\.mlp\.up_proj\.weight"):
        run(tmp_path / "run", model=model)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"length 100,000: the model's window is"):
        run(tmp_path / "a", length=100_000)
    assert [SftSettings(batch=batch).at_once for batch in (1, 2, 8)] == [1, 2, 2]
    with pytest.raises(ValueError, match="micro_batch 8: a step has 4 rows"):
        small(micro_batch=8)
    with pytest.raises(ValueError, match="too_long 'chop'"):
        small(too_long="chop")
    with pytest.raises(ValueError, match="precision float16"):
        small(precision="float16")
