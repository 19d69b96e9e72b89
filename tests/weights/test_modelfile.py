"""Modelfiles: what each line means, what is refused and where, and that nothing but an error with a line number ever comes out."""

from __future__ import annotations

import re
from typing import get_type_hints

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen2.config import GenerationDefaults
from qwen2.server.ollama_schema import Options
from qwen2.weights.modelfile import KEYWORDS, ROLES, Modelfile, parse
from qwen2.weights.parameters import FIELDS, MACHINE, OFF, read_parameter

WHOLE = '''
# A comment, and an empty line above it
from qwen2.5-coder:0.5b

  System """You are Mario.
Answer "briefly"  
# not a comment
"""
PARAMETER temperature 0.2
parameter stop "User:"
PARAMETER stop   END OF IT
PARAMETER num_ctx 4096
PARAMETER seed -7
PARAMETER num_predict -1
PARAMETER use_mmap TRUE
PARAMETER repeat_last_n -1
TEMPLATE "{% for message in messages %}
{{ message.content }}{% endfor %}"
LICENSE MIT
LICENSE """Two
lines"""
MESSAGE user Is the sky blue?
Message Assistant "Yes."
MESSAGE user """And
the sea?"""
REQUIRES 0.0.1
'''


def test_every_keyword() -> None:
    found = parse(WHOLE)
    assert found.source == "qwen2.5-coder:0.5b"
    assert found.system == 'You are Mario.\nAnswer "briefly"  \n# not a comment\n'
    assert found.parameters == {
        "temperature": 0.2,
        "stop": ("User:", "END OF IT"),
        "num_ctx": 4096,
        "seed": -7,
        "num_predict": -1,
        "use_mmap": True,
        "repeat_last_n": -1,
    }
    assert found.template == "{% for message in messages %}\n{{ message.content }}{% endfor %}"
    assert found.licence == ("MIT", "Two\nlines")
    assert found.messages == (("user", "Is the sky blue?"), ("assistant", "Yes."), ("user", "And\nthe sea?"))
    assert found.requires == "0.0.1"
    assert parse(WHOLE.replace("\n", "\r\n")) == found


def test_parameters_are_defaults() -> None:
    base = GenerationDefaults(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1, eos=(5,), max_tokens=9)
    found = parse(
        "FROM a\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1.3\nPARAMETER num_predict -1\nPARAMETER num_ctx 64\nPARAMETER stop x"
    )
    assert found.defaults(base) == GenerationDefaults(0.0, 20, 0.8, repetition_penalty=1.3, eos=(5,), stop=("x",), context=64)


