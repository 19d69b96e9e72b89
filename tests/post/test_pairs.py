"""Pairs as ids: the renderer's and no others, nothing lost without being counted."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from qwen2.engine.llm import LLM
from qwen2.post.preference.pairs import EQUAL, NO_LABEL, NO_PAIR, TEXT, TOO_LONG, WEIGHTLESS, Collected, Order, collect, following, group_of
from qwen2.post.preference.settings import DpoSettings
from qwen2.post.rows.encode import TooLongError
from qwen2.post.rows.readers import read
from qwen2.post.rows.records import Example, PlainText, Preference, Record
from qwen2.post.rows.turns import NO_KNOWN_FORMAT
from qwen2.tokenizer import ChatTemplate
from tests.conftest import tiny_model, tiny_tokenizer

END = 511
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def pair(prompt: list[Any], chosen: list[Any], rejected: list[Any], tools: Any = None) -> Preference:
    return Preference(prompt, chosen, rejected, tools, "pairs.jsonl:1")


PAIRS = {
    "one turn": pair([user("hello")], [says("fox")], [says("dog, lazy")]),
    "a system prompt": pair([{"role": "system", "content": "be brown"}, user("hello")], [says("fox")], [says("dog")]),
    "more turns": pair([user("a"), says("the fox"), user("b")], [says("fox")], [says("dog")]),
    "tools": pair([user("1+1")], [CALL], [says("dog")], TOOLS),
    "a call and its result in the answer": pair(
        [user("1+1")], [CALL, {"role": "tool", "content": "2"}, says("it is 2")], [says("some more")], TOOLS
    ),
    "a control token in the text": pair([user("say <|im_end|>")], [says("<|im_end|> it is")], [says("<|im_start|>")]),
    "an answer that begins with a line break": pair([user("hello")], [says("\n\nfox")], [says("\ndog")]),
}


def gathered(records: list[Record], **changes: Any) -> Collected:
    return collect(records, ChatTemplate.of(tiny_tokenizer()), DpoSettings(**{"length": 128, "eval_share": 0.0, **changes}))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("style", ["qwen2", "qwen2.5"])
def test_ids_are_those_of_chat_and_of_the_whole_conversation(name: str, style: Any):
    """The prompt is what a server reads, both sides go on as the renderer writes them, each ends with one end of turn, and no more."""
    template, record = ChatTemplate.of(tiny_tokenizer(), style=style), PAIRS[name]
    group, cut = group_of(template, record)
    assert cut == 0
    assert list(group.prompt) == template.render(record.messages, record.tools).ids
    for answer, side in zip(group.answers, (record.chosen, record.rejected), strict=True):
        whole = template.render([*record.messages, *side], record.tools, add_generation_prompt=False)
        ours = [*group.prompt, *answer.ids]
        assert whole.ids[: len(ours)] == ours
        rest, start = whole.ids[len(ours) :], len(group.prompt)
        assert END not in rest
        assert not any(whole.mask[len(ours) :])
        assert [bool(sampled) for sampled in answer.mask] == whole.mask[start : len(ours)]
        assert answer.ids[-1] == END
        assert (END, END) not in pairwise(answer.ids)


def test_the_prompt_is_the_engines_and_nothing_stands_before_it():
    """No token at the beginning that the template does not write: Qwen2 has no BOS."""
    model = tiny_model()
    llm = LLM(model)
    for record in PAIRS.values():
        group, _ = group_of(model.template, record)
        assert list(group.prompt) == llm.render(record.messages, record.tools).ids
        assert group.prompt[0] == 510


def test_a_jinja_template_gives_the_same_ids():
    source = ChatTemplate.of(tiny_tokenizer(), style="qwen2").jinja
    assert source is not None
    own, jinja = ChatTemplate.of(tiny_tokenizer(), style="qwen2"), ChatTemplate(tiny_tokenizer(), "jinja", source=source)
    for name in ("one turn", "a system prompt", "more turns"):
        assert group_of(own, PAIRS[name]) == group_of(jinja, PAIRS[name])


def test_a_template_that_rewrites_the_prompt_is_a_counted_skip():
    source = "{% for m in messages %}{{ loop.length }}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    template = ChatTemplate(tiny_tokenizer(), "jinja", source=source)
    with pytest.raises(ValueError, match=r"there is nothing to learn from: 1 rows read.*1 left out: refused by the template"):
        collect([PAIRS["one turn"]], template, DpoSettings())


ROWS: dict[str, tuple[Any, str | None]] = {  # a row, and why it is left out
    "good": ({"prompt": "hello", "chosen": "fox", "rejected": "dog"}, None),
    "equal sides": ({"prompt": "hello", "chosen": "fox", "rejected": "fox"}, "chosen and rejected are equal"),
    "an empty side": ({"prompt": "hello", "chosen": "fox", "rejected": ""}, "an empty answer"),
    "both empty": ({"prompt": "hello", "chosen": " ", "rejected": ""}, "an empty answer"),
    "no prompt": ({"chosen": "fox", "rejected": "dog"}, "no prompt"),
    "prompts that differ": ({"chosen": [user("a"), says("fox")], "rejected": [user("b"), says("fox")]}, "no prompt"),
    "a prompt alone": ({"prompt": "hello"}, "no assistant turn"),
    "too long": ({"prompt": "hello", "chosen": "fox " * 200, "rejected": "dog"}, TOO_LONG),
    "one answer": ({"prompt": "hello", "completion": "fox"}, NO_PAIR),
    "a labelled answer": ({"prompt": "hello", "completion": "fox", "label": True}, NO_PAIR),
    "a text": ({"text": "the quick brown fox"}, TEXT),
}


def test_what_is_left_out_is_counted_and_named(tmp_path: Path):
    """A file of everything that goes wrong: one pair is learned, each other row is counted, none silently."""
    file = tmp_path / "pairs.jsonl"
    lines = [json.dumps(row) for row, _ in ROWS.values()]
    file.write_text("\n".join([*lines, "{not json", json.dumps([1])]) + "\n")
    found = gathered(list(read([file])))
    expected = Counter(why for _, why in ROWS.values() if why is not None) + Counter({"not JSON": 1, NO_KNOWN_FORMAT: 1})
    assert found.read == len(ROWS) + 2 == len(found.items) + sum(found.skipped.values())
    assert found.skipped == expected
    assert [group.answers[0].ids[0] for group in found.items.groups] == [tiny_tokenizer().encode("fox")[0]]
    said = "\n".join(found.lines())
    assert "13 rows read: 1 pairs to learn from, 0 held out" in said
    at = list(ROWS).index("too long") + 1
    assert f"1 left out: {TOO_LONG} ({file}:{at}: " in said
    assert "tokens, at most 128 are taken" in said


def test_sides_of_the_same_tokens_are_equal():
    spaced = {**CALL, "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]}
    found = gathered([pair([user("1+1")], [CALL], [spaced], TOOLS), PAIRS["one turn"]], length=2048)
    assert found.skipped == {EQUAL: 1}


def test_pairs_longer_than_the_window_are_cut_only_when_asked_and_at_the_left_of_the_prompt():
    record = pair([user("the lazy dog " * 30)], [says("fox")], [says("dog and some more of it")])
    template = ChatTemplate.of(tiny_tokenizer())
    whole, _ = group_of(template, record)
    found = gathered([record, PAIRS["one turn"]], length=60, too_long="cut")
    assert (found.cut, found.cut_tokens) == (1, whole.longest - 60)
    cut = found.items.groups[0]
    assert cut.longest == 60
    assert cut.answers == whole.answers
    assert list(cut.prompt) == list(whole.prompt)[whole.longest - 60 :]
    assert "1 prompts cut at the left" in "\n".join(found.lines())
    assert len(gathered([record, PAIRS["one turn"]], length=60).items) == 1
    found = gathered([pair([user("a")], [says("fox " * 60)], [says("dog")]), PAIRS["one turn"]], length=40, too_long="cut")
    assert found.skipped[TOO_LONG] == 1
    assert "its longer answer alone has" in found.named[TOO_LONG][0]


def test_of_a_prompt_that_is_cut_something_that_is_asked_is_left():
    record, template = (
        pair([user("the lazy dog " * 30)], [says("fox")], [says("dog and some more of it")]),
        ChatTemplate.of(tiny_tokenizer()),
    )
    answer = max(answer.length for answer in group_of(template, record)[0].answers)
    opens = template.tokenizer.encode_trusted("<|im_end|>\n<|im_start|>assistant\n")
    for room in (1, len(opens)):
        with pytest.raises(TooLongError, match=f"has {answer} tokens and {len(opens)} that open it, at most {answer + room} are taken"):
            group_of(template, record, answer + room, cut=True)
    assert list(group_of(template, record, answer + len(opens) + 1, cut=True)[0].prompt)[1:] == opens


def test_one_prompt_is_never_on_both_sides():
    records: list[Record] = [pair([user(f"number {i % 20}")], [says(f"fox {i}")], [says(f"dog {i}")]) for i in range(100)]
    found = gathered(records, eval_share=0.3)
    learned, held = ({bytes(group.prompt) for group in items.groups} for items in (found.items, found.held_out))
    assert learned
    assert held
    assert not learned & held
    assert len(found.items) + len(found.held_out) == 100
    other = collect(records[:50], ChatTemplate.of(tiny_tokenizer()), DpoSettings(eval_share=0.0), records[50:])
    assert (len(other.items), len(other.held_out)) == (50, 50)


def test_a_prompt_that_is_cut_differently_for_its_answers_stays_on_one_side():
    asked = [user(f"{i} " + "the lazy dog " * 15) for i in range(40)]
    records: list[Record] = [
        Preference([prompt], [says("fox " * size)], [says("dog")], None, f"f:{i}")
        for i, prompt in enumerate(asked)
        for size in (1, 9, 17, 25)
    ]
    found = gathered(records, eval_share=0.3, length=64, too_long="cut")
    assert found.cut >= 120
    assert found.held_out.where
    assert set(found.held_out.where).isdisjoint(found.items.where)


# --- KTO


def test_kto_takes_labels_and_both_sides_of_a_pair():
    rows: list[Record] = [
        Example([user("a"), says("fox")], None, "x:1", label=True),
        Example([user("b"), says("the dog")], None, "x:2", label=False),
        PAIRS["more turns"],
        Example([user("c"), says("some")], None, "x:4"),
        PlainText("the quick", "x:5"),
    ]
    found = gathered(rows, loss="kto")
    assert found.items.wanted == [True, False, True, False]
    assert found.skipped == {NO_LABEL: 1, TEXT: 1}
    assert "5 rows read: 4 answers with a label to learn from" in found.lines()[0]
    ours = [list(group.answers[0].ids) for group in found.items.groups]
    others = [list(group.answers[1].ids) for group in found.items.groups]
    assert others == [ours[1], ours[2], ours[0], ours[0]]  # the next one of another prompt, around the end
    template = ChatTemplate.of(tiny_tokenizer())
    assert list(found.items.groups[0].prompt) == template.render([user("a")]).ids


def test_kto_leaves_out_a_last_answer_with_the_weight_0():
    talk = [user("a"), says("fox"), user("b"), says("dog")]
    rows: list[Record] = [Example(talk, None, f"x:{i}", True, untrained) for i, untrained in enumerate([(), (1,), (3,), (1, 3)])]
    found = gathered(rows, loss="kto")
    assert (found.items.where, found.skipped) == (["x:0", "x:1"], {WEIGHTLESS: 2})


def test_another_prompts_answer_fits_behind_this_one():
    rows: list[Record] = [
        Example([user("the lazy dog " * 10), says("fox")], None, "x:1", label=True),
        Example([user("b"), says("the quick brown fox jumps over the lazy dog " * 2)], None, "x:2", label=False),
    ]
    found = gathered(rows, loss="kto", length=96)
    assert max(group.longest for group in found.items.groups) <= 96
    assert all(group.answers[1].length for group in found.items.groups)


@pytest.mark.parametrize("held", [1, 3, 19])
def test_few_rows_of_kto_are_enough_with_one_prompt_on_a_side(held: int):
    """Second answers are of other prompts: of the same side, or where that has one alone, of the other."""
    rows: list[Record] = [pair([user(f"the {i}")], [says(f"fox {i}")], [says(f"dog {i}")]) for i in range(20)]
    template, settings = ChatTemplate.of(tiny_tokenizer()), DpoSettings(loss="kto", length=128, eval_share=0.0)
    found = collect(rows[held:], template, settings, rows[:held])
    assert (len(found.items), len(found.held_out)) == (2 * (20 - held), 2 * held)
    both = (found.items, found.held_out)
    prompts = {bytes(group.answers[0].ids): bytes(group.prompt) for items in both for group in items.groups}
    for items in both:
        assert all(prompts[bytes(group.answers[1].ids)] != bytes(group.prompt) for group in items.groups)


def test_kto_of_one_prompt_takes_other_answers_to_it():
    rows: list[Record] = [pair([user("hello")], [says(f"fox {i}")], [says("dog")]) for i in range(2)]
    found = gathered(rows, loss="kto")
    ours = [group.answers[0] for group in found.items.groups]
    assert [group.answers[1] for group in found.items.groups] == [*ours[1:], ours[0]]
    assert "all have the same prompt" in found.lines()[-1]
    alone = gathered([Example([user("a"), says("fox")], None, "x:1", label=True)], loss="kto").items.groups[0]
    assert alone.answers[0] == alone.answers[1]


def test_following_by_brute_force():
    for length in range(7):
        for values in product((1, 2, 3), repeat=length):
            assert following(values) == [slowly(values, i) for i in range(length)], values


def slowly(values: tuple[int, ...], i: int) -> int | None:
    """The place in the next run that has the number of place i in its own."""
    n, start = len(values), i
    if len(set(values)) == 1:
        return None
    while values[(start - 1) % n] == values[i]:
        start -= 1
    behind = i
    while values[behind % n] == values[i]:
        behind += 1
    run = [behind]
    while values[(run[-1] + 1) % n] == values[behind % n]:
        run.append(run[-1] + 1)
    return run[(i - start) % len(run)] % n


def test_kto_estimates_from_answers_of_both_kinds():
    """Of pairs, the other prompt's answer is rejected as often as chosen."""
    found = gathered([pair([user(f"the {i}")], [says(f"fox {i}")], [says(f"dog {i}")]) for i in range(6)], loss="kto").items
    side = {bytes(group.answers[0].ids): wanted for group, wanted in zip(found.groups, found.wanted, strict=True)}
    assert [side[bytes(group.answers[1].ids)] for group in found.groups] == found.wanted == [True, False] * 6


