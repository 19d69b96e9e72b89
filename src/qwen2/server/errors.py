"""Errors as each dialect shapes them; every one has a line that says what, where and how to go on, and none has a path in it."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, Literal

from starlette.exceptions import HTTPException

from qwen2.engine.request import SamplingParams

Dialect = Literal["openai", "responses", "ollama", "anthropic"]
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
}
FIRST = re.compile(r"(\w+)\b")
NAMED = {one.name for one in fields(SamplingParams)} | {"messages", "tools", "tool_choice"}  # what an engine's words may begin with
GONE = 499  # the client has gone, in the words of nginx
TYPES |= {429: "rate_limit_error", GONE: "aborted"}

ANTHROPIC = TYPES | {413: "request_too_large", 503: "overloaded_error"}


FAILURES = (ValueError, ArithmeticError, MemoryError, RuntimeError)  # what an engine's requests end with (streams.py)


class ApiError(HTTPException):
    """An answer that is an error. `field` names what of the request is wrong."""

    def __init__(
        self, status: int, message: str, code: str | None = None, field: str | None = None, retry_after: int | None = None
    ) -> None:
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message, headers | ({"WWW-Authenticate": "Bearer"} if status == 401 else {}))
        self.status, self.message, self.code, self.field = status, message, code, field


def body(error: ApiError, dialect: Dialect) -> dict[str, Any]:
    """The error's JSON."""
    if dialect == "ollama":
        return {"error": error.message}
    if dialect == "anthropic":
        return {"type": "error", "error": {"type": ANTHROPIC.get(error.status, "api_error"), "message": error.message}}
    kind = TYPES.get(error.status, "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.field, "code": error.code}}


def of_engine(error: BaseException) -> ApiError:
    """What an error of the engine or the store is to a client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        code = "context_length_exceeded" if any(bound in str(error) for bound in ("the window is", "num_ctx is")) else None
        named = FIRST.match(str(error))
        return ApiError(400, str(error), code, named[1] if named is not None and named[1] in NAMED else None)
    if isinstance(error, MemoryError):
        return ApiError(503, "there is not enough memory for this just now; ask again", retry_after=1)
    return ApiError(500, f"the model failed: {error}" if isinstance(error, ArithmeticError) else "the server failed; its log says why")