@pytest.mark.parametrize(("text", "message"), [
    ("", "line 1: there is no FROM: a Modelfile begins with what the model is made from, as in FROM qwen2.5-coder:0.5b"),
    ("SYSTEM a\n\n", "line 1: there is no FROM"),
    ("FROM a\nFROM b", "line 2: FROM again: line 1 has one already"),
    ("FROM a\n\nSYSTEM x\nsystem y", "line 4: SYSTEM again: line 3 has one already"),
    ("FROM a\nPARAMETER top_k 1\nPARAMETER top_k 2", "line 3: PARAMETER top_k again: line 2 has one already"),
    ("FROM a\nADAPTER ./x\nADAPTER ./y", "line 3: ADAPTER again: line 2 has one already"),
    ('FROM a\nADAPTER ""', "line 2: ADAPTER needs the folder of a LoRA adapter, the one with adapter_config.json"),
    ("FROM a\nADAPTER", "line 2: ADAPTER needs a value behind it"),
    ("FROM a\nRENDERER qwen3", "line 2: RENDERER: how a conversation is written down is the template's to say"),
    ("FROM a\nSYTEM x", "line 2: unknown keyword 'SYTEM': did you mean SYSTEM?"),
    ("FROM a\n\nYou are Mario.", "line 3: unknown keyword 'You': there are FROM, SYSTEM, PARAMETER"),
    ("FROM a\nPARAMETER temprature 1", "line 2: unknown parameter 'temprature': did you mean temperature?"),
    ("FROM a\nPARAMETER temperature hot", "line 2: temperature 'hot': must be from 0 (greedy) to 100"),
    ("FROM a\nPARAMETER temperature nan", "line 2: temperature 'nan': must be"),
    ("FROM a\nPARAMETER top_p 7", "line 2: top_p '7': must be above 0 and at most 1 (off)"),
    ("FROM a\nPARAMETER top_k 1.5", "line 2: top_k '1.5': must be 0 (off) or a whole number above it"),
    ("FROM a\nPARAMETER num_predict 0", "line 2: num_predict '0': must be a number of tokens, or -1"),
    ("FROM a\nPARAMETER num_ctx 0", "line 2: num_ctx '0': must be a whole number of at least 1"),
    ("FROM a\nPARAMETER mirostat 2", "line 2: mirostat '2': only 0 is offered, which leaves everything as it is"),
    ("FROM a\nPARAMETER seed 99999999999999999999", "line 2: seed '99999999999999999999': must be a whole number of 64 bits"),
    ('FROM a\nPARAMETER stop ""', "line 2: stop '': must be a text of at least one character"),
    ("FROM a\nPARAMETER stop", "line 2: PARAMETER needs NAME VALUE behind it"),
    ("FROM a\nPARAMETER", "line 2: PARAMETER needs NAME VALUE behind it"),
    ("FROM a\nSYSTEM", 'line 2: SYSTEM needs a value behind it; an empty text is written ""'),
    ("FROM", "line 1: FROM needs a value behind it"),
    ('FROM ""', "line 1: FROM needs a model's name, or the path of a .gguf file or a folder"),
    ("FROM a\nMESSAGE tool x", "line 2: MESSAGE tool: the role is one of system, user, assistant"),
    ("FROM a\nMESSAGE user", "line 2: MESSAGE needs ROLE TEXT behind it"),
    ('FROM a\nSYSTEM """x\ny', 'line 2: the text that SYSTEM begins with """ has no end: close it with """ at the end of a line'),
    ('FROM a\nSYSTEM "x\ny', 'line 2: the text that SYSTEM begins with " has no end'),
    ('FROM a\nSYSTEM """x""" y', 'line 2: the text that SYSTEM begins with """ has no end'),
    ("FROM a\nREQUIRES soon", "line 2: REQUIRES 'soon': must be a version such as "),
    ("FROM a\nREQUIRES 99.1.0", "line 2: REQUIRES 99.1.0: this is qwen2 "),
    ('FROM a\nTEMPLATE """{{ if .System }}{{ .System }}{{ end }}"""', "line 2: TEMPLATE: this is a template in Go's language, and conversations are rendered here by the model's own Jinja: leave TEMPLATE out to use it, or write Jinja"),
    ('FROM a\nTEMPLATE ""', "line 2: TEMPLATE is empty"),
])  # fmt: skip
def test_refusals_name_the_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        parse(text)


@pytest.mark.parametrize("go", [
    "{{ .Prompt }}", "{{- .Prompt }}", "{{.System}}", "{{ $i := 1 }}", "x {{ if eq .Role \"user\" }}", "{{ range .Messages }}", "{{ end }}",
    "{{- else }}", "{{- range $i, $_ := .Messages }}", "{{/* a comment */}}", "{{ with .Tools }}", '{{ template "x" . }}',
])  # fmt: skip
def test_go_is_told_from_jinja(go: str) -> None:
    with pytest.raises(ValueError, match="Go's language"):
        parse(f'FROM a\nTEMPLATE """{go}"""')


@pytest.mark.parametrize("jinja", [
    "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ range(3) }}", "{{ messages[0]['content'] }}", "{{- bos_token -}}", "{{ '.x' }}",
    "{% if not x %}{{ not x }}{% else %}{% endif %}", "{{ end_token }}", "{{ template }}", "{{ (x if y else z) }}",
])  # fmt: skip
def test_jinja_is_not_taken_for_go(jinja: str) -> None:
    assert parse(f'FROM a\nTEMPLATE """{jinja}"""').template == jinja


def test_a_made_model_of_a_made_model() -> None:
    base = parse("FROM q\nSYSTEM one\nPARAMETER top_k 3\nPARAMETER stop a\nMESSAGE user hello\nLICENSE MIT")
    over = parse("FROM base\nSYSTEM two\nPARAMETER stop b\nPARAMETER temperature 1").over(base)
    assert over == Modelfile("base", "two", None, {"top_k": 3, "stop": ("b",), "temperature": 1.0}, (("user", "hello"),), ("MIT",))


