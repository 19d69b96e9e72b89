r"""The number that an answer gives, as an exact rational: the last one in it, however it is written.

The last `\boxed{...}` that has one says which, else what follows the last `####`, else the whole text. Understood are digits of every
script, signs, decimal points and commas, thousands apart by comma, point, space or apostrophe, fractions (3/4, \frac{3}{4}, 1 1/2 and
the single characters), percent, powers of ten, currencies and units. What can be read in two ways has both readings: 1,234 is 1234 and
1.234, 50% is 50 and 1/2; two numbers are equal where any of their readings are.
Left out: numbers in words, in Chinese characters or in Roman digits; arithmetic (2^10 ends in 10); clocks and dates.

    readings("It is **1 234,5 kg**.")       # {Fraction(2469, 2)}
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from fractions import Fraction

MOST_DIGITS = 400  # of a number, and of its power of ten: longer ones are noise, and slow
MOST_BOXES = 8  # the last ones, which are looked into
MINUS = "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"  # signs that stand for -
SPACES = "\u00a0\u2007\u2009\u202f"  # spaces that hold a number together
SIGNS = str.maketrans(
    dict.fromkeys(MINUS, "-")
    | dict.fromkeys(SPACES, "\u00a0")
    | {"\u066b": ".", "\u066c": ",", "\uff0e": ".", "\uff0c": ",", "\u2044": "/", "\uff0f": "/", "\u2019": "'", "\uff0b": "+"}
    | {"\u066a": "%", "\uff05": "%", "\u00d7": "*", "\u22c5": "*", "\u200e": None, "\u200f": None, "\u061c": None}
)
CURRENCY = "$\u20ac\u00a3\u00a5\u20b9\u20a9\u20ab\u0e3f\u20ba\u20bd\u20b1\u20aa\u17db\u20ad"
WORD = "A-Za-z\u00c0-\u024f_"  # letters that, right before a digit, make a name of it: CO2, x1; not those of scripts without spaces
GROUPED = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:\.\d{3}){2,}(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d{1,3}(?:['\u00a0_]\d{3})+(?!\d)"
SPACED = r"\d{1,3}(?:\ \d{3})+(?!\d)"
NUMBER = re.compile(
    rf"""(?<![{WORD}\d]) (?:
        (?P<mixed>\d+)\ (?P<part>\d+)\s*/\s*(?P<parts>\d+)(?![\d/])
      | (?P<over>\d+)\s*/\s*(?P<under>\d+)(?![\d/])
      | (?P<whole>{SPACED}|{GROUPED}|\d+) (?:(?P<mark>[.,])(?P<decimals>\d+)(?!\d))?
      | \.(?P<bare>\d+)
    )
    (?:\s*\*\s*10\s*\^\s*\{{?\s*(?P<power>[+-]?\d+)\s*\}}?|[eE](?P<exponent>[+-]?\d+)(?![{WORD}\d]))?
    (?P<percent>\s?\\?%)?""",
    re.VERBOSE,
)
FRACTION = re.compile(r"(\d*)\s*\\[dtc]?frac\s*(?:\{\s*(-?)\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
SIGN = re.compile(rf"(?P<before>\S)?(?P<space>\s*)-(?P<gap>\s*)(?P<currency>[{CURRENCY}]\s?)?$|[{CURRENCY}](?P<inner>-)$")
UNIT_POWER = re.compile(rf"(?<=[{WORD})}}])\s*\^\s*\{{?\s*-?\d+\s*\}}?|(?<=\\circ)\s*[CFK]\b")
CODES = re.compile(r"\b(?:[A-Z]{3}|R[spmM]|R|kr|US|HK)[.]?(?=[$]?-?\d)")  # currencies written right before the number


def readings(text: str) -> frozenset[Fraction]:
    """What the last number of a text may be; empty where there is none."""
    for part in _parts(text):
        found = _last(part)
        if found:
            return found
    return frozenset()


def exact(value: object) -> frozenset[Fraction]:
    """A reference answer: a number of JSON, or a text that is read as answers are. Raises ValueError where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is no number, and no text that has one")
    if isinstance(value, str):
        found = readings(value)
    else:
        found = frozenset({Fraction(str(value))}) if value == value and abs(value) != float("inf") else frozenset()
    if not found:
        raise ValueError(f"{value!r} has no number")
    return found


def shown(numbers: frozenset[Fraction]) -> str:
    """The readings in a line, the same every time."""
    return " or ".join(str(number) for number in sorted(numbers, key=lambda number: (abs(number), number), reverse=True))


