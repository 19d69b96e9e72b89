"""Answers held to a form, over HTTP: every dialect's way to ask for it, beside others that are not, and what is refused."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest

from tests.server.conftest import NAME, Running

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ada", "Bj\u00f6rn"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2},
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}
WARM = {"temperature": 1.0, "seed": 3}


def test_chat_by_schema_object_regex_grammar_and_choice(running: Running) -> None:
    def said(form: dict[str, Any]) -> str:
        answer = running.chat("Speak", max_tokens=300, response_format=form, **WARM)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        assert choice["finish_reason"] == "stop"
        return str(choice["message"]["content"])

    jsonschema.validate(
        json.loads(said({"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}})), SCHEMA
    )
    assert re.fullmatch("[a-c]{3}-[0-9]{2}", said({"type": "regex", "regex": "[a-c]{3}-[0-9]{2}"}))
    assert said({"type": "choice", "choices": ["yes", "no"]}) in ("yes", "no")
    assert re.fullmatch("(ab)+c", said({"type": "grammar", "grammar": 'start: ("ab")~1..4 "c"'}))


def test_vllms_way_to_ask_in_chats_and_completions(running: Running) -> None:
    def said(form: dict[str, Any]) -> list[str]:
        chat = running.chat("Speak", max_tokens=300, structured_outputs=form, **WARM).json()["choices"][0]
        text = running.post("/v1/completions", model=NAME, prompt="a", max_tokens=300, structured_outputs=form, **WARM).json()["choices"][0]
        assert (chat["finish_reason"], text["finish_reason"]) == ("stop", "stop")
        return [chat["message"]["content"], text["text"]]

    for text in said({"json": SCHEMA}):
        jsonschema.validate(json.loads(text), SCHEMA)
    assert all(re.fullmatch("[a-c]{3}-[0-9]{2}", text) for text in said({"regex": "[a-c]{3}-[0-9]{2}"}))
    assert all(text in ("yes", "no") for text in said({"choice": ["yes", "no"]}))
    assert all(re.fullmatch("(ab)+c", text) for text in said({"grammar": 'start: ("ab")~1..4 "c"'}))
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    text = running.post("/v1/completions", model=NAME, prompt="a", max_tokens=300, response_format=schema, **WARM).json()["choices"][0][
        "text"
    ]
    jsonschema.validate(json.loads(text), SCHEMA)
    for form, more in (({}, {}), ({"regex": "a", "json": SCHEMA}, {}), ({"regex": "a"}, {"response_format": schema})):
        refused = running.chat("Speak", structured_outputs=form, **more)
        assert (refused.status_code, "structured_outputs" in refused.text) == (400, True)


def test_the_other_dialects(running: Running) -> None:
    options = {**WARM, "num_predict": 300}
    asked = {"model": NAME, "messages": [{"role": "user", "content": "Speak"}], "stream": False, "options": options}
    jsonschema.validate(json.loads(running.post("/api/chat", **asked, format=SCHEMA).json()["message"]["content"]), SCHEMA)
    generated = running.post("/api/generate", model=NAME, prompt="Speak", stream=False, options=options, format=SCHEMA).json()
    jsonschema.validate(json.loads(generated["response"]), SCHEMA)
    form = {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA}}
    answer = running.post("/v1/responses", model=NAME, input="Speak", temperature=1.0, max_output_tokens=300, text=form).json()
    jsonschema.validate(json.loads(answer["output"][0]["content"][0]["text"]), SCHEMA)
    assert answer["text"]["format"]["schema"] == SCHEMA
    asked = {"model": NAME, "messages": [{"role": "user", "content": "Speak"}], "temperature": 1.0, "max_tokens": 300}
    answer = running.post("/v1/messages", **asked, output_config={"format": {"type": "json_schema", "schema": SCHEMA}}).json()
    jsonschema.validate(json.loads(answer["content"][0]["text"]), SCHEMA)


def test_held_and_free_answers_in_one_batch_are_those_of_each_alone(running: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}

    def ask(number: int) -> str:
        held = {"response_format": form} if number % 2 else {}
        return str(
            running.chat(f"Number {number}", max_tokens=60, temperature=1.0, seed=number, **held).json()["choices"][0]["message"]["content"]
        )

    alone = [ask(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}, "json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "propertys": {}}}}, "propertys"),
        ({"type": "regex", "regex": "(unclosed"}, "regex"),
        ({"type": "regex", "regex": "(a{1000}){1000}"}, "too many|make it simpler"),  # whichever limit comes first
        ({"type": "grammar", "grammar": "start: nothing"}, "grammar"),
        ({"type": "choice", "choices": []}, "choice"),
        ({"type": "yaml"}, "response_format"),
    ],
)
def test_a_bad_form_is_refused_and_others_are_served(running: Running, form: dict[str, Any], message: str) -> None:
    answer = running.chat("Speak", max_tokens=5, response_format=form)
    assert answer.status_code == 400
    error = answer.json()["error"]["message"]
    assert re.search(message, error)
    assert "\n" not in error
    assert running.chat("Speak", max_tokens=5).status_code == 200
