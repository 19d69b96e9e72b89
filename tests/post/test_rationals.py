"""Numbers of answers: every way of writing them that models use, and what must not be taken for one."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.post.checks.rationals import exact, readings, shown


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("3 + 4 = 7", "7"),
        ("10-7=3", "3"),
        ("10 - 7", "7"),
        ("it is -7", "-7"),
        ("x = - 7", "-7"),
        ("x = \u22127", "-7"),
        ("(-7)", "-7"),
        ("-$5.50", "-11/2"),
        ("$-5.50", "-11/2"),
        ("costs $1,234,567.89 in all", "123456789/100"),
        ("1.234.567,5", "2469135/2"),
        ("12,34,567 rupees", "1234567"),
        ("1\u202f234\u202f567", "1234567"),
        ("1'234'567", "1234567"),
        ("1{,}234", "1234"),
        (r"1\,234\,567", "1234567"),
        ("1 234 567", "1234567"),
        ("3,5 kg", "7/2"),
        ("3.50", "7/2"),
        (".5", "1/2"),
        ("3/4", "3/4"),
        ("1 1/2 cups", "3/2"),
        ("1\u00bd cups", "3/2"),
        ("\u00be", "3/4"),
        (r"$\frac{3}{4}$", "3/4"),
        (r"\dfrac34", "3/4"),
        (r"-\frac{3}{4}", "-3/4"),
        (r"1\frac{1}{2}", "3/2"),
        (r"so \boxed{18} apples, since 6 * 3 works", "18"),
        (r"\boxed{\frac{7}{2}}", "7/2"),
        (r"\boxed{\text{about } 12 \text{ km}^2}", "12"),
        (r"\boxed{x^2} then 9", "9"),
        ("She has 72.\n#### 72\n", "72"),
        ("#### 1,000", "1000"),
        ("25 m^2", "25"),
        ("25 m\u00b2", "25"),
        ("25 cm^{3}", "25"),
        ("5 g of CO2", "5"),
        ("90 km/h", "90"),
        ("Rs50", "50"),
        ("USD 50", "50"),
        ("EUR50", "50"),
        ("\u7b54\u6848\u662f42\u3002", "42"),
        ("\u7b54\u6848\u662f\uff14\uff12\u3002", "42"),
        ("\u0627\u0644\u062c\u0648\u0627\u0628 \u0664\u0662", "42"),
        ("\u0661\u066c\u0662\u0663\u0664\u066b\u0665", "2469/2"),
        ("\u067e\u0627\u0633\u062e: \u06f4\u06f2", "42"),
        ("\u0909\u0924\u094d\u0924\u0930 \u096a\u0968", "42"),
        ("\u0e04\u0e33\u0e15\u0e2d\u0e1a\u0e04\u0e37\u0e2d\u0e54\u0e52", "42"),
        ("\u1014\u1036\u1015\u102b\u1010\u103a \u1044\u1042", "42"),
        ("**42**", "42"),
        ("1.5e3", "1500"),
        (r"1.5 \times 10^{3} m", "1500"),
        ("2 * 10^-2", "1/50"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("00012", "12"),
    ],
)
def test_the_last_number(text: str, number: str) -> None:
    assert Fraction(number) in readings(text), shown(readings(text))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1,234", {"1234", "617/500"}),
        ("1.234", {"1234", "617/500"}),
        ("0.125", {"1/8"}),
        ("12.3456", {"30864/2500"}),
        ("50%", {"50", "1/2"}),
        (r"50\%", {"50", "1/2"}),
        ("5 123", {"5123", "123"}),
        ("5-3", {"3"}),
        ("no number here", set()),
        ("CO2 and x1 and mp3", set()),
        ("7 over nothing, 7/0", {"7"}),
        ("", set()),
        ("9" * 500, set()),
        ("1e99999999999", set()),
    ],
)
def test_readings_are_these_and_no_others(text: str, numbers: set[str]) -> None:
    assert readings(text) == {Fraction(number) for number in numbers}


@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=1000))
def test_what_python_writes_is_read_back(value: Fraction) -> None:
    assert value in readings(f"therefore {value}")
    assert value in exact(str(value))


@given(st.integers(-(10**12), 10**12), st.sampled_from([",", "\u00a0", "'", "_", "\u202f"]))
def test_thousands(value: int, separator: str) -> None:
    assert Fraction(value) in readings(f"{value:,}".replace(",", separator))


@given(st.text(max_size=200))
def test_any_text_is_read(text: str) -> None:
    readings(text)
    readings(f"\\boxed{{{text}")


@pytest.mark.parametrize("text", ["1," * 20_000, "\\boxed{" * 5_000, "1 " * 20_000, "- " * 20_000, "\\frac" * 10_000, "{" * 50_000])
def test_long_texts_are_read_in_a_moment(text: str) -> None:
    readings(text)  # the suite's time limit would tell


def test_references() -> None:
    assert exact(7) == exact("7") == exact(7.0) == {Fraction(7)}
    assert exact(0.1) == {Fraction(1, 10)}
    for wrong in (True, None, [1], "none", float("nan"), float("inf")):
        with pytest.raises(ValueError, match="no number"):
            exact(wrong)