def plain(text: str) -> str:
    """The text with ASCII digits and signs, and LaTeX's fractions, spaces and units as people write them without it."""
    digits = (str(unicodedata.decimal(c)) if not c.isascii() and c.isdecimal() else c for c in text)
    text = "".join(digits).translate(SIGNS)
    text = "".join(_vulgar(c) for c in text)
    text = re.sub(r"\{,\}", ",", re.sub(r"\\[,;:! ]|~", "\u00a0", text)).replace("\\$", "$")
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\(?:times|cdot)\b", "*", text)
    text = FRACTION.sub(_fraction, text)
    return CODES.sub("", UNIT_POWER.sub(" ", text))


def _vulgar(character: str) -> str:
    """A character such as one half as " 1/2"."""
    if character.isascii() or "/" not in (form := unicodedata.normalize("NFKC", character).replace("\u2044", "/")):
        return character
    return f" {form} " if re.fullmatch(r"\d+/\d+", form) else character


def _fraction(match: re.Match[str]) -> str:
    whole, sign, top, short_top, bottom, short_bottom = match.groups()
    before = "" if match.start() and match.string[match.start() - 1] == "-" else f"{whole} "
    return f"{before}{sign or ''}{top or short_top}/{bottom or short_bottom} "


def _parts(text: str) -> list[str]:
    """Where the number is looked for, the likeliest place first."""
    boxes = _boxes(text)
    marked = [text.rpartition("####")[2]] if "####" in text else []
    return [plain(part) for part in (*reversed(boxes), *marked, text)]


def _boxes(text: str) -> list[str]:
    r"""What stands in each `\boxed{...}`, braces balanced; of one that is never closed, all that follows."""
    found = []
    for match in deque(re.finditer(r"\\f?boxed\s*\{", text), maxlen=MOST_BOXES):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        found.append(text[match.end() : end - 1 if depth == 0 else end])
    return found


def _last(text: str) -> frozenset[Fraction]:
    found: frozenset[Fraction] = frozenset()
    for match in NUMBER.finditer(text):
        found = _values(match) or found
    return found


def _values(match: re.Match[str]) -> frozenset[Fraction]:
    """The readings of one number; empty where it is none, such as one over zero."""
    if sum(c.isdigit() for c in match.group()) > MOST_DIGITS:
        return frozenset()
    part = match.groupdict()
    power = int(part["power"] or part["exponent"] or 0)
    if abs(power) > MOST_DIGITS or "0" in {str(int(part[name])) for name in ("parts", "under") if part[name]}:
        return frozenset()
    if part["mixed"]:
        values = {int(part["mixed"]) + Fraction(int(part["part"]), int(part["parts"]))}
    elif part["over"]:
        values = {Fraction(int(part["over"]), int(part["under"]))}
    elif part["bare"]:
        values = {Fraction(f"0.{part['bare']}")}
    else:
        values = _decimal(part["whole"], part["mark"], part["decimals"])
    sign = -1 if _is_negative(match.string[max(0, match.start() - 16) : match.start()]) else 1
    values = {sign * value * Fraction(10) ** power for value in values}
    return frozenset(values | {value / 100 for value in values} if part["percent"] else values)


def _is_negative(before: str) -> bool:
    """Whether the minus before a number is its sign: no operator between two, no hyphen, no mark of a list."""
    match = SIGN.search(before)
    if match is None or match["inner"]:
        return match is not None
    if match["before"] is None or "\n" in match["space"]:
        return not match["gap"]
    if match["before"].isdigit() or match["before"] in ")]}":
        return False
    return not match["before"].isalpha() or bool(match["space"] and not match["gap"])


def _decimal(whole: str, mark: str | None, decimals: str | None) -> set[Fraction]:
    digits = re.sub(r"\D", "", whole)
    if decimals is not None:
        values = {Fraction(f"{digits}.{decimals}")}
        if mark == "." and len(decimals) == 3 and len(digits) <= 3 and digits == whole and digits.lstrip("0"):
            values.add(Fraction(digits + decimals))  # a German thousand
        return values
    values = {Fraction(digits)}
    if re.fullmatch(r"\d{1,3},\d{3}", whole):
        values.add(Fraction(whole.replace(",", ".")))  # a German decimal
    if " " in whole:
        values.add(Fraction(whole.rpartition(" ")[2]))  # or two numbers side by side
    return values
