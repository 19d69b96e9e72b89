"""What the clients' conversations have in common: where the server is, the questions, and what is right.

python bench/clients.py          # makes the environment, starts the server, runs these files and writes the table
"""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

QUESTION = "What is the capital of France? Answer with one word."
COUNT = "Count from 1 to 10, separated by spaces."
WRITE_PERSON = "Anna is 31 years old. Write her name and her age as JSON."
# The Coder models of this size write calls as code blocks unless they are shown the form of Qwen2.5's own prompt once more.
CALL = 'What is the weather in Paris? Answer in this form:\n<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>'
TELL = "Tell me that in one sentence."  # after a call and its result
WEATHER = "17 degrees, light rain"
FUNCTION: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather in a city now.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Name of the city"}},
        "required": ["city"],
    },
}
NUMBERS = "1 2 3 4 5 6 7 8 9 10"
TEXTS = ["A cat sleeps on the sofa.", "The kitten naps on a couch.", "Interest rates rose by half a point."]


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--url", required=True, help="Where the server is, as in http://127.0.0.1:11434.")
    parser.addoption("--model", required=True, help="A model that it has.")


@pytest.fixture(scope="session")
def url(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--url"))


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--model"))


def check_vectors(vectors: Any) -> None:
    """Of TEXTS: of length one, different, and those that say the same nearer to each other."""
    assert len(vectors) == len(TEXTS)
    assert all(abs(sum(x * x for x in vector) - 1) < 1e-3 for vector in vectors)
    near, far = (sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors[1:])
    assert far < near < 0.9999
