"""Personal data masked: e-mail addresses, telephone numbers, network addresses, card and account numbers, national ids.

What has a check digit is masked only where it fits: cards (Luhn, ISO/IEC 7812-1), IBANs (modulo 97, ISO 13616), Chinese
resident ids (modulo 11, GB 11643); telephone numbers where a country has such (`telephone.py`). Loopback, private and
documentation addresses of networks, addresses under the domains kept for examples, and numbers of versions and chapters say
nothing of anybody and stay. Every mask is one word in angle brackets, so that a model learns the place,
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
from qwen2.data.telephone import telephones

_SPACED = r"A-Za-z0-9_\u00c0-\u024f\u0370-\u052f\u1e00-\u1eff"  # letters of scripts whose words stand apart: Latin, Greek, Cyrillic
_EMAIL = re.compile(
    rf"(?<![{_SPACED}.+-])[{_SPACED}][{_SPACED}.+-]{{0,63}}@((?:[{_SPACED}-]{{1,63}}\.)+[^\W\d_]{{2,24}}(?<=[{_SPACED}]))(?![{_SPACED}-])"
)
_EMAIL_ELSEWHERE = re.compile(r"\w[\w.+-]{0,63}@((?:[\w-]{1,63}\.)+[^\W\d_]{2,24})(?![\w-])")
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)", re.ASCII)
_NUMBERED = re.compile(  # words before numbers of several parts that are no addresses: version, chapter and their like
    r"(?:(?<![^\W\d_])(?:v|ver|version|versi\u00f3n|vers\u00e3o|versione|versie|verze|wersja|versi|phi\u00ean b\u1ea3n|s\u00fcr\u00fcm"
    r"|\u0432\u0435\u0440\u0441\u0438\w+|release|build|rev|revision|patch|firmware|driver|chapter|section|sec|paragraph|clause|annex|appendix"
    r"|table|figure|fig|step|kapitel|abschnitt|tabelle|chapitre|paragraphe|cap\u00edtulo|secci\u00f3n|se\u00e7\u00e3o|capitolo|sezione"
    r"|hoofdstuk|kapitola|rozdzia\u0142|\u0433\u043b\u0430\u0432\w+|\u0440\u0430\u0437\u0434\u0435\u043b\w*|b\u00f6l\u00fcm|bab|oid|rfc)"
    r"|\u7248\u672c|\u7248|\u7ae0|\u8282|\u7b2c|\u30d0\u30fc\u30b8\u30e7\u30f3|\ubc84\uc804|\u0625\u0635\u062f\u0627\u0631"
    r"|\u0646\u0633\u062e\u0647|\u00a7)[\s.:(#=\"'-]{0,3}$",
    re.IGNORECASE,
)
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:])", re.ASCII)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b", re.ASCII)
_CARD = re.compile(r"(?<![\d.,-])\d(?:[ -]?\d){12,18}(?![\d-]|[.,]\d)", re.ASCII)
_RESIDENT = re.compile(r"(?<!\d)[1-9]\d{5}(?:19|20)\d{9}[\dXx](?!\d)", re.ASCII)
_SECURITY = re.compile(r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])", re.ASCII)
_EXAMPLES = ("example", "invalid", "test", "localhost", "example.com", "example.org", "example.net")


def _someone(host: str) -> bool:
    host = host.lower()
    return not any(host == name or host.endswith(f".{name}") for name in _EXAMPLES)


def _public(found: re.Match[str]) -> bool:
    try:
        public = ipaddress.ip_address(found.group()).is_global
    except ValueError:
        return False
    return public and not _NUMBERED.search(found.string[max(0, found.start() - 16) : found.start()])


def luhn(digits: str) -> bool:
    """Whether the check digit of a card number fits."""
    values = [int(d) for d in reversed(digits)]
    return (sum(values[::2]) + sum(sum(divmod(2 * d, 10)) for d in values[1::2])) % 10 == 0


def _card(found: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", found.group())
    return digits[0] in "23456" and len(set(digits)) > 1 and luhn(digits)


def iban(found: str) -> bool:
    """Whether the check digits of an account number fit."""
    text = found.replace(" ", "")
    return 15 <= len(text) <= 34 and int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def resident(found: str) -> bool:
    """Whether the check digit of a Chinese resident id fits."""
    weights = [2**i % 11 for i in range(17, 0, -1)]
    return "10X98765432"[sum(int(d) * w for d, w in zip(found, weights, strict=False)) % 11] == found[-1].upper()


Check = Callable[[re.Match[str]], bool]
RULES: list[tuple[str, str, re.Pattern[str], Check]] = [  # kind, a character that must be there, pattern, check
    ("email", "@", _EMAIL, lambda found: _someone(found[1])),
    ("email", "@", _EMAIL_ELSEWHERE, lambda found: _someone(found[1])),
    ("ip", ".", _IPV4, _public),
    ("ip", ":", _IPV6, _public),
    ("iban", "", _IBAN, lambda found: iban(found.group())),
    ("id", "", _RESIDENT, lambda found: resident(found.group())),
    ("card", "", _CARD, _card),
    ("id", "-", _SECURITY, lambda found: True),
]
_DIGITS = re.compile(r"\d", re.ASCII)


def mask(text: str, language: str = "") -> tuple[str, Counter[str]]:
    """The text with personal data masked, and how many of each kind there were. National telephone numbers are those of `language`."""
    masked: Counter[str] = Counter()
    digits = _DIGITS.search(text) is not None
    for kind, needed, pattern, check in RULES:
        if (needed in text if kind == "email" else digits and needed in text) or (needed == ":" and "::" in text):

            def replaced(found: re.Match[str], kind: str = kind, check: Check = check) -> str:
                if not check(found):
                    return found.group()
                masked[kind] += 1
                return f"<{kind}>"

            text = pattern.sub(replaced, text)
    kept, last = list[str](), 0
    for start, end in telephones(text, language):
        masked["phone"] += 1
        kept += text[last:start], "<phone>"
        last = end
    return "".join((*kept, text[last:])), masked


class PersonalFilter(CountedFilter):
    """Masks; drops nothing. How many documents had which kind stands in the document's metadata."""

    name = "personal"

    def look(self, document: Document) -> str | None:
        """Change the text where there is something to mask."""
        document.text, masked = mask(document.text, document.metadata["language"])
        if masked:
            document.metadata["masked"] = dict(masked)
        return None
