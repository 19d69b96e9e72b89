"""The byte alphabet of byte-level BPE: one printable character for each of the 256 bytes, so that a vocabulary is plain text.

The mapping is GPT-2's: printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and onwards.
"""

from __future__ import annotations


def _alphabet() -> dict[int, str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


CHAR_OF_BYTE = _alphabet()
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}


def to_chars(data: bytes) -> str:
    """Bytes as a vocabulary spells them."""
    return "".join(CHAR_OF_BYTE[byte] for byte in data)


def to_bytes(token: str) -> bytes:
    """A vocabulary entry as bytes; an entry written outside the alphabet stands for its own UTF-8, as in the reference decoder."""
    if all(char in BYTE_OF_CHAR for char in token):
        return bytes(BYTE_OF_CHAR[char] for char in token)
    return token.encode("utf-8", "replace")
