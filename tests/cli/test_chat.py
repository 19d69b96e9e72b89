"""The conversation without its terminal: questions, answers, commands and errors, on a tiny random model."""

from __future__ import annotations

import io
import re
import signal
from dataclasses import fields
from typing import TYPE_CHECKING

import pytest

from qwen2.cli.chat import COMMANDS, TOPICS, Chat, say
from qwen2.cli.conversation import Conversation, Turn
from qwen2.cli.partner import Local
from qwen2.cli.sampling import KIND, LEFT_OUT, change
from qwen2.engine.constraint import Constraint
from qwen2.engine.llm import LLM
from qwen2.engine.request import SamplingParams
from tests.conftest import tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PARAMS = SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)


class Pieces:
    """A renderer that keeps what it gets, and presses Ctrl-C at one of the pieces that show something."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.pieces: list[str] = []
        self.interrupt_at = interrupt_at
        self.closed = 0

    def push(self, text: str) -> None:
        self.pieces.append(text)
        if text and sum(map(bool, self.pieces)) == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny_model())


def make_chat(llm: LLM, params: SamplingParams = PARAMS, interrupt_at: int | None = None) -> tuple[Chat, Pieces]:
    pieces = Pieces(interrupt_at)
    return Chat(Local(llm), Conversation("tiny", params=params), lambda: pieces), pieces


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# --- questions and answers


def test_answers_continue_the_conversation(llm):
    chat, pieces = make_chat(llm)
    chat.handle("the quick fox")
    first = llm.chat([user("the quick fox")], PARAMS).text
    assert [(t.role, t.content) for t in chat.conversation.turns] == [("user", "the quick fox"), ("assistant", first)]
    assert "".join(pieces.pieces) == first
    chat.handle("and then")
    history = [user("the quick fox"), {"role": "assistant", "content": first}, user("and then")]
    assert chat.conversation.turns[-1] == Turn("assistant", llm.chat(history, PARAMS).text)
    assert pieces.closed == 2


def test_system_prompt_goes_to_the_model_and_clear_keeps_it(llm, capsys):
    chat, _ = make_chat(llm)
    chat.handle("/system speak like a dog")
    chat.handle("over")
    expected = llm.chat([{"role": "system", "content": "speak like a dog"}, user("over")], PARAMS).text
    assert chat.conversation.turns[-1].content == expected
    chat.handle("/clear")
    assert chat.conversation.messages == [{"role": "system", "content": "speak like a dog"}]
    chat.handle("/set system default")
    assert chat.conversation.messages == []
    assert capsys.readouterr().out.splitlines()[-1] == "system: (the model's own) You are a helpful assistant."


def test_ctrl_c_ends_the_answer_only(llm, capsys):
    whole = llm.chat([user("lazy")], change(PARAMS, "max_tokens", "2000")).text
    chat, pieces = make_chat(llm, change(PARAMS, "max_tokens", "2000"), interrupt_at=3)
    before = signal.getsignal(signal.SIGINT)
    chat.handle("lazy")
    answer = chat.conversation.turns[-1]
    assert answer.stopped
    assert answer.content == "".join(pieces.pieces)
    assert whole.startswith(answer.content.rstrip("\ufffd"))
    assert 0 < len(answer.content) < len(whole)
    assert "(stopped)" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    chat.handle("dog")  # it goes on, with the part that was said
    assert [turn.role for turn in chat.conversation.turns] == ["user", "assistant", "user", "assistant"]
    llm.engine.check()


def test_question_too_long_for_the_window_keeps_the_conversation(capsys):
    chat, _ = make_chat(LLM(tiny_model(), context=90))
    chat.handle("the fox")
    turns = list(chat.conversation.turns)
    chat.handle("quick brown " * 60)
    error = capsys.readouterr().err
    count = len(chat.partner.llm.template.render([*chat.conversation.messages, user("quick brown " * 60)]).ids)
    assert f"error: prompt has {count:,} tokens, the window is 90" in error
    assert error.rstrip().endswith("the question is not asked: /clear starts anew, /save FILE keeps what was said")
    assert chat.conversation.turns == turns
    chat.handle("/clear")
    chat.handle("fox")
    assert len(chat.conversation.turns) == 2


def test_answer_cut_by_max_tokens_or_window_says_so(capsys):
    chat, _ = make_chat(LLM(tiny_model(), context=60), change(PARAMS, "max_tokens", "3"))
    chat.handle("fox")
    assert "(cut: max_tokens 3 reached)" in capsys.readouterr().err
    chat.handle("/clear")
    chat.handle("/set parameter max_tokens default")
    chat.handle("fox")
    assert "(cut: the window of 60 tokens is full)" in capsys.readouterr().err


def test_retry_answers_the_last_question_anew(llm):
    chat, pieces = make_chat(llm)
    for line in ("the quick fox", "and then", "/set seed 6"):
        chat.handle(line)
    turns = list(chat.conversation.turns)
    chat.handle("/retry")
    expected = llm.chat([{"role": t.role, "content": t.content} for t in turns[:3]], change(PARAMS, "seed", "6")).text
    assert expected != turns[3].content
    assert chat.conversation.turns == [*turns[:3], Turn("assistant", expected)]
    assert pieces.closed == 3


class Broken:
    """A network's logits that fail once, at the n-th call."""

    def __init__(self, real: Callable[..., Tensor], at: int, error: Exception) -> None:
        self.real, self.left, self.error = real, at, error

    def __call__(self, *hidden: object) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.real(*hidden)


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("line", ["and then", "/retry"])
@pytest.mark.parametrize(("error", "message"), [
    (RuntimeError("out of\nmemory"), "error: unexpected RuntimeError: out of memory; the conversation stays as it was\n"),
    (MemoryError(), "error: unexpected MemoryError: MemoryError; the conversation stays as it was\n"),
    (OSError(5, "Input/output error"), "error: Input/output error\n"),
])  # fmt: skip
def test_answer_that_fails_leaves_the_conversation_usable(monkeypatch, capsys, at, line, error, message):
    llm = LLM(tiny_model())
    chat, pieces = make_chat(llm)
    chat.handle("the quick fox")
    turns = list(chat.conversation.turns)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(llm.model.network, "logits", Broken(llm.model.network.logits, at, error))
        chat.handle(line)
    assert capsys.readouterr().err == message
    assert chat.conversation.turns == turns
    assert pieces.closed == 2  # what there was of the answer has ended its line
    llm.engine.check()
    chat.handle("and then")
    history = [user("the quick fox"), {"role": "assistant", "content": turns[1].content}, user("and then")]
    assert chat.conversation.turns[2:] == [Turn("user", "and then"), Turn("assistant", llm.chat(history, PARAMS).text)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_messages_break_between_words_on_a_terminal_only(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "24")
    monkeypatch.setenv("TERM", "xterm")
    text = "error: [b]a text[/b] that begins with / is sent\n  with :smile: \x1b[2J before it"
    screen = Terminal()
    say(text, screen)
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 24
    assert [word for line in lines for word in line.split()] == text.replace("\x1b", "\u241b").split()
    say(text)
    assert capsys.readouterr().out == text.replace("\x1b", "\u241b") + "\n"


def test_verbose_names_speed_place_and_sampling(llm, capsys):
    chat, _ = make_chat(llm)
    chat.handle("/set verbose on")
    chat.handle("fox")
    lines = {line.split()[0]: line for line in capsys.readouterr().err.splitlines()}
    count = len(llm.template.render([user("fox")]).ids)
    assert re.search(r"\d+ tokens.* in \d+\.\d\d s", lines["prompt"])
    assert "12 tokens in" in lines["answer"]
    assert lines["answer"].endswith("tokens/s")
    assert "cpu" in lines["device"]
    assert "float32" in lines["device"]
    assert lines["context"] == f"context   {count + 12} of {llm.window:,} tokens"
    assert "temperature 1.0" in lines["sampling"]
    assert "seed 5" in lines["sampling"]
    assert "ignore_eos True" in lines["sampling"]


# --- commands


@pytest.mark.parametrize(("line", "error"), [
    ("/sho", "error: no command /sho: did you mean /show? (a text that begins with / is sent with a space before it)"),
    ("/xyzzy", "error: no command /xyzzy: /help shows what there is (a text that begins with / is sent with a space before it)"),
    ("/verbose", "error: no command /verbose: did you mean /set verbose on? (a text that begins with / is sent with a space before it)"),
    ("/Temperature 0", "error: no command /Temperature: did you mean /set parameter temperature 0? (a text that begins with / is sent with a space before it)"),
    ("/history", "error: no command /history: did you mean /show history? (a text that begins with / is sent with a space before it)"),
    ("/clear all", "error: /clear all: /clear takes no words after it"),
    ("/exit now", "error: /bye now: /bye takes no words after it"),
    ("/help me", "error: /help me: /help takes no words after it"),
    ("/retry that", "error: /retry that: /retry takes no words after it"),
    ("/retry", "error: /retry: there is no question yet that could be answered anew"),
    ("/set temprature 0", "error: /set temprature: did you mean temperature? It is /set parameter NAME VALUE, /set system TEXT, /set format json, or /set verbose on|off"),
    ("/set xyzzy 0", "error: /set xyzzy: unknown; it is /set parameter NAME VALUE, /set system TEXT, /set format json, or /set verbose on|off"),
    ("/set temperature", f"error: /set parameter NAME VALUE; the names: {', '.join(KIND)}"),
    ("/set temperature hot", "error: temperature 'hot': must be a number"),
    ("/show system now", f"error: /show system now: there are {', '.join(TOPICS)}"),
    ("/load ~nobody-of-that-name/x", "error: /load ~nobody-of-that-name/x: nobody of that name has a home folder here"),
    ("/load '/no such/file'", "error: /no such/file: No such file or directory"),
    ("/set", "error: /set parameter NAME VALUE, /set system TEXT, /set format json, or /set verbose on|off"),
    ("/set parameter temperature", f"error: /set parameter NAME VALUE; the names: {', '.join(KIND)}"),
    ("/set parameter temperature hot", "error: temperature 'hot': must be a number"),
    ("/set parameter temperature -1", "error: temperature -1.0: must be between 0 (greedy) and 100"),
    ("/set parameter top_p 0", "error: top_p 0.0: must be above 0 and at most 1 (off)"),
    ("/set parameter top_k 1.5", "error: top_k '1.5': must be a whole number"),
    ("/set parameter ignore_eos maybe", "error: ignore_eos 'maybe': must be on or off"),
    ("/set parameter logit_bias 5", "error: logit_bias '5': must be token ids and numbers as {\"9707\": -5}"),
    ("/set parameter n 2", f"error: parameter 'n': unknown; there are {', '.join(KIND)}"),
    ("/set verbose maybe", "error: /set verbose maybe: must be on or off"),
    ("/show weather", f"error: /show weather: there are {', '.join(TOPICS)}"),
    ("/save", "error: /save FILE: name a file"),
    ("/load /no/such/file", "error: /no/such/file: No such file or directory"),
    ("/save /no/such/folder/x.json", "error: /no/such/folder: no such folder"),
])  # fmt: skip
def test_errors_of_commands(llm, capsys, line, error):
    chat, _ = make_chat(llm)
    chat.handle(line)
    assert capsys.readouterr().err == error + "\n"
    assert chat.conversation == Conversation("tiny", params=PARAMS)
    assert not chat.done


SET = {
    "temperature": ("0.5", 0.5), "top_k": ("20", 20), "top_p": ("1", 1.0), "min_p": ("0", 0.0), "repetition_penalty": ("1.1", 1.1),
    "presence_penalty": ("-1", -1.0), "frequency_penalty": ("2", 2.0), "penalty_window": ("64", 64),
    "logit_bias": ('{"7": -5}', {7: -5}), "seed": ("0", 0), "stop": ('END "two words"', ("END", "two words")), "stop_token_ids": ("[3, 4]", (3, 4)), "ignore_eos": ("off", False),
    "max_tokens": ("9", 9),
}  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in fields(SamplingParams) if f.name not in LEFT_OUT])
def test_every_sampling_parameter_can_be_set_and_given_back(llm, name):
    chat, _ = make_chat(llm)
    text, value = SET[name]
    chat.handle(f"/set parameter {name.replace('_', '-')} {text}")
    assert getattr(chat.conversation.params, name) == value
    chat.handle(f"/set parameter {name} default")
    assert getattr(chat.conversation.params, name) == getattr(SamplingParams(), name)


