"""Where a running server is, and questions to it for the verbs that need one."""

from __future__ import annotations

import os
from typing import Annotated, Any, Optional

from cyclopts import Parameter

Address = Annotated[Optional[str], Parameter(negative=())]  # noqa: UP045 - read at run time
DEFAULT = "127.0.0.1:11434"


def address_of(given: str | None) -> str:
    """The address that is given, or the environment's QWEN2_SERVER if it has one, or the default one."""
    return (os.environ.get("QWEN2_SERVER") or DEFAULT) if given is None else given


def headers_of() -> dict[str, str]:
    """The environment's QWEN2_API_KEY, for servers that want one; an empty one is none."""
    key = os.environ.get("QWEN2_API_KEY", "").strip()
    return {"Authorization": f"Bearer {key}"} if key else {}


def message_of(refusal: Any) -> str:
    """The words of a refusal, in the shape of any dialect (server/errors.py). TypeError or KeyError where it is none."""
    said = refusal["error"]
    return str(said["message"] if isinstance(said, dict) else said)


def ask(address: str | None, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The answer. OSError where no server of this kind is there, ValueError with its own words where it refuses."""
    import httpx

    place = address_of(address)
    url = place if "://" in place else f"http://{place}"
    try:
        answer = httpx.request(method, f"{url.rstrip('/')}{path}", json=body, headers=headers_of(), timeout=60)
        found = answer.json()
        said = None if answer.status_code == httpx.codes.OK else message_of(found)
    except httpx.HTTPError as error:
        raise OSError(f"no server answers at {place} ({error}): start one with qwen2 serve, or say where it is with --at") from None
    except (ValueError, TypeError, KeyError):
        raise OSError(f"what answers at {place} is no server of this kind; say where ours is with --at") from None
    if said is not None:
        raise ValueError(f"the server at {place} says: {said}")
    return dict(found)
