"""The server against its own OpenAPI document, by schemathesis: what the document allows is taken, what it forbids is refused, nothing else comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from qwen2.server.app import create_app
from qwen2.server.settings import Settings
from tests.server.conftest import NAME, Running

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis needs Python 3.11")
positive_data_acceptance = pytest.importorskip("schemathesis.specs.openapi.checks").positive_data_acceptance

FEW = settings(max_examples=5, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def specification(**given: Any) -> Any:
    return schemathesis.openapi.from_dict(create_app(Settings(**given)).openapi())


plain, keyed = specification(), specification(api_key="secret")
answering = "^/(v1/.*|tokenize|detokenize|api/(chat|generate|embed|embeddings|show))$"


@pytest.mark.slow
@plain.parametrize()
@FEW
def test_the_server_keeps_its_own_specification(case: Any, running: Running) -> None:
    """All default checks; most bodies ask for a model that is not here.

    But for one where a model is made: which fields go together, and what a digest is, is more than the document says.
    """
    made = case.operation.path.startswith(("/api/create", "/api/blobs"))
    case.call_and_validate(base_url=running.url, timeout=60, excluded_checks=[positive_data_acceptance] if made else [])


@pytest.mark.slow
@plain.include(method="POST", path_regex=answering).parametrize()
@FEW
def test_the_same_with_a_model_that_is_here(case: Any, running: Running) -> None:
    """But for one check: which fields go together, and how long a text may be, is more than the document says."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = NAME
    case.call_and_validate(base_url=running.url, timeout=60, excluded_checks=[positive_data_acceptance])


@pytest.mark.slow
@keyed.include(path_regex="^/(v1/models|api/tags|metrics|health|tokenize)$").parametrize()
@FEW
def test_the_key_is_asked_for_where_the_specification_says(case: Any, serve: Callable[..., Running]) -> None:
    running = serve(api_key="secret")
    case.call_and_validate(base_url=running.url, timeout=60, headers={"x-api-key": "secret"})
