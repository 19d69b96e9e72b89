"""Personal data masked: e-mail addresses, telephone numbers, network addresses, card and account numbers, national ids.

What has a check digit is masked only where it fits: cards (Luhn, ISO/IEC 7812-1), IBANs (modulo 97, ISO 13616), Chinese
resident ids (modulo 11, GB 11643). Loopback, private and documentation addresses of networks, and addresses under the domains
kept for examples, say nothing of anybody and stay. Every mask is one word in angle brackets, so that a model learns the place,
not the value.

Left out: names and street addresses, which no pattern finds without harm to the text.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable

from datatrove.data import Document

from qwen2.data.steps import CountedFilter

_EMAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@((?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24})(?![\w-])", re.ASCII)
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:])", re.ASCII)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b", re.ASCII)
_CARD = re.compile(r"(?<![\d.,-])\d(?:[ -]?\d){12,18}(?![\d-]|[.,]\d)", re.ASCII)
_RESIDENT = re.compile(r"(?<!\d)[1-9]\d{5}(?:19|20)\d{9}[\dXx](?!\d)", re.ASCII)
_SECURITY = re.compile(r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])", re.ASCII)
_PHONE = re.compile(
    r"(?<![\w.+/-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,5}\)[ .-]?)?\d{1,5}(?:[ .-]\d{2,5}){1,4}|\+\d{8,14}"
    r"|\(\d{2,5}\) ?\d{3,4}[ .-]\d{3,4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-]|[.]\d)",
    re.ASCII,
)
_EXAMPLES = ("example", "invalid", "test", "localhost", "example.com", "example.org", "example.net")


def _someone(host: str) -> bool:
    host = host.lower()
    return not any(host == name or host.endswith(f".{name}") for name in _EXAMPLES)


def _public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def luhn(digits: str) -> bool:
    """Whether the check digit of a card number fits."""
    values = [int(d) for d in reversed(digits)]
    return (sum(values[::2]) + sum(sum(divmod(2 * d, 10)) for d in values[1::2])) % 10 == 0


def _card(found: str) -> bool:
    digits = re.sub(r"\D", "", found)
    return digits[0] in "23456" and len(set(digits)) > 2 and luhn(digits)


def iban(found: str) -> bool:
    """Whether the check digits of an account number fit."""
    text = found.replace(" ", "")
    return 15 <= len(text) <= 34 and int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def resident(found: str) -> bool:
    """Whether the check digit of a Chinese resident id fits."""
    weights = [2**i % 11 for i in range(17, 0, -1)]
    return "10X98765432"[sum(int(d) * w for d, w in zip(found, weights, strict=False)) % 11] == found[-1].upper()


def _always(found: str) -> bool:
    return True


RULES: list[tuple[str, str, re.Pattern[str], Callable[[str], bool]]] = [  # kind, a character that must be there, pattern, check
    ("email", "@", _EMAIL, lambda found: _someone(found.partition("@")[2])),
    ("ip", ".", _IPV4, _public),
    ("ip", ":", _IPV6, _public),
    ("iban", "", _IBAN, iban),
    ("id", "", _RESIDENT, resident),
    ("card", "", _CARD, _card),
    ("id", "-", _SECURITY, _always),
    ("phone", "", _PHONE, _always),
]
_DIGITS = re.compile(r"\d\d", re.ASCII)


def mask(text: str) -> tuple[str, Counter[str]]:
    """The text with personal data masked, and how many of each kind there were."""
    masked: Counter[str] = Counter()
    digits = _DIGITS.search(text) is not None
    for kind, needed, pattern, check in RULES:
        if (needed in text if kind == "email" else digits and needed in text) or (needed == ":" and "::" in text):

            def replaced(found: re.Match[str], kind: str = kind, check: Callable[[str], bool] = check) -> str:
                if not check(found.group()):
                    return found.group()
                masked[kind] += 1
                return f"<{kind}>"

            text = pattern.sub(replaced, text)
    return text, masked


class PersonalFilter(CountedFilter):
    """Masks; drops nothing. How many documents had which kind stands in the document's metadata."""

    name = "personal"

    def look(self, document: Document) -> str | None:
        """Change the text where there is something to mask."""
        document.text, masked = mask(document.text)
        if masked:
            document.metadata["masked"] = dict(masked)
        return None
