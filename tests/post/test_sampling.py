"""The engine as a sampler: full batches across prompts, answers that depend on nothing but prompt and seed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen2 import LLM, SamplingParams
from qwen2.post.checks.checkers import Verdict, make_checker
from qwen2.post.rows.encode import encode
from qwen2.post.rows.readers import read
from qwen2.post.rows.records import Example, Preference
from qwen2.post.synth.prompts import Prompts, read_prompts
from qwen2.post.synth.reject import reject
from qwen2.post.synth.sampling import EngineSampler, Sampled, digest_of, digest_of_weights, seed_of
from qwen2.post.synth.settings import RejectSettings
from qwen2.weights.model import load
from qwen2.weights.modelfile import Modelfile
from tests.conftest import random_adapter, tiny_model
from tests.post.fake import FakeSampler
from tests.post.test_reject import rows, sums, write

NUMBER = make_checker("number")
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny_model(), max_batch=4)


class Even:
    """Right where an answer has an even number of characters."""

    name, digest, uses = "even", "even 1", frozenset[str]()

    def prepare(self, row: Any) -> None: ...

    def check(self, answer: str, row: Any) -> Verdict:
        return Verdict(len(answer) % 2 == 0, str(len(answer)))

    def close(self) -> None: ...


def asked(tmp_path: Path, count: int) -> Prompts:
    listed = [{"prompt": f"the quick brown fox {i} " + "and the lazy dog " * (i % 3), "source": "foxes"} for i in range(count)]
    return read_prompts([write(tmp_path / "foxes.jsonl", listed)], Even())


PARAMS = SamplingParams(temperature=1, max_tokens=12, ignore_eos=True, stop=("a",))


def test_an_engine_answers_all_and_its_answers_are_those_of_one_prompt_alone(llm: LLM, tmp_path: Path) -> None:
    prompts = asked(tmp_path, 9)
    sampler = EngineSampler(llm, PARAMS, digest="tiny")
    found = {prompt.key: answers for prompt, answers in sampler.sample(prompts.found, 3, 7)}
    assert found.keys() == {prompt.key for prompt in prompts.found}
    for prompt in prompts.found:
        alone = llm.chat(
            prompt.messages, SamplingParams(temperature=1, max_tokens=12, ignore_eos=True, stop=("a",), n=3, seed=seed_of(7, prompt.key))
        )
        assert found[prompt.key] == [Sampled(one.text, len(one.token_ids), one.finish_reason) for one in alone.choices]
    llm.engine.settle()
    llm.engine.check()


def test_prompts_are_taken_as_the_engine_has_room(llm: LLM, tmp_path: Path) -> None:
    prompts, taken = asked(tmp_path, 60).found, 0

    def counted() -> Any:
        nonlocal taken
        for prompt in prompts:
            taken += 1
            yield prompt

    first = EngineSampler(llm, PARAMS, digest="tiny").sample(counted(), 2, 0)
    next(first)
    assert 4 <= taken < 30
    first.close()
    llm.engine.settle()
    llm.engine.check()


def test_a_prompt_that_does_not_fit_is_refused_and_the_others_are_answered(llm: LLM, tmp_path: Path) -> None:
    long = [{"prompt": "fox " * 2000}, {"prompt": "a fox"}, {"prompt": "dog " * 2000}]
    prompts = read_prompts([write(tmp_path / "long.jsonl", long)], Even())
    summary = reject(EngineSampler(llm, PARAMS, digest="tiny"), prompts, Even(), RejectSettings(k=4), tmp_path / "out")
    assert (summary.finished, sum(summary.refused.values()), summary.answers) == (3, 2, 4)
    assert all("the window is 512" in reason for reason in summary.refused)


def test_a_whole_run_of_an_engine_twice(llm: LLM, tmp_path: Path) -> None:
    prompts = asked(tmp_path, 6)
    for name in ("a", "b"):
        summary = reject(EngineSampler(llm, PARAMS, digest="tiny"), prompts, Even(), RejectSettings(k=4), tmp_path / name)
        llm.engine.clear_cache()
    assert summary.answers == 24
    assert summary.cut + summary.right + summary.wrong == 24
    for name in ("sft.jsonl", "pairs.jsonl", "summary.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["sampling"]["temperature"], config["sampling"]["max_tokens"], config["answers"]) == (1, 12, {"k": 4, "seed": 0})


def test_rows_are_of_the_conversation_that_was_asked(tmp_path: Path) -> None:
    fox = LLM(replace(tiny_model(), made=Modelfile(system="you are a fox", messages=(("user", "who?"), ("assistant", "a fox")))))
    prompts, params = asked(tmp_path, 2), SamplingParams(temperature=1, max_tokens=200, stop=("a",))
    assert reject(EngineSampler(fox, params, digest="fox"), prompts, Even(), RejectSettings(k=16), tmp_path / "out").sft_rows
    for row in rows(tmp_path / "out" / "sft.jsonl"):
        (prompt,) = (one for one in prompts.found if one.key == row["provenance"]["key"])
        (record,) = read([write(tmp_path / "one.jsonl", [row])])
        assert isinstance(record, Example)
        trained, prompt_ids = encode(fox.template, record), fox.ask(prompt.messages).request.prompt
        assert trained.ids[: len(prompt_ids)] == list(prompt_ids)
        assert trained.mask.index(True) == len(prompt_ids)


def test_tools_are_offered_and_calls_become_rows(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model reads the tools; what it called is a call in the rows, which training reads, and renders as it was sampled."""
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}]
    listed = [{"messages": [{"role": "user", "content": "1 + 1?"}], "tools": tools}]
    prompts = read_prompts([write(tmp_path / "tools.jsonl", listed)], Even())
    (prompt,), sampler, requests = prompts.found, EngineSampler(llm, PARAMS, digest="tiny"), list[Any]()
    ask = llm.ask
    monkeypatch.setattr(llm, "ask", lambda *words: requests.append(ask(*words)) or requests[-1])
    assert len(list(sampler.sample([prompt], 1, 0))) == 1
    assert list(requests[0].request.prompt) == llm.render(prompt.messages, tools).ids
    text = llm.template.render([*prompt.messages, CALLED], tools).text.partition(llm.template.render(prompt.messages, tools).text)[2]
    text = text.partition("<|im_end|>")[0]
    assert "add" in text

    class Called(FakeSampler):
        def message(self, text: str, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
            return sampler.message(text, tools)

    answers = [Sampled(text, 9, "stop"), Sampled(text.replace(": 1", ": 12"), 9, "stop"), Sampled("2" * (1 + len(text) % 2), 9, "stop")]
    reject(Called(lambda *_: answers), prompts, Even(), RejectSettings(k=3, per_prompt=3), tmp_path / "out")
    sft, pairs = rows(tmp_path / "out" / "sft.jsonl"), rows(tmp_path / "out" / "pairs.jsonl")
    assert all(row["tools"] == tools for row in (*sft, *pairs))
    called = [row["messages"][-1] for row in sft if "tool_calls" in row["messages"][-1]]
    called += [side for row in pairs for side in (*row["chosen"], *row["rejected"]) if "tool_calls" in side]
    assert sft
    assert pairs
    assert called
    assert all(json.loads(message["tool_calls"][0]["function"]["arguments"]) in ({"a": 1}, {"a": 12}) for message in called)
    for name in ("sft.jsonl", "pairs.jsonl"):
        assert all(isinstance(found, Example | Preference) and found.tools == tools for found in read(tmp_path / "out" / name))


def test_equal_answers_are_refused_at_once(llm: LLM, tmp_path: Path) -> None:
    sampler = EngineSampler(llm, SamplingParams(temperature=0), digest="tiny")
    with pytest.raises(ValueError, match="k 2 at temperature 0, this model's own default or what you gave: all answers would be alike"):
        reject(sampler, asked(tmp_path, 1), Even(), RejectSettings(k=2), tmp_path / "out")
    assert reject(sampler, asked(tmp_path, 1), Even(), RejectSettings(k=1), tmp_path / "out").answers == 1


def test_a_model_is_told_by_its_files(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    digest = digest_of(LLM(model))
    assert (len(digest), digest_of(LLM(tiny_folder))) == (16, digest)
    assert digest_of(LLM(replace(model, made=replace(model.made, system="Be brief.")))) != digest
    with pytest.raises(ValueError, match="no weights here to tell the model by"):
        digest_of(LLM(tiny_model()))
    assert digest_of_weights(tiny_model()) == digest_of_weights(tiny_model()) != digest_of_weights(tiny_model(seed=1))


def test_a_model_is_told_by_its_adapter_wherever_that_lies(tiny_folder: Path, tmp_path: Path) -> None:
    model, folder = load(tiny_folder), tmp_path / "mine"
    found = [EngineSampler(LLM(model), PARAMS)]
    for seed in (1, 2, 1):
        shutil.rmtree(folder, ignore_errors=True)
        found.append(EngineSampler(LLM(model, adapter=random_adapter(model.config, folder, seed)), PARAMS))
    made = replace(model, made=replace(model.made, adapter="elsewhere"), adapter=folder)
    found.append(EngineSampler(LLM(made), PARAMS))
    bare, first, second, again, own = (sampler.digest for sampler in found)
    assert first == again == own
    assert len({bare, first, second}) == 3
    (folder / "generation_config.json").write_text('{"eos_token_id": 511}')  # what its folder says of chats counts too
    assert EngineSampler(LLM(model, adapter=folder), PARAMS).digest not in (bare, first, second)
    assert [sampler.name for sampler in found] == [model.name, *[f"{model.name} with the adapter mine"] * 3, model.name]


def test_the_real_model_gives_the_same_rows_in_any_batch(smollm: Path, tmp_path: Path) -> None:
    prompts = read_prompts([write(tmp_path / "sums.jsonl", sums(2))], NUMBER)
    for batch in (2, 8):
        sampler = EngineSampler(LLM(smollm, max_batch=batch), SamplingParams(temperature=1, max_tokens=8), digest="smollm")
        summary = reject(sampler, prompts, NUMBER, RejectSettings(k=3), tmp_path / str(batch))
        assert (summary.finished, summary.answers) == (2, 6)
    assert (tmp_path / "2" / "summary.json").read_bytes() == (tmp_path / "8" / "summary.json").read_bytes()
    told = [sorted(rows(tmp_path / name / "answers.jsonl"), key=lambda row: row["key"]) for name in ("2", "8")]
    assert told[0] == told[1]
