"""Answers held to a form: that all of them have it, that they end, and that nothing else changes by it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator

from qwen2 import LLM, SamplingParams, kernels
from qwen2.config import tiny
from qwen2.engine import grammar as grammar_module
from qwen2.engine.constraint import MOST_BYTES, MOST_DEPTH, Constraint, ConstraintError
from qwen2.engine.grammar import BLANKS, Grammars
from qwen2.weights.export import to_gguf
from tests.conftest import tiny_model
from tests.engine.conftest import EOS, byte_tokenizer
from tests.engine.oracle import network_logits
from tests.engine.schemas import SCHEMAS

V = 305
MOST_TOKENS = 6000
GREEDY = SamplingParams(temperature=0, max_tokens=300)
WARM = SamplingParams(temperature=1.0, seed=7, max_tokens=300)
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "c": {"enum": ["red", "gr\u00fcn"]}, "l": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
    "required": ["n", "c", "l"],
    "additionalProperties": False,
}  # fmt: skip
FORMS = {
    "schema": Constraint.json_schema(SCHEMA),
    "regex": Constraint.regex("(ab|cd){2,5}-[0-9]{3}"),
    "choice": Constraint.choice(["yes", "no, never", "\u65e5\u672c"]),
    "grammar": Constraint.grammar('start: sum\nsum: NUMBER ("+" NUMBER){0,3} ";"\nNUMBER: /[1-9][0-9]{0,2}/'),
}


def has_form(name, text):
    if name == "schema":
        Draft202012Validator(SCHEMA).validate(json.loads(text))
        return True
    if name == "choice":
        return text in ("yes", "no, never", "\u65e5\u672c")
    return re.fullmatch({"regex": "(ab|cd){2,5}-[0-9]{3}", "grammar": r"[1-9][0-9]{0,2}(\+[1-9][0-9]{0,2}){0,3};"}[name], text) is not None


@pytest.fixture(scope="module")
def grammars():
    return Grammars(byte_tokenizer(), V)


def write(matcher, rows):
    """The text of an answer that takes the largest allowed logit of each row; None where it does not end."""
    tokens = []
    for row in rows:
        logits, ids = matcher.narrow(row)
        token = int(logits.argmax()) if ids is None else int(ids[logits.argmax()])
        if token == EOS:
            return bytes(tokens).decode()
        assert token < 256, "a control token, or one that stands for nothing"
        tokens.append(token)
        matcher.accept(token)
        if matcher.complete:
            return bytes(tokens).decode()
    return None


def random_rows(seed, prefer="", strength=100.0):
    """Rows of random logits that like to close what is open, and prefer some characters to all others."""
    generator = torch.Generator().manual_seed(seed)
    bonus = torch.zeros(V)
    bonus[list(b'"}]')] = 2.5
    bonus[EOS] = 2.0
    bonus[list(prefer.encode())] = strength
    for _ in range(MOST_TOKENS):
        yield torch.randn(V, generator=generator) + bonus


# --- every answer has the form


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(schema=SCHEMAS)
def test_200_schemas_give_texts_that_validate(grammars, monkeypatch, schema):
    monkeypatch.setattr(grammar_module, "_try", lambda kind, grammar: None)  # a process for each would take a minute
    Draft202012Validator.check_schema(schema)
    form = grammars.compiled(Constraint.json_schema(schema))
    for seed in range(2):
        text = write(form.matcher([EOS]), random_rows(seed))
        assert text is not None, "it does not end"
        Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize(
    "constraint", [Constraint.json_object(), Constraint.json_schema(True), FORMS["schema"]], ids=["object", "any", "schema"]
)
@pytest.mark.parametrize("blanks", [" ", "\n", " \n\t\r"], ids=["blank", "line", "all"])
def test_a_model_that_always_prefers_blanks_ends(grammars, constraint, blanks):
    for seed in range(5):
        text = write(grammars.compiled(constraint).matcher([EOS]), random_rows(seed, prefer=blanks))
        assert text is not None
        json.loads(text)
        assert re.search(rf"\s{{{BLANKS + 1}}}", text) is None  # each byte is a token here


def test_the_mask_is_what_can_be_taken(grammars):
    """Token by token, the end tokens apart; and no control token, nor a hole of the vocabulary, is ever allowed."""
    for constraint in (*FORMS.values(), Constraint.json_object()):
        matcher = grammars.compiled(constraint).matcher([EOS])
        for row, _ in zip(random_rows(3), range(40), strict=False):
            allowed = matcher.allowed()
            assert not allowed[256:EOS].any()
            assert not allowed[EOS + 1 :].any()
            assert [matcher.state.validate_tokens([token]) == 1 for token in range(256)] == allowed[:256].tolist()
            token = int(row.masked_fill(torch.from_numpy(~allowed), -torch.inf).argmax())
            if token == EOS or matcher.complete:
                break
            assert matcher.take(token)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("params", [GREEDY, WARM, replace(WARM, top_k=5, top_p=0.5, min_p=0.1), replace(WARM, repetition_penalty=1.5, frequency_penalty=1.5, logit_bias={48: 50.0})], ids=["greedy", "drawn", "cuts", "penalties"])  # fmt: skip
def test_answers_of_a_model_have_the_form(llm, name, params):
    for output in llm.generate(["hello", [1, 2, 3]], replace(params, constraint=FORMS[name])):
        assert output.finish_reason == "stop"
        assert has_form(name, output.text)
        assert output.params.constraint == FORMS[name]


def test_chat_and_stream_and_settings(llm):
    params = SamplingParams.from_dict({"temperature": 0, "constraint": {"kind": "choice", "text": '["yes", "no"]'}})
    messages = [{"role": "user", "content": "Well?"}]
    assert llm.chat(messages, params).text in ("yes", "no")
    assert "".join(map(str, llm.stream(messages, params))) == llm.chat(messages, params).text
    assert SamplingParams.from_dict({"constraint": None}) == SamplingParams()


# --- how it ends


def test_where_nothing_may_follow_the_answer_ends_without_an_end_token(llm):
    output = llm.generate(["x"], replace(GREEDY, constraint=Constraint.choice(["abc"]), max_tokens=3))[0]
    assert (output.text, output.finish_reason, output.stopped_by, output.token_ids) == ("abc", "stop", None, (97, 98, 99))
    cut = llm.generate(["x"], replace(GREEDY, constraint=Constraint.choice(["abc"]), max_tokens=2))[0]
    assert (cut.text, cut.finish_reason) == ("ab", "length")


def test_where_more_may_follow_the_model_decides(llm):
    form = replace(GREEDY, constraint=Constraint.regex("a+"), max_tokens=9)
    ended = llm.generate(["x"], replace(form, logit_bias={EOS: 1000.0}))[0]
    assert (ended.text, ended.finish_reason, ended.stopped_by) == ("a", "stop", EOS)
    assert llm.generate(["x"], replace(form, ignore_eos=True, logit_bias={EOS: 1000.0}))[0].text == "a" * 9
    own = llm.generate(["x"], replace(form, stop_token_ids=[301], ignore_eos=True, logit_bias={301: 1000.0}))[0]
    assert (own.text, own.stopped_by) == ("a", 301)
    assert llm.generate(["x"], replace(form, stop="aaa"))[0].finish_reason == "stop"


def test_logprobs_are_the_models_own(llm, model):
    output = llm.generate([[5, 6, 7]], replace(GREEDY, constraint=FORMS["regex"], logprobs=2))[0]
    logprobs = network_logits(model, [5, 6, 7])[-1].log_softmax(-1)
    assert output.logprobs[0].logprob == pytest.approx(float(logprobs[output.token_ids[0]]), abs=1e-3)
    assert output.logprobs[0].top[0][0] == int(logprobs[:V].argmax())


# --- beside others


def test_each_gets_the_text_that_it_gets_alone(make_llm, model):
    asked = [replace(params, constraint=form) for params in (GREEDY, WARM) for form in (None, *FORMS.values(), Constraint.json_object())]
    alone = [make_llm(model).generate(["hello"], replace(params, max_tokens=60))[0].token_ids for params in asked]
    llm = make_llm(model)
    requests = [llm.engine.request(llm.tokenizer.encode("hello"), replace(params, max_tokens=60)) for params in asked]
    for _ in llm.engine.run(requests):
        pass
    outputs = {request.id: None for request in requests}
    again = [llm.engine.request(llm.tokenizer.encode("hello"), replace(params, max_tokens=60)) for params in asked]
    for request, chunk in llm.engine.run(again):
        outputs[request.id] = chunk.output
    assert [outputs[request.id].token_ids for request in again] == alone


def test_samples_each_have_their_own_state(llm):
    output = llm.generate(["hello"], replace(WARM, n=6, constraint=FORMS["schema"]))[0]
    texts = [choice.text for choice in output.choices]
    assert all(has_form("schema", text) for text in texts)
    assert len(set(texts)) > 3
    for index, text in enumerate(texts):
        assert llm.generate(["hello"], replace(WARM, seed=7 + index, constraint=FORMS["schema"]))[0].text == text


def test_answers_give_way_and_go_on(make_llm, model):
    size = make_llm(model).engine.runner.memory.block_bytes
    narrow, plenty = make_llm(model, cache_bytes=8 * size, keep_bytes=8 * size), make_llm(model)
    form = Constraint.json_schema({"type": "array", "items": {"enum": ["one", "two", "three"]}, "minItems": 30, "maxItems": 32})
    params = replace(WARM, n=3, constraint=form)
    prompts = [[i] * 60 for i in range(1, 4)]
    few, many = narrow.generate(prompts, params), plenty.generate(prompts, params)
    assert narrow.engine.scheduler.preemptions > 0
    assert [[choice.text for choice in output.choices] for output in few] == [[choice.text for choice in output.choices] for output in many]
    for output in few:
        for choice in output.choices:
            assert choice.finish_reason == "length" or 30 <= len(json.loads(choice.text)) <= 32


@pytest.mark.skipif(kernels.isa() is None, reason="this installation has no kernels for this processor")
@pytest.mark.parametrize(
    "params", [GREEDY, replace(WARM, temperature=0.3), replace(WARM, temperature=0.3, n=3)], ids=["greedy", "drawn", "samples"]
)
def test_guesses_change_no_text(tmp_path, params):
    to_gguf(tiny_model(tiny()), tmp_path / "model.gguf", "Q8_0")
    plain, guessing = LLM(tmp_path / "model.gguf", guesses=0), LLM(tmp_path / "model.gguf")
    for form in (Constraint.json_schema({"type": "array", "items": {"enum": ["the quick brown fox", "dog"]}, "maxItems": 12}), Constraint.regex("(over the lazy dog\n){3,9}end")):  # fmt: skip
        for prompt in ("the quick brown fox" * 3, 'over the lazy dog\nover the lazy dog\n["the quick brown fox", "the quick brown fox"]'):
            ours, theirs = (llm.generate([prompt], replace(params, max_tokens=200, constraint=form))[0] for llm in (guessing, plain))
            assert [(c.token_ids, c.text, c.finish_reason) for c in ours.choices] == [
                (c.token_ids, c.text, c.finish_reason) for c in theirs.choices
            ]
    assert guessing.engine.guessed_right > 20
    guessing.engine.settle()
    guessing.engine.check()


@pytest.mark.parametrize("bad", [-torch.inf, torch.nan])
def test_logits_that_are_none_end_that_request_alone(llm, monkeypatch, bad):
    logits = llm.engine.runner.logits

    def broken(*rows):
        out = logits(*rows)
        out[:, 48:58] = bad  # the digits
        return out

    if bad == bad:
        monkeypatch.setattr(llm.engine.runner, "logits", broken)
        other = llm.engine.request([1, 2], replace(GREEDY, constraint=Constraint.choice(["yes"])))
        digits = llm.engine.request([3, 4], replace(GREEDY, constraint=Constraint.regex("[0-9]+")))
        llm.engine.submit(other)
        with pytest.raises(FloatingPointError, match=r"logits of all 10 tokens that its grammar allows are -inf"):
            list(llm.engine.run([digits]))
        llm.engine.settle()
        assert [chunk.output.text for chunk in other.outbox if chunk.output] == ["yes"]
    else:
        monkeypatch.setattr(llm.engine.runner, "logits", broken)
        with pytest.raises(FloatingPointError, match="logits are nan"):
            llm.generate(["x"], replace(GREEDY, constraint=Constraint.regex("[0-9]+")))


def test_a_grammar_with_a_dead_end_ends_its_request_alone(llm):
    other = llm.engine.request([1, 2], replace(GREEDY, constraint=Constraint.choice(["yes"])))
    dead = llm.engine.request([3, 4], replace(GREEDY, constraint=Constraint.grammar('start: "a" X\nX: /b/ & /c/')))
    llm.engine.submit(other)
    with pytest.raises(ConstraintError, match=r"^request 1, position 2: grammar: no text has this form$"):
        list(llm.engine.run([dead]))
    llm.engine.settle()
    assert [chunk.output.text for chunk in other.outbox if chunk.output] == ["yes"]


# --- refusals


def deep(levels):
    schema = {"type": "integer"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


REFUSED = [
    (lambda: Constraint("xml", "a"), "constraint kind 'xml': must be one of json_object, json_schema, regex, grammar, choice"),
    (lambda: Constraint.json_schema("{"), "json_schema is not JSON: "),
    (lambda: Constraint.json_schema("[1]"), "json_schema at #: a schema is an object, true or false, got [1]"),
    (lambda: Constraint.json_schema({"maximum": float("inf")}), "json_schema is not JSON: Out of range float values are not JSON compliant"),
    (lambda: Constraint.json_schema('{"maximum": NaN}'), "NaN is not a number of JSON"),
    (lambda: Constraint.json_schema({"enum": ["x" * MOST_BYTES]}), "json_schema of 65,550 bytes: at most 65,536 are allowed; make it smaller"),
    (lambda: Constraint.json_schema(deep(MOST_DEPTH)), "nested deeper than 64 levels; make it flatter, or use $ref"),
    (lambda: Constraint.json_schema("[" * 30_000), "json_schema: nested too deep to be read; at most 64 levels are allowed"),
    (lambda: Constraint.json_schema({"properties": {"a": {"minLenght": 2}}}), "json_schema at #/properties/a: the keyword 'minLenght' would not be enforced; leave it out"),
    (lambda: Constraint.json_schema({"uniqueItems": True}), "json_schema at #: the keyword 'uniqueItems' would not be enforced; leave it out"),
    (lambda: Constraint.json_schema({"not": {"type": "null"}}), "json_schema at #: the keyword 'not' would not be enforced; leave it out"),
    (lambda: Constraint.json_schema({"items": {"propertyNames": {}}}), "json_schema at #/items: the keyword 'propertyNames' would not be enforced"),
    (lambda: Constraint.json_schema({"anyOf": {}}), "json_schema at #/anyOf: must be a list of schemas, got {}"),
    (lambda: Constraint.json_schema({"properties": []}), "json_schema at #/properties: must be schemas by name, got []"),
    (lambda: Constraint.json_schema({"$ref": "https://example.org/x"}), "json_schema at #/$ref: 'https://example.org/x' leads out of the schema"),
    (lambda: Constraint.json_schema({"multipleOf": 1000003}), "json_schema at #/multipleOf: 1000003 without its point is above 10,000; round it"),
    (lambda: Constraint.json_schema({"multipleOf": 10**400}), "without its point is above 10,000; round it"),
    (lambda: Constraint.json_schema({"minProperties": 2}), "json_schema at #/minProperties: 2 is enforced up to one more than are required; name them"),
    (lambda: Constraint.regex(""), "regex is empty: an answer needs at least one token"),
    (lambda: Constraint.grammar("start: <|im_start|>"), "grammar: <...>: control tokens are not a grammar's to write; put text into quotes"),
    (lambda: Constraint.grammar("start: <[301]>"), "grammar: <...>: control tokens are not a grammar's to write; put text into quotes"),
    (lambda: Constraint.grammar("start: %json {}"), "grammar: %json: white space in it would be unbounded; ask for kind json_schema"),
    (lambda: Constraint.grammar("start: a\na[max_tokens=3]: /x+/"), "grammar: temperature, max_tokens and stop of a rule would not be obeyed; leave them out"),
    (lambda: Constraint.choice([]), "choice of 0 texts: from 1 to 4,096 are allowed"),
    (lambda: Constraint.choice(["a", ""]), "choice: must be a list of texts of at least one character"),
    (lambda: Constraint.read({"kind": "regex", "pattern": "a"}), "constraint {'kind': 'regex', 'pattern': 'a'}: must be a Constraint, or a kind and a text"),
    (lambda: Constraint("json_object", "{}"), "json_object takes no text; for a schema use kind json_schema"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_what_is_refused_at_once(make, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make()
    assert "\n" not in str(caught.value)


NOT_COMPILED = [
    (Constraint.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "json_schema: Unsatisfiable schema: minimum (5) is greater than maximum (3)"),
    (Constraint.json_schema(False), "json_schema: Unsatisfiable schema: anyOf is empty"),
    (Constraint.json_schema({"$ref": "#"}), "json_schema: no text has this form"),
    (Constraint.json_schema({"$ref": "#/$defs/none"}), "json_schema: Pointer '/$defs/none' does not exist"),
    (Constraint.json_schema({"type": "strange"}), "json_schema: Invalid type: strange"),
    (Constraint.json_schema({"format": 5}), "json_schema: Expected string for 'format', got 5"),
    (Constraint.json_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "json_schema: oneOf: its options are not provably apart; use anyOf"),
    (Constraint.json_schema({"pattern": "(?=a)"}), "look-around, including look-ahead and look-behind, is not supported"),
    (Constraint.json_schema({"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]}), "json_schema: not compiled within 1 s; make it simpler"),
    (Constraint.regex("[a"), "unclosed character class"),
    (Constraint.regex("(a)\\1"), "backreferences are not supported"),
    (Constraint.regex("()"), "regex: only the empty text has this form; an answer needs at least one token"),
    (Constraint.grammar("begin: /a/"), "grammar: no start rule found"),
    (Constraint.grammar("start: ("), "grammar: 1(9): Expected token"),
    (Constraint.grammar("start: start"), "grammar: no text has this form"),
    (Constraint.grammar("start: A\nA: " + " & ".join(f"/(?s:.*)w{i}(?s:.*)/" for i in range(30))), "grammar: not compiled within 1 s; make it simpler"),
]  # fmt: skip


@pytest.mark.parametrize(("constraint", "message"), NOT_COMPILED, ids=[m[:40] for _, m in NOT_COMPILED])
def test_what_is_not_compiled(llm, monkeypatch, constraint, message):
    monkeypatch.setattr(grammar_module, "TRIAL_SECONDS", 1)
    with pytest.raises(ConstraintError, match=re.escape(message)) as caught:
        llm.generate(["x"], SamplingParams(constraint=constraint))
    assert "\n" not in str(caught.value)
    assert llm.generate(["x"], GREEDY)[0].finish_reason in ("stop", "length")


def test_an_expression_that_other_engines_choke_on(llm):
    for pattern in ("(a+)+b", "(a|a)*c{2}", "(a|b)*a(a|b){30}x", "((a{0,99}){0,99}b){1,3}"):
        output = llm.generate(["x"], replace(WARM, constraint=Constraint.regex(pattern), logit_bias={98: 3.0, 99: 3.0, 120: 6.0}))[0]
        assert output.finish_reason == "length" or re.fullmatch(pattern.replace("(a+)+", "a+").replace("(a|a)*", "a*"), output.text)


# --- what is kept


def test_tried_grammars_are_kept_up_to_a_number_and_a_size(monkeypatch):
    grammars, made = Grammars(byte_tokenizer(), V), []
    translated = grammar_module.translated
    monkeypatch.setattr(
        grammar_module, "translated", lambda constraint, brackets: (made.append(constraint.text), translated(constraint, brackets))[1]
    )
    monkeypatch.setattr(grammar_module, "MOST_KEPT", 3)
    for text in ("a", "b", "a", "c", "d", "a", "b"):
        grammars.compiled(Constraint.choice([text]))
    assert made == ['["a"]', '["b"]', '["c"]', '["d"]', '["b"]']
    monkeypatch.setattr(grammar_module, "MOST_KEPT_CHARACTERS", 110)
    grammars.compiled(Constraint.choice(["x" * 100]))
    assert [kept.text for kept in grammars._tried] == ['["' + "x" * 100 + '"]']


def test_an_answer_too_long_for_its_form_ends_no_other_with_that_form(llm, monkeypatch):
    monkeypatch.setattr(grammar_module, "LIMITS", {"max_lexer_states": 100, "verbose_errors": False})
    form = replace(GREEDY, constraint=Constraint.regex("[a-z]{1,1000}"), ignore_eos=True)
    long, short = llm.engine.request([1], form), llm.engine.request([1], replace(form, max_tokens=60))
    llm.engine.submit(short)
    with pytest.raises(ConstraintError, match=r"^request 0, position \d+: grammar: more than is kept of it; leave upper bounds"):
        list(llm.engine.run([long]))
    llm.engine.settle()
    assert [chunk.output.finish_reason for chunk in short.outbox if chunk.output] == ["length"]
    assert len(llm.generate(["x"], replace(form, max_tokens=60))[0].text) == 60


@pytest.mark.xdist_group("real model")
def test_the_real_model_answers_by_schema(coder):
    llm = LLM(coder)
    city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 40}, "country": {"type": "string", "maxLength": 40}, "inhabitants": {"type": "integer", "minimum": 1000, "maximum": 99_999_999}, "capital": {"type": "boolean"}}, "required": ["city", "country", "inhabitants", "capital"], "additionalProperties": False}  # fmt: skip
    messages = [{"role": "user", "content": "Describe Paris in JSON with city, country, inhabitants and capital (true or false)."}]
    params = SamplingParams(temperature=0, max_tokens=120, constraint=Constraint.json_schema(city))
    output = llm.chat(messages, params)
    answer = json.loads(output.text)
    Draft202012Validator(city).validate(answer)
    assert output.finish_reason == "stop"
    assert (answer["city"], answer["country"]) == ("Paris", "France")
    assert not {token for token in output.token_ids if llm.tokenizer.is_control(token)} - llm.engine.eos
    drawn = llm.chat(messages, replace(params, temperature=1.0, seed=3, n=3))
    for choice in drawn.choices:
        Draft202012Validator(city).validate(json.loads(choice.text))
