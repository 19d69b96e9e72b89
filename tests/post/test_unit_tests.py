"""Unit tests however they are written: wrong code fails each form, and what would assert nothing is refused."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from qwen2.post.checks import unit_tests
from qwen2.post.checks.checkers import TestChecker, Verdict
from qwen2.post.checks.sandbox import Limits

UNIX = pytest.mark.skipif(sys.platform == "win32", reason="a sandbox needs Linux or macOS, and says so")
CHECK = "def check(candidate):\n    assert candidate(1) == 2"
CASE = """
import unittest
class Base(unittest.TestCase):
    def test_inherited(self):
        self.assertEqual(f(1), 2)
class Sums(Base):
    @classmethod
    def setUpClass(cls):
        cls.three = 3
    def setUp(self):
        self.two = 2
    def test_two(self):
        for given in (1, 2):
            with self.subTest(given=given):
                self.assertEqual(f(given), given + 1)
        self.assertEqual((self.two, self.three), (2, 3))
if __name__ == "__main__":
    unittest.main()
"""
CLASS = """
class TestSums:
    def setup_class(cls):
        cls.one = 1
    setup_class = classmethod(setup_class)
    def setup_method(self, method):
        self.name = method.__name__
    def teardown_method(self):
        assert self.name == "test_two"
    def test_two(self):
        assert f(self.one) == 2
    @staticmethod
    def test_alone():
        assert f(2) == 3