def test_conversations_get_what_the_model_has() -> None:
    made = parse("FROM q\nSYSTEM own\nMESSAGE user a\nMESSAGE assistant b")
    user, system = {"role": "user", "content": "c"}, {"role": "system", "content": "mine"}
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert made.conversation([user]) == [{"role": "system", "content": "own"}, *before, user]
    assert made.conversation([system, user]) == [system, *before, user]
    assert made.conversation([]) == []
    assert Modelfile("q").conversation([user]) == [user]


def test_the_servers_options_and_the_parameters_are_the_same() -> None:
    assert set(get_type_hints(Options)) - {"model_config"} >= {*FIELDS, *OFF, *MACHINE}
    assert set(Options.model_fields) == {*FIELDS, *OFF, *MACHINE}


@pytest.mark.parametrize(
    "value", [True, None, [], {}, [1], float("nan"), float("inf"), 10**400, -(10**400), "1_000", "\u0663", " ", "1e999"]
)
@pytest.mark.parametrize("name", [*FIELDS, *OFF, *MACHINE])
def test_odd_values_are_read_or_refused_by_name(name: str, value: object) -> None:
    told, read = "", None
    try:
        read = read_parameter(name, value)
    except ValueError as error:
        told = str(error)
    if told:
        assert told.startswith(f"{name} ")
    else:
        assert (read, value) in (
            (True, True),
            ((" ",), " "),
            (("1_000",), "1_000"),
            (("\u0663",), "\u0663"),
            (("1e999",), "1e999"),
        ) or name in MACHINE


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=60)
WORDS = st.sampled_from(
    [*KEYWORDS, *map(str.lower, KEYWORDS), "ADAPTER", *FIELDS, *ROLES, '"', '"""', "#", "\n", " ", "\t", "{{ .x }}", "0.5", "a:b"]
)


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.text(max_size=200), st.lists(st.one_of(WORDS, TEXTS), max_size=30).map(" ".join), st.lists(WORDS, max_size=30).map("".join)
    )
)
@example("FROM \x1c")
@example('FROM a\nSYSTEM """"')
@example('FROM a\nSYSTEM """"""')
@example("\ufeffFROM a")
@example("FROM a\nPARAMETER stop \x85 b")
def test_any_text_is_a_modelfile_or_an_error_with_a_line(text: str) -> None:
    found, message = None, ""
    try:
        found = parse(text)
    except ValueError as error:
        message = str(error)
    told = re.match(r"line (\d+): .", message, re.DOTALL)
    assert (found is not None and bool(found.source)) or (told is not None and 1 <= int(told[1]) <= text.count("\n") + 1), message


@settings(max_examples=300, deadline=None)
@given(
    st.builds(
        Modelfile,
        source=st.just("base"),
        system=st.none() | TEXTS,
        template=st.none() | TEXTS.filter(lambda text: bool(text.strip()) and "{{" not in text),
        parameters=st.fixed_dictionaries(
            {},
            optional={
                "temperature": st.floats(0, 100),
                "top_k": st.integers(0, 10**9),
                "seed": st.integers(-(2**63), 2**63 - 1),
                "stop": st.lists(TEXTS.filter(bool), min_size=1, max_size=3).map(tuple),
                "low_vram": st.booleans(),
            },
        ),
        messages=st.lists(st.tuples(st.sampled_from(ROLES), TEXTS), max_size=3).map(tuple),
        licence=st.lists(TEXTS, max_size=2).map(tuple),
        adapter=st.none() | st.just("./mine"),
    )
)
@example(Modelfile("base", '"', parameters={"stop": ('"', '""', 'a"', '"""')}))
@example(Modelfile("base", '"""Quoted.""" x\n', messages=(("user", 'a"""'), ("user", ""))))
def test_what_is_written_is_read_again(made: Modelfile) -> None:
    text = made.text("base", adapter=made.adapter)
    if "ends with three quotes" not in text.split("\n")[1]:
        assert parse(text) == made
    assert Modelfile.from_json(made.to_json()) == made
