"""`qwen2 run` with a prompt: what is taken for what, and the command itself on a tiny random model in a folder."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from qwen2 import kernels
from qwen2.cli import run as verb
from qwen2.cli.run import join_prompt, split_words
from qwen2.config import tiny
from qwen2.engine.llm import LLM
from qwen2.engine.request import SamplingParams
from qwen2.kernels.cores import physical_cores
from qwen2.weights.registry import DEFAULT_MODEL
from tests.conftest import random_adapter

ROOT = Path(__file__).parents[2]
SAMPLING = ("--temperature", "1", "--seed", "4", "--max-tokens", "24", "--ignore-eos")
PARAMS = SamplingParams(temperature=1, seed=4, max_tokens=24, ignore_eos=True)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "qwen2", "run", *map(str, arguments)]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "QWEN2_HOME": str(home), "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def qwen2_run(home: Path, *arguments: str | Path, stdin: str | bytes = b"") -> subprocess.CompletedProcess[str]:
    given = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(command(*arguments), input=given, capture_output=True, env=environment(home), timeout=300, check=False)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def start(home: Path, *arguments: str | Path) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*arguments), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment(home))


# --- which word is what


@pytest.mark.parametrize(("words", "model", "prompt"), [
    ((), DEFAULT_MODEL, None),
    (("qwen2:7b",), "qwen2:7b", None),
    (("qwen2:7b", "Why?"), "qwen2:7b", "Why?"),
    (("qwen2:7b", "why", "so"), "qwen2:7b", "why so"),
    (("qwen3:7b", "hi"), "qwen3:7b", "hi"),
    (("Qwen/Qwen2-7B-Instruct", "hi"), "Qwen/Qwen2-7B-Instruct", "hi"),
    (("./models/x.gguf", "hi"), "./models/x.gguf", "hi"),
    (("C:\\models\\x.gguf", "hi"), "C:\\models\\x.gguf", "hi"),
    (("../../x", "hi"), "../../x", "hi"),
    (("Explain GQA",), DEFAULT_MODEL, "Explain GQA"),
    (("Explain GQA", "in one line"), DEFAULT_MODEL, "Explain GQA in one line"),
    (("What is 1/2?",), DEFAULT_MODEL, "What is 1/2?"),
    (("why?",), DEFAULT_MODEL, "why?"),
    (("\u4f60\u597d",), DEFAULT_MODEL, "\u4f60\u597d"),
    (("",), DEFAULT_MODEL, ""),
    (("qwen2:7b", ""), "qwen2:7b", ""),
    (("x" * 5000 + " ?",), DEFAULT_MODEL, "x" * 5000 + " ?"),
    (("a\0b",), DEFAULT_MODEL, "a\0b"),
])  # fmt: skip
def test_first_word_is_a_model_or_the_beginning_of_the_prompt(words, model, prompt):
    assert split_words(words) == (model, prompt)


def test_folder_with_a_space_is_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model").mkdir()
    assert split_words(["my model", "hi"]) == ("my model", "hi")


class Stdin(io.TextIOWrapper):
    def __init__(self, content: bytes, terminal: bool) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(("given", "piped", "prompt"), [
    ("Translate:", b"hello\n", "Translate:\n\nhello\n"), (None, b"hello", "hello"), ("a", b"", "a"), ("a", b" \n", "a"),
    ("", b"hello", "hello"), ("a", None, "a"),
])  # fmt: skip
def test_what_comes_through_a_pipe_joins_the_prompt(monkeypatch, given, piped, prompt):
    monkeypatch.setattr(sys, "stdin", Stdin(piped or b"", piped is None))
    assert join_prompt(given) == prompt


def test_conversation_is_wanted_where_nothing_is_given_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stdin(b"", True))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert join_prompt(None) is None


def test_renderer_is_markdown_on_a_terminal_only(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert type(verb.make_renderer(plain=False)).__name__ == "MarkdownStream"
    assert type(verb.make_renderer(plain=True)).__name__ == "PlainStream"
    monkeypatch.setenv("TERM", "dumb")
    assert type(verb.make_renderer(plain=False)).__name__ == "PlainStream"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    monkeypatch.setenv("TERM", "xterm")
    assert type(verb.make_renderer(plain=False)).__name__ == "PlainStream"


def test_renderer_is_plain_on_a_console_without_escapes(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("rich.console.detect_legacy_windows", lambda: True)
    assert type(verb.make_renderer(plain=False)).__name__ == "PlainStream"


# --- errors, before torch is imported

UNKNOWN = "no model is named 'qwen3:7b': did you mean qwen2:7b, qwen2:72b, qwen2.5:7b? (qwen2 list --all shows every name)"
ERRORS = [
    (("qwen3:7b", "hi"), UNKNOWN, 1),
    (("qwen2:9b", "hi"), "qwen2 has no tag '9b'; its tags: ", 1),
    (("hello", "there"), f"if it is a question: qwen2 run {DEFAULT_MODEL} 'hello there'", 1),
    (("Hello",), f"if it is a question: qwen2 run {DEFAULT_MODEL} Hello", 1),
    (("./no/such.gguf", "hi"), "./no/such.gguf: no such file or folder", 1),
    (("../../x", "hi"), "../../x: no such file or folder", 1),
    (("--draft", "./no/such.gguf", "h i"), "./no/such.gguf: no such file or folder", 1),
    (("--adapter", "./nowhere", "h i"), "--adapter nowhere: no adapter's folder: adapter_config.json is not there", 1),
    ((DEFAULT_MODEL, ""), "the prompt is empty: nothing was given and nothing came through the pipe", 1),
    ((), "the prompt is empty: nothing was given and nothing came through the pipe", 1),
    (("--temperature=-1", "h i"), "temperature -1.0: must be between 0 (greedy) and 100", 1),
    (("--top-p", "0", "h i"), "top_p 0.0: must be above 0 and at most 1 (off)", 1),
    (("--max-tokens", "0", "h i"), "max_tokens 0: must be a whole number of at least 1", 1),
    (("--temperature", "hot", "h i"), 'Invalid value for --temperature: unable to convert "hot" into float.', 2),
    (("--n", "2", "h i"), "Unknown option: --n.", 2),
    (("--wat", "h i"), "Unknown option: --wat.", 2),
    (("qwen2:7b", "-x explain"), "A prompt that begins with - goes behind --, as in qwen2 run MODEL -- PROMPT (see qwen2 run --help)", 2),
    (("h i", "--logit-bias", "5=3"), "logit_bias: write --logit-bias.ID VALUE, as in --logit-bias.9707 -5 (see", 2),
    (("h i", "--logit-bias.5"), "logit_bias: write --logit-bias.ID VALUE", 2),
]
NO_TORCH = "import sys; from qwen2.cli.app import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"


@pytest.mark.parametrize(("arguments", "error", "code"), ERRORS)
def test_errors_come_in_one_line_and_before_torch(tmp_path, arguments, error, code):
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, "run", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env=environment(tmp_path), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("qwen2: ")
    assert error in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_input_that_is_no_text(tmp_path, tiny_folder):
    done = qwen2_run(tmp_path, tiny_folder, stdin=b"ab\xffc")
    assert (done.returncode, done.stderr) == (1, "qwen2: standard input is not UTF-8 text: byte 0xff at position 2\n")


# --- answers


def test_answer_is_the_engines_and_the_cut_is_said_on_stderr(tmp_path, tiny_folder):
    done = qwen2_run(tmp_path, tiny_folder, "the", "quick fox", *SAMPLING)
    expected = LLM(tiny_folder).chat([{"role": "user", "content": "the quick fox"}], PARAMS).text
    assert done.returncode == 0
    assert done.stdout.replace("\r\n", "\n").rstrip("\n") == expected.rstrip("\n")
    assert done.stdout.endswith("\n")
    assert done.stderr == "(cut: max_tokens 24 reached)\n"


def test_an_adapter_beside_the_weights(tmp_path, tiny_folder):
    adapter = random_adapter(tiny(), tmp_path / "adapter")
    done = qwen2_run(tmp_path, tiny_folder, "the fox", *SAMPLING, "--adapter", adapter)
    assert done.stdout != qwen2_run(tmp_path, tiny_folder, "the fox", *SAMPLING).stdout
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(kernels.isa() is None, reason="this installation has no kernels for this processor")
def test_a_draft_changes_no_text_and_verbose_counts_its_guesses(tmp_path, tiny_folder):
    plain = qwen2_run(tmp_path, tiny_folder, "the fox", *SAMPLING)
    done = qwen2_run(tmp_path, tiny_folder, "the fox", *SAMPLING, "--draft", tiny_folder, "--verbose")
    assert (done.returncode, done.stdout) == (0, plain.stdout)
    assert re.search(r"^draft     tiny-qwen2: \d+ of \d+ guesses were right$", done.stderr, re.MULTILINE)


def test_a_pipe_gets_utf_8_whatever_the_system_writes(tmp_path, tiny_folder, monkeypatch):
    expected = qwen2_run(tmp_path, tiny_folder, "fox", *SAMPLING)
    assert not expected.stdout.isascii()
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    monkeypatch.setenv("PYTHONUTF8", "0")
    done = qwen2_run(tmp_path, tiny_folder, "fox", *SAMPLING)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected.stdout, expected.stderr)


def test_pipe_system_prompt_and_verbose(tmp_path, tiny_folder):
    flags = ("--system", "be a dog", "--verbose", "--context", "300", *SAMPLING)
    done = qwen2_run(tmp_path, tiny_folder, "Shorten:", *flags, stdin="the fox\n")
    llm = LLM(tiny_folder, context=300)
    messages = [{"role": "system", "content": "be a dog"}, {"role": "user", "content": "Shorten:\n\nthe fox\n"}]
    assert done.stdout.rstrip("\n") == llm.chat(messages, PARAMS).text.rstrip("\n")
    count = len(llm.template.render(messages).ids)
    assert re.search(rf"^prompt    {count} tokens in \d+\.\d\d s, [\d.]+ tokens/s$", done.stderr, re.MULTILINE)
    assert re.search(r"^answer    24 tokens in \d+\.\d\d s, [\d.]+ tokens/s$", done.stderr, re.MULTILINE)
    assert re.search(r"^load      \d+\.\d\d s", done.stderr, re.MULTILINE)
    how = "torch in float32 from float32" if kernels.isa() is None else f"float32 by kernels for {kernels.isa()}, cache of 16 bits"
    assert re.search(rf"^device    cpu, {1 if kernels.library() is None else physical_cores()} threads, {how}$", done.stderr, re.MULTILINE)
    assert f"context   {count + 24} of 300 tokens\n" in done.stderr
    assert "temperature 1.0, " in done.stderr
    assert "seed 4, " in done.stderr


def test_prompt_longer_than_the_window_names_both_counts(tmp_path, tiny_folder):
    done = qwen2_run(tmp_path, tiny_folder, "the quick fox " * 50, "--context", "64")
    count = len(LLM(tiny_folder).template.render([{"role": "user", "content": "the quick fox " * 50}]).ids)
    assert done.returncode == 1
    assert done.stderr.startswith(f"qwen2: prompt has {count:,} tokens, the window is 64: ")
    assert done.stdout == ""


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C reaches a child only through a console there")
def test_ctrl_c_keeps_what_was_printed_and_exits_130(tmp_path, tiny_folder):
    with start(tmp_path, tiny_folder, "go on", "--ignore-eos", "--seed", "1") as child:
        assert child.stdout is not None
        first = child.stdout.read(30)
        child.send_signal(signal.SIGINT)
        rest, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert (first + rest).endswith(b"\n")
    assert errors.decode() == "(stopped)\n"


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
def test_reader_of_the_pipe_may_leave(tmp_path, tiny_folder):
    with start(tmp_path, tiny_folder, "go on", "--ignore-eos", "--seed", "1") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(10)
        child.stdout.close()
        assert child.wait(timeout=60) == 141
        assert child.stderr.read() == b""


# --- flags


def test_every_sampling_parameter_is_a_flag_with_help(tmp_path):
    done = qwen2_run(tmp_path, "--help")
    assert "--logit-bias.ID VALUE" in done.stdout
    for field in fields(SamplingParams):
        flag = f"--{field.name.replace('_', '-')}"
        found = re.search(rf"{flag}\b(?: [A-Z.]+)? +([^ \u2502])", done.stdout)
        assert (found is not None) == (field.name not in ("n", "logprobs", "prompt_logprobs", "constraint")), flag


def test_format_holds_the_answer(tmp_path, tiny_folder):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": ["fox", "dog"]}, "minItems": 2, "maxItems": 2}')
    done = qwen2_run(tmp_path, tiny_folder, "fox", "--temperature", "1", "--seed", "4", "--format", schema)
    assert set(json.loads(done.stdout)) <= {"fox", "dog"}
    done = qwen2_run(tmp_path, tmp_path / "none", "fox", "--format", "yaml")
    assert (done.returncode, done.stderr) == (1, "qwen2: format 'yaml': must be json, or a file with a JSON schema\n")


def test_flags_of_lists_and_mappings_reach_the_engine(tmp_path, tiny_folder):
    """A stop id ends the answer where the free one has that token for the first time; a bias forces a token."""
    llm = LLM(tiny_folder)
    free = llm.chat([{"role": "user", "content": "fox"}], PARAMS)
    done = qwen2_run(tmp_path, tiny_folder, "fox", *SAMPLING, "--stop-token-ids", "1", "--stop-token-ids", str(free.token_ids[5]))
    cut = llm.chat([{"role": "user", "content": "fox"}], SamplingParams(1, seed=4, max_tokens=24, ignore_eos=True,
                                                                        stop_token_ids=(1, free.token_ids[5])))  # fmt: skip
    assert done.stdout.rstrip("\n") == cut.text.rstrip("\n")
    assert len(cut.text) < len(free.text)
    letter = llm.tokenizer.encode("z")[0]
    for flag in (("--logit-bias", f'{{"{letter}": 10000}}'), (f"--logit-bias.{letter}", "10000")):
        done = qwen2_run(tmp_path, tiny_folder, "fox", "--max-tokens", "5", *flag, "--temperature", "0")
        assert done.stdout == "zzzzz\n"


# --- a text that is gone on with


def test_a_text_is_completed_without_a_template(tiny_folder: Path, tmp_path: Path):
    said = qwen2_run(tmp_path, tiny_folder, "the quick", "--complete", *SAMPLING)
    (wanted,) = LLM(tiny_folder).generate("the quick", PARAMS)
    assert said.stdout == wanted.text + "\n"
    assert said.stdout != qwen2_run(tmp_path, tiny_folder, "the quick", *SAMPLING).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--complete", "hi", "--system", "x"), "--complete and --system: a text has no system prompt"),
        (("--complete", "hi", "--at", "127.0.0.1:1"), "--complete and --at: a server is asked in conversations"),
    ],
)
def test_what_has_no_place_beside_a_text(words: tuple[str, ...], message: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]):
    from qwen2.cli.app import main

    assert main(["run", str(tiny_folder), *words]) == 1
    assert capsys.readouterr().err.startswith(f"qwen2: {message}")
