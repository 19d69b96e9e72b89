"""Telephone numbers in text: international ones by their form, national ones by the numbering plans of the language's countries.

A regular expression finds runs of digits that could be one, which most texts have few of; whether a run is a number of somebody
in one of the countries is asked of `phonenumbers`, which carries the plans. Digits of every script count. A run that could as well
be an amount (three digits at a time, or all in one) is taken for a number only behind a word or sign that says so; one that begins
with the 0 of a trunk call or with brackets is taken at its word.

Left out: numbers of emergency, service and information lines, which are nobody's, and national numbers of other countries than
those of the language.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

COUNTRIES = {  # language: whose numbers are looked for
    "en": ("US", "GB", "AU"), "zh": ("CN", "TW"), "de": ("DE", "AT", "CH"), "fr": ("FR", "BE", "CH"), "es": ("ES", "MX", "AR"),
    "pt": ("BR", "PT"), "it": ("IT", "CH"), "nl": ("NL", "BE"), "ru": ("RU",), "cs": ("CZ",), "pl": ("PL",), "ar": ("SA", "EG", "AE"),
    "fa": ("IR",), "he": ("IL",), "tr": ("TR",), "ja": ("JP",), "ko": ("KR",), "vi": ("VN",), "th": ("TH",), "id": ("ID",), "ms": ("MY",),
    "lo": ("LA",), "my": ("MM",), "ceb": ("PH",), "tl": ("PH",), "km": ("KH",), "hi": ("IN",), "bn": ("BD", "IN"), "ur": ("PK", "IN"),
}  # fmt: skip
_INTERNATIONAL = re.compile(
    r"(?<![\w.+/-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,5}\)[ .-]?)?\d{1,5}(?:[ .-]\d{2,8}){1,4}|\+\d{8,14}"
    r"|\(\d{2,5}\) ?\d{3,4}[ .-]\d{3,4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-]|[.]\d)",
    re.ASCII,
)
_ASCII_DIGIT = re.compile("[0-9]")
_OTHER_SCRIPT, _OTHER_DIGIT = re.compile(r"\+(?![0-9])\d"), re.compile(r"(?![0-9])\d")  # international numbers in digits that are not ASCII
_SPLIT = r" \-./\u00a0\u2010-\u2013"
_FIRST = r"[(\d]"  # what stands before it is looked at from behind it, as a search that begins with a class of characters is fast
_RUN = re.compile(
    rf"{_FIRST}(?<![A-Za-z_\d+#%*=^@$/\\\u20ac\u00a3\u00a5\u2212-]{_FIRST})(?<!\d[.,:]{_FIRST})[\d(){_SPLIT}]{{6,36}}\d"
    r"(?![A-Za-z_\d%@/]|[,:-]\d|\.\w)"
)
_DATE = re.compile(r"(?<!\d)(?:\d{1,2}([./-])\d{1,2}\1(?:19|20)\d\d|(?:19|20)\d\d([./-])\d{1,2}\2\d{1,2})(?!\d)")
_FRACTION, _BRACKETS = re.compile(r"\d[.,]"), re.compile(r"\(\d{1,5}\)")
_CALLED = re.compile(
    r"(?:\b(?:tel|t\u00e9l|phone|fax|mobile?|cell|cel|hp|whatsapp|signal|call|ruf|rufnummer|telefon\w*|tel[e\u00e9]fono|handy|m[o\u00f3]vil"
    r"|celular|telem[o\u00f3]vel|gsm|appelez|llame|bel|kom\u00f3rka|kom\u00f3rkowy|\u0442\u0435\u043b|\u0442\u0435\u043b\u0435\u0444\u043e\u043d\w*)"
    r"|\u7535\u8bdd|\u624b\u673a|\u96fb\u8a71|\u643a\u5e2f|\uc804\ud654|\u0647\u0627\u062a\u0641|\u062a\u0644\u0641\u0646|\u260e|\u2706|\U0001f4de)"
    r"\W{0,4}$",
    re.I,
)
_LEAST, _MOST = 8, 26  # digits: two numbers with a space between them are one run


def telephones(text: str, language: str) -> Iterator[tuple[int, int]]:
    """Where the telephone numbers of a text are, in order; what two ways of looking find of one number is one place."""
    found: list[tuple[int, int]] = []
    if _OTHER_SCRIPT.search(text):
        text = _OTHER_DIGIT.sub(lambda digit: str(int(digit[0])), text)
    if _ASCII_DIGIT.search(text):
        found += [match.span() for match in _INTERNATIONAL.finditer(text) if len(re.sub(r"\D", "", match.group())) >= _LEAST]
    for match in _RUN.finditer(text):
        found += [(match.start() + a, match.start() + b) for a, b in _national(match, language)]
    places: list[tuple[int, int]] = []
    for start, stop in sorted(found):
        if places and start < places[-1][1]:
            start, stop = places[-1][0], max(stop, places.pop()[1])
        places.append((start, stop))
    yield from places


def _national(run: re.Match[str], language: str) -> list[tuple[int, int]]:
    """The numbers in a run of digits, by the plans of the language's countries."""
    text, before = run.group(), run.string[max(0, run.start() - 24) : run.start()]
    groups = re.findall(r"\d+", text)
    digits = "".join(groups)
    if not _LEAST <= len(digits) <= _MOST or sum(len(group) == 1 for group in groups) > 1 or _DATE.search(text) or _FRACTION.match(text):
        return []
    zero = int(digits[0]) == 0 and (len(groups) > 1 or len(digits) > _LEAST)
    trunk = zero or bool(_BRACKETS.match(text)) or (language == "ru" and digits[0] == "8")
    chinese = language == "zh" and len(groups) == 1 and len(digits) == 11
    said = trunk or chinese or bool(_CALLED.search(before))
    amount = len(groups) == 1 or (len(groups[0]) <= 3 and all(len(group) == 3 for group in groups[1:]))
    return [] if amount and not said else _numbers(text, COUNTRIES.get(language, ()), said)


@lru_cache(maxsize=4096)
def _numbers(run: str, countries: tuple[str, ...], said: bool) -> list[tuple[int, int]]:
    from phonenumbers import Leniency, PhoneNumberMatcher, PhoneNumberType, number_type

    somebody = (
        PhoneNumberType.FIXED_LINE, PhoneNumberType.MOBILE, PhoneNumberType.FIXED_LINE_OR_MOBILE, PhoneNumberType.VOIP,
        PhoneNumberType.PERSONAL_NUMBER, PhoneNumberType.PAGER,
    )  # fmt: skip
    leniency = Leniency.VALID if said else Leniency.STRICT_GROUPING
    for country in countries:
        matches = PhoneNumberMatcher(run, country, leniency=leniency)
        if found := [(match.start, match.end) for match in matches if number_type(match.number) in somebody]:
            return found
    return []
