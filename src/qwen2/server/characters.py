"""Half a character in a request: refused where it would come back in the answer or go into a form.

JSON may hold one half of a surrogate pair, which no UTF-8 has: an answer that repeats it could not be sent, after it was written. Texts
for the model may have one, since programs cut texts between the halves; the tokenizer reads it as U+FFFD, as browsers write it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from fastapi import Request

from qwen2.server.errors import ApiError

MAYBE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")  # as an escape, or in bytes that JSON's reader lets pass
FOR_THE_MODEL = {"messages", "input", "prompt", "suffix", "system"}
HALF = re.compile("[\ud800-\udfff]")


async def whole_characters(request: Request) -> None:
    """ApiError names the first field that has half a character. Whole pairs, as for emoji, are characters."""
    if request.method == "GET" or request.url.path.startswith("/api/blobs/"):
        return
    body = await request.body()
    if MAYBE.search(body) is None and b"\0" not in body[:4]:  # zeros: UTF-16, which JSON may be in
        return
    try:
        fields = json.loads(body)
    except ValueError:  # told where it is read
        return
    free = FOR_THE_MODEL - ({"prompt"} if isinstance(fields, dict) and fields.get("echo") else set())
    for name, value in fields.items() if isinstance(fields, dict) else ():
        place = next(_halves(name, {name: None} if name in free else {name: value}), None)
        if place is not None:
            place = place.encode("ascii", "backslashreplace").decode()
            raise ApiError(400, f"{place}: half of a surrogate pair is no character: send the other half too", "invalid_field", place)


def _halves(name: str, fields: dict[str, Any]) -> Iterator[str]:
    """Where a text, or the name of a field, has one."""
    left: list[tuple[str, Any]] = [(name, fields[name])]
    while left:
        place, value = left.pop()
        if HALF.search(place) or (isinstance(value, str) and HALF.search(value)):
            yield place
        elif isinstance(value, dict):
            left += [(f"{place}.{key}", one) for key, one in value.items()]
        elif isinstance(value, list):
            left += [(f"{place}.{index}", one) for index, one in enumerate(value)]
