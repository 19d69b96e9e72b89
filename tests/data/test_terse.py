"""Items of few telling words: formulas, short programs, short Chinese and Japanese. Copies are found; lists and tables are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2.data.contamination import LEAST, Index, too_short
from qwen2.data.units import Text

MATHS = [
    "Let $x_1,$ $x_2,$ $x_3,$ $y_1,$ $y_2,$ $y_3$ be real with $(x_1 - x_2)^2 + (y_1 - y_2)^2 = 9$ and $(x_1 - x_3)^2 + (y_1 - y_3)^2 = 16.$",
    "Let $a, b, c, d$ be numbers with $|a| = |b| = |c| = |d| = 1$ and $a + b + c + d = 0.$ Find the most that \\[|(a + b)(a + c)(a + d)(b + c)|\\] is.",
    "Se \\[f(n + 1) = (-1)^{n + 1} n - 2f(n)\\] per $n \\ge 1$ e $f(1) = f(1986),$ calcolare \\[f(1) + f(2) + \\dots + f(1985).\\]",
    "Compute $1 - 2 + 3 - 4 + 5 - 6 + 7 - 8 + \\dots + 97 - 98 + 99.$",
    "What is $7 \\cdot 8 + 9 \\cdot 12 - 6^2 + 4^3 - 5 \\cdot 11 + 2 \\cdot 13 - 1$?",
    "$f(x)=\\frac{2x}{x^2-5x-14}$ has asymptotes $x=a$, $x=b$ and $y=c$. Find $a+b+c$.",
    "12 + 34 * 5 - 67 / 8 + 90 - 1 * 2 + 3 - 45 + 6 * 78 - 9",
    "\u8bbe $a$ \u548c $b$ \u4e3a\u5b9e\u6570\uff0c\u6ee1\u8db3 $a + b = 7$\uff0c\u6c42 $a^2 + b^2$ \u7684\u6700\u5c0f\u503c\u3002",
    "\u4e00\u4e2a\u4e09\u89d2\u5f62\u7684\u4e09\u8fb9\u957f\u4e3a 3, 4, 5\uff0c\u6c42\u5176\u9762\u79ef\u3002",
    "\u65b9\u7a0b\u5f0f $x^2 - 5x + 6 = 0$ \u306e\u89e3\u3092\u3059\u3079\u3066\u6c42\u3081\u306a\u3055\u3044\u3002",
    "$a,$ $b,$ \uadf8\ub9ac\uace0 $c$\uac00 \ub2e4\ub978 \uc2e4\uc218\uc77c \ub54c \\[p(x) = \\frac{(x - b)(x - c)}{(a - b)(a - c)}\\]\uc758 \ucc28\uc218\ub97c \uad6c\ud558\uc2dc\uc624.",
    "Find the least positive integer n such that the sum of its digits is 17 and the product of its digits is 24, and say how you know.",
]
PROGRAMS = [
    "    return sum(n for n in range(1, k + 1) if k % n == 0)\n",
    "    if sum(q) > w:\n        return False\n\n    i, j = 0, len(q)-1\n    while i<j:\n        if q[i] != q[j]:\n            return False\n        i+=1\n        j-=1\n    return True\n",
    "    a, b = 0, 1\n    for i in range(n):\n        a, b = b, a + b\n    return a\n",
    "    return [x for x in s if x > 0 and x % 2 == 0 or x < -5]\n",
    "def fib4(n: int):\n    r = [0, 0, 2, 0]\n    if n < 4:\n        return r[n]\n    for _ in range(4, n + 1):\n        r.append(r[-1] + r[-2] + r[-3] + r[-4])\n        r.pop(0)\n    return r[-1]\n",
]
SHORT = [
    "Compute $1 + 2.$",
    "    return x[::-1]\n",
    "\u6c42 $7 + 8$ \u7684\u503c\u3002",
]
ITEMS = [*MATHS, *PROGRAMS]
TERSE = [item for item in ITEMS if len(Text(item).telling) < LEAST]
NO_COPIES = {
    "numbers": " ".join(map(str, range(1, 200))),
    "numbers-in-lines": "\n".join(f"{n}. the {n}th line of the list" for n in range(1, 120)),
    "letters": "\n".join(f"{letter}) {n}" for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz")),
    "table": "\n".join(" | ".join(f"{n * m % 90}" for n in range(1, 12)) for m in range(1, 40)),
    "formulas": "Of (a + b)^2 = a^2 + 2ab + b^2 and (a + b)(a - b) = a^2 - b^2 every pupil knows the first, of (a + b)^3 not the rest. "
    * 3,
    "matrix": "x_1 y_1 z_1 w_1 x_2 y_2 z_2 w_2 x_3 y_3 z_3 w_3 are the values of the four curves at the places 1, 2 and 3. " * 3,
    "program": "for i in range(n):\n    for j in range(i, n):\n        if a[i] > a[j]:\n            a[i], a[j] = a[j], a[i]\nreturn a\n",
    "chinese": "\u6c42\u804c\u8005\u5728\u7f51\u4e0a\u586b\u8868\uff0c\u5de5\u4f5c\u4eba\u5458\u5728 3, 4, 5 \u65e5\u5185\u56de\u590d\uff0c\u5176\u4e2d\u4e09\u4e2a\u5de5\u4f5c\u65e5\u4e3a\u9650\u3002",
}


@pytest.fixture(scope="module")
def index() -> Index:
    return Index.build((f"item-{number}", item) for number, item in enumerate([*ITEMS, *SHORT]))


def test_the_items_are_what_they_are_here_for() -> None:
    assert len(TERSE) > 12
    assert not any(too_short(Text(item)) for item in ITEMS)
    assert all(too_short(Text(item)) for item in SHORT)


@pytest.mark.parametrize("number", range(len(ITEMS)))
def test_a_copy_of_every_item_of_thirteen_units_is_found(number: int, index: Index) -> None:
    item = ITEMS[number]
    pages = [
        item,
        f"Some words before it, as a page has them.\n{item}\nAnd some words behind it.",
        item.upper(),
        f"{NO_COPIES['numbers']}\n{item}",
    ]
    for page in pages:
        assert (index.hit(Text(page)) or ("",))[0] == f"item-{number}", page


def test_short_items_are_no_hits(index: Index) -> None:
    assert [item for item in SHORT if index.hit(Text(item)) or Index.build([("x", item)]).hit(Text(item))] == []


@pytest.mark.parametrize("name", NO_COPIES)
def test_what_looks_like_an_item_is_none(name: str, index: Index) -> None:
    assert index.hit(Text(NO_COPIES[name])) is None


def test_changed_copies_are_found_up_to_the_threshold(index: Index) -> None:
    item = MATHS[1]
    units = len(Text(item).units)
    changed = item.replace("a + c", "a + k").replace("numbers", "complex numbers")
    assert index.hit(Text(f"It is known.\n{changed}")) == ("item-1", units - 1)
    spread = item.replace(" ", " and so the next of them is read as ")  # the same units in order, far from each other
    assert index.hit(Text(spread)) is None
    part = " ".join(item.split()[: len(item.split()) // 3])
    assert index.hit(Text(f"{part} {NO_COPIES['program']}")) is None, "a third of it, and something else"


def test_an_item_of_nothing_that_tells_is_found_whole_only(index: Index) -> None:
    item = MATHS[6]
    assert len(Text(item).telling) == 0
    assert index.hit(Text(f"Which is it? {item}")) == ("item-6", len(Text(item).units))
    assert index.hit(Text(f"Which is it? {item.replace('67', '68')}")) is None


def test_long_items_are_cut(tmp_path: Path) -> None:
    long = "; ".join(f"x_{n % 10} = {n % 7} y - {n * n % 60} z" for n in range(40))
    index = Index.build([("long", f"Solve: {long}")])
    assert len(index.terse.pieces) == 4
    index.save(tmp_path / "index.npz")
    for one in (index, Index.load(tmp_path / "index.npz")):
        assert one.hit(Text(f"A page. {long}")) == ("long", 64)
        assert one.hit(Text(f"A page. {long[len(long) // 2 :]}")) is not None
        assert one.hit(Text(NO_COPIES["table"])) is None