def test_format_holds_answers_and_is_saved(llm, tmp_path, capsys):
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["fox", "dog"]}')
    chat, _ = make_chat(llm, SamplingParams(temperature=1.0, seed=5, max_tokens=40))
    chat.handle(f"/set format {schema}")
    chat.handle("which one?")
    assert chat.conversation.turns[-1].content in ('"fox"', '"dog"')
    chat.handle(f"/save {tmp_path / 'kept.json'}")
    chat.handle("/set format default")
    assert chat.conversation.params.constraint is None
    chat.handle(f"/load {tmp_path / 'kept.json'}")
    assert chat.conversation.params.constraint == Constraint.json_schema(schema.read_text())
    chat.handle("/set Format json")
    assert chat.conversation.params.constraint == Constraint.json_object()
    chat.handle("/set format yaml")
    chat.handle("/set format " + str(tmp_path / "kept.json"))
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first == "error: format 'yaml': must be json, or a file with a JSON schema"
    assert second.startswith(f"error: format {tmp_path / 'kept.json'}: json_schema")
    assert chat.conversation.params.constraint == Constraint.json_object()


def test_show(llm, capsys):
    chat, _ = make_chat(llm)
    chat.handle("fox")
    capsys.readouterr()
    for topic in TOPICS:
        chat.handle(f"/show {topic}")
    out = capsys.readouterr().out
    used = len(llm.template.render(chat.conversation.messages, add_generation_prompt=False).ids)
    assert f"context   {used} of {llm.window:,} tokens used" in out
    assert "temperature          1.0\n" in out
    assert "built in: qwen2" in out
    assert "user: fox\nassistant: " in out


