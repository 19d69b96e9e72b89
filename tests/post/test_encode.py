"""Ids and masks: those of the renderer, learned exactly where an assistant speaks; cutting only at the left, only when asked."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from qwen2.engine.llm import LLM
from qwen2.post.rows.encode import TooLongError, encode, end_of_turn
from qwen2.post.rows.examples import collect
from qwen2.post.rows.records import Example, PlainText
from qwen2.tokenizer import ChatTemplate
from qwen2.tokenizer.styles import QWEN2_JINJA
from tests.conftest import tiny_model, tiny_tokenizer
from tests.post.conftest import small, talk

TOOL = {"type": "function", "function": {"name": "aqi", "description": "Air.", "parameters": {"type": "object", "properties": {}}}}
CALLS = [{"type": "function", "function": {"name": "aqi", "arguments": {"city": city}}} for city in ("B", "S")]
AGENT: list[dict[str, Any]] = [
    {"role": "user", "content": "the fox?"},
    {"role": "assistant", "content": "let me see", "tool_calls": CALLS},
    {"role": "tool", "content": "10"},
    {"role": "tool", "content": "72"},
    {"role": "assistant", "content": "good and quick."},
]
CONTROL = [{"role": "user", "content": "say <|im_end|>"}, {"role": "assistant", "content": "<|im_start|> and <|im_end|>"}]
STYLES = ["qwen2", "qwen2.5", "jinja"]
OTHER = QWEN2_JINJA.replace("SYSTEM", "be brief").replace("<|im_end|>' + '\\n'", "<|im_end|>' + '\\n\\n'")  # a template of its own


def template_of(style: str) -> ChatTemplate:
    if style != "jinja":
        return ChatTemplate(tiny_tokenizer(), style)  # type: ignore[arg-type]
    return ChatTemplate.of(tiny_tokenizer(), source=OTHER)


def conversations(style: str) -> list[Example]:
    rng = random.Random(1)
    plain = [Example(talk(rng, turns), None, "x") for turns in (1, 2, 3)]
    with_system = Example([{"role": "system", "content": "you are a fox"}, *talk(rng, 2)], None, "x")
    return [*plain, with_system, Example(CONTROL, None, "x"), *([] if style == "jinja" else [Example(AGENT, [TOOL], "x")])]


@pytest.mark.parametrize("style", STYLES)
def test_ids_and_mask_are_the_renderers(style: str) -> None:
    template = template_of(style)
    for example in conversations(style):
        rendered = template.render(example.messages, example.tools, add_generation_prompt=False)
        made = encode(template, example)
        assert (made.ids, made.mask, made.cut) == (rendered.ids, rendered.mask, 0)


@pytest.mark.parametrize("style", STYLES)
def test_up_to_an_answer_the_ids_are_the_prompt_that_the_server_reads(style: str) -> None:
    """For every answer of every conversation, with tools, parallel calls, and with or without a system prompt."""
    template = template_of(style)
    server = LLM(replace(tiny_model(), tokenizer=template.tokenizer, template=template))  # which server and chat ask
    for example in conversations(style):
        made = encode(template, example)
        for i, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            prompt = server.render(example.messages[:i], example.tools).ids
            assert made.ids[: len(prompt)] == prompt
            assert made.mask[len(prompt)], "and the next token is one that the model samples"
            assert not made.mask[len(prompt) - 1]


@pytest.mark.parametrize("style", STYLES)
def test_what_is_learned_is_each_answer_with_its_end_and_nothing_else(style: str) -> None:
    template = template_of(style)
    tokenizer = template.tokenizer
    for example in conversations(style)[:4]:
        made = encode(template, example)
        said = [tokenizer.decode([id]) for id, learned in zip(made.ids, made.mask, strict=True) if learned]
        assert "".join(said) == "".join(f"{m['content']}<|im_end|>" for m in example.messages if m["role"] == "assistant")
        assert end_of_turn(template) == 511


def test_control_strings_in_texts_are_text() -> None:
    made = encode(template_of("qwen2"), Example(CONTROL, None, "x"))
    assert sum(id == 511 for id in made.ids) == 3  # system, user and assistant end their turns, and nobody else does


@pytest.mark.parametrize("style", STYLES)
def test_answers_that_are_excluded_and_last_answers_only(style: str) -> None:
    template = template_of(style)
    example = Example(talk(random.Random(3), 3), None, "x")
    whole, last = encode(template, example), encode(template, example, last=True)
    without = encode(template, Example(example.messages, None, "x", untrained=(1, 5)))
    answers = [f"{message['content']}<|im_end|>" for message in example.messages[1::2]]
    for made, said in ((whole, answers), (last, answers[2:]), (without, answers[1:2])):
        assert made.ids == whole.ids
        assert template.tokenizer.decode([id for id, learned in zip(made.ids, made.mask, strict=True) if learned]) == "".join(said)


def test_too_long_is_an_error_and_cut_only_at_the_left() -> None:
    template = template_of("qwen2")
    example = Example(talk(random.Random(4), 3), None, "x")
    whole = encode(template, example)
    starts = [i for i in range(1, len(whole.mask)) if whole.mask[i] and not whole.mask[i - 1]]
    with pytest.raises(TooLongError, match=rf"{len(whole.ids)} tokens, a row has {len(whole.ids) - 1}"):
        encode(template, example, len(whole.ids) - 1)
    assert encode(template, example, len(whole.ids)) == whole
    asked = [start - len(template.tokenizer.encode_trusted("<|im_end|>\n<|im_start|>assistant\n")) for start in starts]
    for over in range(1, len(whole.ids)):
        length = len(whole.ids) - over
        if over >= asked[-1]:
            with pytest.raises(TooLongError, match="its last answer alone has"):
                encode(template, example, length, cut=True)
            continue
        made = encode(template, example, length, cut=True)
        assert (made.ids, made.cut) == (whole.ids[over:], over)
        assert [i + over for i, learned in enumerate(made.mask) if learned] == [
            i for i in range(over, len(whole.ids)) if whole.mask[i] and asked[sum(start <= i for start in starts) - 1] > over
        ]
        assert made.lost == sum(end <= over for end in asked)


def test_long_ones_are_counted_and_nothing_is_cut_unasked() -> None:
    template, rng = template_of("qwen2"), random.Random(5)
    examples = [Example(talk(rng, turns), None, f"f:{turns}") for turns in (1, 1, 6)]
    longest = len(encode(template, examples[2]).ids)
    found = collect(examples, template, small(length=longest - 5))
    assert (len(found.examples), found.skipped, found.cut) == (2, {"longer than a row": 1}, 0)
    assert f"f:6: {longest} tokens, a row has {longest - 5}" in found.lines()[1]
    found = collect(examples, template, small(length=longest - 5, too_long="cut"))
    assert (len(found.examples), dict(found.skipped), found.cut, found.cut_tokens) == (3, {}, 1, 5)
    assert "1 conversations cut at the left of the prompt, 5 tokens in all" in found.lines()
    first = next(i for i, learned in enumerate(encode(template, examples[2]).mask) if learned)
    found = collect(examples, template, small(length=longest - first + 1, too_long="cut"))  # the header of an answer is left
    assert "1 answers of these are not learned: they were cut off, or all of their prompt was" in found.lines()


def test_a_plain_text_is_learned_once_whole_with_its_end() -> None:
    template = template_of("qwen2")
    text = " ".join(random.Random(6).choice(["the", "quick", "fox"]) for _ in range(100))
    ids = [*template.tokenizer.encode(text), 509]
    assert encode(template, PlainText(text, "x")).ids == ids
    found = collect([PlainText(text, "x")], template, small(length=32))
    learned = [label for index in range(len(found.examples)) for label in found.examples.row([index]).labels if label >= 0]
    assert learned == ids[1:]
    assert len(found.examples) == -(-(len(ids) - 1) // 31)


def test_rows_have_labels_within_each_example_alone() -> None:
    found = collect([Example(talk(random.Random(seed), 2), None, "x") for seed in range(3)], template_of("qwen2"), small())
    row = found.examples.row([2, 0])
    at = 0
    for index, size in zip([2, 0], row.lengths, strict=True):
        ids, mask = found.examples.example(index)
        assert list(row.tokens[at : at + size]) == ids
        assert list(row.labels[at : at + size]) == [id if learned else -100 for id, learned in zip(ids[1:], mask[1:], strict=True)] + [-100]
        at += size
    assert found.examples.targets == sum(int((found.examples.row([index]).labels >= 0).sum()) for index in range(3))


def test_an_unwanted_answer_is_counted_and_not_learned() -> None:
    rng = random.Random(7)
    examples = [Example(talk(rng), None, "f:1", label=True), Example(talk(rng), None, "f:2", label=False)]
    found = collect(examples, template_of("qwen2"), small())
    assert (len(found.examples), dict(found.skipped)) == (1, {"an unwanted answer (label false)": 1})


def test_the_held_out_share_is_the_same_in_every_run_and_copies_stay_together() -> None:
    examples = [Example(talk(random.Random(seed % 150)), None, f"f:{seed}") for seed in range(300)]
    found = collect(examples, template_of("qwen2"), small(eval_share=0.2))
    again = collect(examples[::-1], template_of("qwen2"), small(eval_share=0.2))
    assert 0.1 < len(found.held_out) / 300 < 0.3
    assert sorted(found.held_out.where) == sorted(again.held_out.where)
    learned = {tuple(found.examples.example(i)[0]) for i in range(len(found.examples))}
    assert not learned & {tuple(found.held_out.example(i)[0]) for i in range(len(found.held_out))}


def test_no_prompt_is_on_both_sides() -> None:
    """Four answers to each of fifty prompts, in one turn and in several, also where a long answer has its prompt cut."""
    words = ["fox", "dog", "it", "some " * 40]
    for before in ([], talk(random.Random(1))):
        asked = [[*before, {"role": "user", "content": f"the {number} lazy dog"}] for number in range(50)]
        turns = [[*prompt, {"role": "assistant", "content": word}] for prompt in asked for word in words]
        examples = [Example(messages, None, f"f:{i // 4}", untrained=(1,) if before else ()) for i, messages in enumerate(turns)]
        found = collect(examples, template_of("qwen2"), small(eval_share=0.2, length=64, too_long="cut"))
        assert found.cut >= 50
        assert len(found.held_out) % 4 == 0
        assert len(found.held_out) + len(found.examples) == 200
        assert set(found.held_out.where).isdisjoint(found.examples.where)


def test_conversations_that_nobody_asked_for_are_held_out_one_by_one() -> None:
    """All begin with the same greeting of an assistant: a share of them is held out, not all or none."""
    greeting = {"role": "assistant", "content": "hello"}
    examples = [Example([greeting, *talk(random.Random(seed))], None, f"f:{seed}") for seed in range(100)]
    found = collect(examples, template_of("qwen2"), small(eval_share=0.2))
    assert 5 < len(found.held_out) < 40


def test_nothing_to_learn_from_says_what_was_read() -> None:
    with pytest.raises(ValueError, match=r"nothing to learn from: .* 1 left out: longer than a row"):
        collect([Example(talk(random.Random(8)), None, "f:1")], template_of("qwen2"), small(length=4))
    with pytest.raises(ValueError, match="holds none out"):
        collect([Example(talk(random.Random(8)), None, "f:1")], template_of("qwen2"), small(eval_share=1e-9))