"""
FORMS: dict[str, dict[str, Any]] = {
    "functions": {"tests": "def test_one():\n    assert True\ndef test_two(given=1):\n    assert f(given) == 2"},
    "a list of functions": {"tests": ["def test_one():\n    assert f(1) == 2", "def test_two():\n    assert f(2) == 3"]},
    "a helper beside its test": {"tests": "def test_of(x, y):\n    assert f(x) == y\ndef test_all():\n    test_of(1, 2)"},
    "a helper that the source calls": {"tests": "def test_of(x, y):\n    assert f(x) == y\ntest_of(1, 2)"},
    "what one source prepares": {"tests": ["import math", "expected = math.trunc(2.5)", "assert f(1) == expected"]},
    "a module's preparation": {"tests": "def setup_module():\n    global two\n    two = 2\ndef test_f():\n    assert f(1) == two"},
    "a list as JSON": {"test_list": json.dumps(["assert f(1) == 2", "def test_f(): assert f(2) == 3"])},
    "unittest": {"tests": CASE},
    "a class": {"tests": CLASS.replace('assert self.name == "test_two"', "assert self.name")},
    "HumanEval": {"test": CHECK, "entry_point": "f"},
    "check among tests": {"tests": CHECK, "entry_point": "f"},
    "check that is called": {"tests": [CHECK, "check(f)"], "entry_point": None},
    "check of nothing": {"test": "def check():\n    assert f(1) == 2"},
}


@pytest.fixture(scope="module")
def coder() -> TestChecker:
    return TestChecker(Limits(seconds=30.0))


@UNIX
@pytest.mark.parametrize("form", FORMS)
def test_every_form_tells_right_from_wrong(form: str, coder: TestChecker) -> None:
    row, count = FORMS[form], len(unit_tests.tests_of(FORMS[form]))
    coder.prepare(row)
    assert coder.check("def f(x): return x + 1", row) == Verdict(True, f"{count} of {count} tests passed")
    for wrong in ("def f(x): return x", "def f(x): raise RuntimeError", "def test_f(): pass\ndef check(*_): pass", "x = 1"):
        assert coder.check(wrong, row).right is False, wrong


@UNIX
def test_what_is_said_of_a_wrong_answer(coder: TestChecker) -> None:
    said = {form: coder.check("def f(x): return 3", FORMS[form]).said.partition("; ")[2] for form in ("functions", "unittest", "HumanEval")}
    assert said == {
        "functions": "test 1: AssertionError: assert f(given) == 2",
        "unittest": "test 1: AssertionError: 3 != 2",
        "HumanEval": "test 1: AssertionError: assert candidate(1) == 2",
    }
    failing_after = {"tests": CLASS}  # its teardown asserts, of the second test falsely
    assert "test 1: AssertionError: assert self.name" in coder.check("def f(x): return x + 1", failing_after).said


@UNIX
@pytest.mark.parametrize(
    "code",
    [
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None",
        "import unittest\nunittest.TestCase.debug = lambda self: None",
        "import unittest.case\nunittest.case.TestCase.assertEqual.__code__ = (lambda *a: None).__code__",
        "import sys, types\nclass Case:\n    def __init__(self, name): pass\n    def debug(self): pass\n    setUpClass = tearDownClass = debug\n"
        "sys.modules['unittest'] = types.SimpleNamespace(TestCase=Case)",
        "import builtins\nbuiltins.__import__ = lambda *a: None",
        "import builtins\nbuiltins.__build_class__ = lambda *a: None",
        "open('unittest.py', 'w').write('TestCase = object')",
        "import unittest\ndef f(x): raise unittest.SkipTest('later')",
        "def f(x): raise SystemExit(0)",
    ],
)
def test_a_solution_that_meddles_with_unittest(code: str, coder: TestChecker) -> None:
    assert coder.check(code if "def f" in code else f"{code}\ndef f(x): return x", FORMS["unittest"]).right is False


@UNIX
def test_a_solution_may_use_unittest_itself(coder: TestChecker) -> None:
    code = "import unittest\nfrom unittest import mock\nclass Mine(unittest.TestCase): pass\ndef f(x): return x + 1"
    mocked = {"tests": "from unittest import mock\ndef test_f():\n    with mock.patch('builtins.print') as printed:\n        f(1)\n    assert not printed.called"}  # fmt: skip
    assert coder.check(code, FORMS["unittest"]).right
    assert coder.check(code, mocked).right
    assert not coder.check("def f(x): print(x)", mocked).right


@UNIX
@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"tests": "def test_f(tmp_path):\n    assert f(1)"}, r"^test 1: test_f takes tmp_path, which nothing here fills in \(fixtures"),
        ({"tests": ["assert f(1)", "class TestF:\n    def test_g(self, x, *, y): assert x"]}, r"^test 2: TestF.test_g takes x, y, which"),
        ({"tests": "async def test_f():\n    assert f(1)"}, r"^test 1: test_f is a coroutine or a generator, which a call does not run"),
        ({"tests": "def test_f():\n    yield 1\n    assert f(1)"}, r"test_f is a coroutine or a generator"),
        (
            {"tests": "x = 1"},
            r"^test 1: asserts and calls nothing, so that any code would pass it; write assert f\(1\) == 2, or def test_f",
        ),
        ({"tests": ["x = 1", "assert f(1)"]}, r"^test 1: asserts and calls nothing"),
        ({"tests": "['assert f(1) == 2']"}, r"asserts and calls nothing"),
        ({"tests": "# none yet"}, r"asserts and calls nothing"),
        ({"tests": "def test_f():\n    pass"}, r"asserts and calls nothing"),
        ({"tests": "def judge():\n    assert f(1) == 2"}, r"asserts and calls nothing"),
        ({"tests": "def judge():\n    assert f(1) == 2\nif __name__ == '__main__':\n    judge()"}, r"asserts and calls nothing"),
        ({"tests": "class Sums:\n    def test_f(self): assert f(1)"}, r"asserts and calls nothing"),
        ({"tests": "class TestSums:\n    def __init__(self): pass\n    def test_f(self): assert f(1)"}, r"asserts and calls nothing"),
        ({"tests": "import unittest\nunittest.main()"}, r"^test 1: unittest.main\(\) finds no tests here: leave it out"),
        ({"tests": CHECK}, r"^test 1: check\(candidate\) is never called: name in the column entry_point what it is called with"),
        ({"test": CHECK, "entry_point": None}, r"check\(candidate\) is never called"),
        ({"tests": ["x = 1", "assert ="]}, r"^test 2 is no Python: invalid syntax"),
        ({"test": CHECK, "entry_point": "f("}, r"^test 1: entry_point 'f\(' is no Python"),
    ],
)
def test_what_could_not_fail_or_not_run_is_refused(row: dict[str, Any], why: str, coder: TestChecker) -> None:
    with pytest.raises(ValueError, match=why):
        coder.prepare(row)


def test_rows_without_tests() -> None:
    for row in (
        {},
        {"tests": []},
        {"tests": [1]},
        {"tests": "  "},
        {"tests": None},
        {"tests": "[]"},
        {"test_list": "[1]"},
        {"entry_point": "f"},
    ):
        with pytest.raises(ValueError, match="no tests"):
            unit_tests.tests_of(row)


def test_a_setup_as_json() -> None:
    assert unit_tests.setup_of({"test_imports": '["import math"]', "setup": "x = 1", "test_setup_code": ""}) == ["x = 1", "import math"]