@pytest.mark.parametrize(("line", "temperature"), [
    ("/set temperature 0", 0.0), ("/Set Parameter Temperature 0.5", 0.5), ("/SET TEMPERATURE 0.5", 0.5), ("/set temperature default", None),
])  # fmt: skip
def test_setting_takes_any_case_and_no_word_parameter(llm, line, temperature):
    chat, _ = make_chat(llm)
    chat.handle(line)
    assert chat.conversation.params == change(PARAMS, "temperature", "default" if temperature is None else str(temperature))


def test_topics_and_verbose_take_any_case(llm, capsys):
    chat, _ = make_chat(llm)
    chat.handle("/Show System")
    chat.handle("/set Verbose ON")
    assert capsys.readouterr().out == "system: (the model's own) You are a helpful assistant.\nverbose: on\n"
    assert chat.verbose


def test_help_names_every_command_and_fits_in_80_columns(llm, capsys):
    chat, _ = make_chat(llm)
    chat.handle("/?")
    out = capsys.readouterr().out
    assert all(command.usage in out for command in COMMANDS.values())
    assert max(map(len, out.splitlines())) < 80


@pytest.mark.parametrize("line", ["/bye", "/exit", "/quit", "/BYE "])
def test_bye(llm, line):
    chat, _ = make_chat(llm)
    chat.handle(line)
    assert chat.done