# --- their order


def test_every_item_comes_once_an_epoch_in_an_order_that_goes_on_where_it_was():
    order = Order(7, seed=3)
    first, second = ([next(order) for _ in range(7)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    again = Order(7, seed=3)
    again.resume({"drawn": 5})
    assert [next(again) for _ in range(9)] == [*first[5:], *second]
    assert order.state() == {"drawn": 14}
    assert [Order(7, seed=4).at(turn) for turn in range(7)] != first


# --- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "ppo"}, "loss 'ppo': must be one of dpo, ipo, kto, orpo, simpo"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing 0.1: the loss ipo has no such setting; it is of dpo and simpo"),
        ({"loss": "orpo", "sft": 1.0}, "sft 1.0: the loss orpo has no such setting"),
        ({"margin": 2.0}, "margin 2.0: the loss dpo has no such setting; it is of simpo"),
        ({"loss": "simpo", "length_normalised": True}, "length_normalised True: the loss simpo has no such setting"),
        ({"label_smoothing": 0.5}, "label_smoothing 0.5: must be a number from 0 to below 0.5"),
        ({"beta": -0.1}, "beta -0.1: must be a number from 0"),
        ({"micro_batch": 32}, "micro_batch 32: a step has 16 pairs in all"),
        ({"length": 1}, "length 1: must be a whole number of at least 2"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DpoSettings(**changes)


def test_pairs_at_once_are_as_many_as_there_are():
    assert [DpoSettings(batch=batch).at_once for batch in (1, 2, 16)] == [1, 2, 2]
    assert DpoSettings(batch=16, micro_batch=16).at_once == 16


def test_beta_is_the_losss_own_unless_given():
    assert [DpoSettings(loss=loss).strength for loss in ("dpo", "ipo", "kto", "orpo", "simpo")] == [0.1, 0.1, 0.1, 0.1, 2.0]  # type: ignore[arg-type]
    assert DpoSettings(length_normalised=True).strength == 5.0
    assert DpoSettings(length_normalised=True, beta=0.3).strength == 0.3
