"""Questions to a running server, for the verbs that need one."""

from __future__ import annotations

import os
from typing import Annotated, Any, Optional

from cyclopts import Parameter

Address = Annotated[Optional[str], Parameter(negative=())]  # noqa: UP045 - read at run time
DEFAULT = "127.0.0.1:11434"


def ask(address: str | None, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The answer. OSError where no server of this kind is there, ValueError with its own words where it refuses."""
    import httpx

    place = os.environ.get("QWEN2_SERVER", DEFAULT) if address is None else address
    url = place if "://" in place else f"http://{place}"
    key = os.environ.get("QWEN2_API_KEY")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        answer = httpx.request(method, f"{url.rstrip('/')}{path}", json=body, headers=headers, timeout=60)
        found = answer.json()
    except httpx.HTTPError as error:
        raise OSError(f"no server answers at {place} ({error}): start one with qwen2 serve, or say where it is with --at") from None
    except ValueError:
        raise OSError(f"what answers at {place} is no server of this kind; say where ours is with --at") from None
    if answer.status_code != httpx.codes.OK:
        raise ValueError(f"the server at {place} says: {found.get('error', found)}")
    return dict(found)