def test_empty_line_asks_nothing(llm):
    chat, pieces = make_chat(llm)
    for line in ("", "  \n ", '""""""', '"""\n"""'):
        chat.handle(line)
    assert chat.conversation.turns == []
    assert pieces.pieces == []


def test_save_and_load_through_commands(llm, tmp_path, capsys):
    chat, _ = make_chat(llm)
    chat.handle("fox")
    chat.handle(f"/save {tmp_path}/my talk.json")
    assert capsys.readouterr().out == f"saved 2 messages to {tmp_path}/my talk.json\n"
    other, _ = make_chat(llm, SamplingParams())
    other.conversation.model = "another"
    other.handle(f"/load '{tmp_path}/my talk.json'")
    assert other.conversation.turns == chat.conversation.turns
    assert other.conversation.params == PARAMS
    assert other.conversation.model == "another"
    printed = capsys.readouterr()
    assert printed.err == "note: it was held with tiny, and goes on with another\n"
    assert printed.out.splitlines() == [
        f"loaded 2 messages from {tmp_path}/my talk.json; /show history shows them. With them came:",
        "system: (the model's own) You are a helpful assistant.",
        "parameters: temperature 1.0, seed 5, ignore_eos on, max_tokens 12",
    ]


def test_loading_names_the_system_prompt_and_the_lack_of_parameters(llm, tmp_path, capsys):
    Conversation("tiny", system="Bark.\x1b[2J").save(tmp_path / "talk.json")
    chat, _ = make_chat(llm)
    chat.handle(f"/load {tmp_path}/talk.json")
    assert capsys.readouterr().out.splitlines()[1:] == ["system: Bark.\u241b[2J", "parameters: as the model has them"]
    assert chat.conversation.params == SamplingParams()


def test_save_touches_nothing_that_is_no_conversation(llm, tmp_path, capsys):
    chat, _ = make_chat(llm)
    path = tmp_path / "main.py"
    path.write_text("print(1)\n")
    chat.handle(f"/save {path}")
    assert capsys.readouterr().err == f"error: {path}: not a saved conversation (no JSON)\n"
    assert path.read_text() == "print(1)\n"
