"""A row's unit tests as sources that run what they define: plain asserts, and tests as pytest, unittest and HumanEval write them.

A source that only defines its tests asserts nothing when it is executed, and any code would pass. So calls are put behind it: of
functions test*, of the methods test* of classes Test* and TestCase, of check(candidate). They are made of the text alone, before there
is a solution that could hide a test. Refused: what only pytest could fill in (fixtures, parametrize), coroutines and generators, which
a call does not run, and a source that asserts and calls nothing. Left out: fixtures that no test names, setup_function.

    tests_of({"tests": "def test_f(): assert f(1) == 2"})        # ["def test_f(): assert f(1) == 2\\ntest_f()"]
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

SETUPS = ("setup", "test_setup_code", "test_imports")  # columns; the latter two are MBPP's
TESTS = ("tests", "test_list", "test")  # MBPP's and HumanEval's behind ours
HOW = "write assert f(1) == 2, or def test_f(): with asserts in it"
PREPARING = ("setUpModule", "setup_module")
NO_CALLS = ("unittest.main", "pytest.main")
Row = Mapping[str, Any]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def tests_of(row: Row) -> list[str]:
    """A row's tests, each with the calls of what it defines. ValueError where it has none, or one that could not fail or not run."""
    entry = row.get("entry_point")
    columns = TESTS if entry is None else ("test", *TESTS)
    tests = _listed(next((row[name] for name in columns if row.get(name) is not None), None))
    if not isinstance(tests, Sequence) or not tests or not all(isinstance(test, str) and test.strip() for test in tests):
        raise ValueError("no tests: the column tests must be a Python source or a list of them")
    trees = [_tree(test, f"test {number}") for number, test in enumerate(tests, start=1)]
    called = {node.func.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    sources = []
    for number, (test, tree) in enumerate(zip(tests, trees, strict=True), start=1):
        others = {node.id for other in trees if other is not tree for node in ast.walk(other) if isinstance(node, ast.Name)}
        try:
            sources.append("\n".join([test, *_calls(tree, called, entry, others)]))
        except ValueError as error:
            raise ValueError(f"test {number}: {error}") from None
    return sources


def setup_of(row: Row) -> list[str]:
    """What stands before the code: sources, or lists of them."""
    found = [_listed(row[name]) for name in SETUPS if row.get(name)]
    return [str(line) for part in found for line in (part if isinstance(part, list) else [part])]


def _listed(value: Any) -> Any:
    """A source as a list of one, and a list as it is, or as tables write it: as JSON."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return [value]
    return found if isinstance(found, list) else [value]


def _tree(source: str, name: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name} is no Python: {error}") from None


def _calls(tree: ast.Module, called: set[str], entry: object, others: set[str]) -> list[str]:
    """The calls behind a source. `called` are the functions that the row's tests call themselves, `others` the names in its others."""
    functions = {node.name: node for node in tree.body if isinstance(node, Function)}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if main := next((node for node in _running(tree.body) if isinstance(node, ast.Call) and ast.unparse(node.func) in NO_CALLS), None):
        raise ValueError(f"{ast.unparse(main)} finds no tests here: leave it out, its tests are called without")
    run: list[ast.stmt] = [*tree.body]
    calls = [f"{name}()" for name in PREPARING if name in functions]
    for name, node in functions.items():
        if name.startswith("test") and not (name in called and _parameters(node)):  # with parameters and called, it is a helper
            _check(name, node)
            calls.append(f"{name}()")
            run += node.body
    for name in classes:
        lines, bodies = _of_class(name, classes)
        calls += lines
        run += bodies
    if "check" in functions and "check" not in called:
        needs = bool(_parameters(functions["check"]))
        if needs and not (isinstance(entry, str) and entry.strip()):
            raise ValueError("check(candidate) is never called: name in the column entry_point what it is called with")
        calls.append(f"check({entry if needs else ''})")
        _tree(calls[-1], f"entry_point {entry!r}")
        run += functions["check"].body
    prepared = {*functions, *classes, *_bound(tree.body)}
    if not any(isinstance(node, ast.Assert | ast.Call | ast.Raise) for node in _running(run)) and not prepared & others:
        raise ValueError(f"asserts and calls nothing, so that any code would pass it; {HOW}")
    return calls


def _of_class(name: str, classes: Mapping[str, ast.ClassDef]) -> tuple[list[str], list[ast.stmt]]:
    """The calls of a class's tests and what they run; none where pytest would not collect it."""
    lineage = _lineage(name, classes)
    methods = {node.name: node for one in reversed(lineage) for node in one.body if isinstance(node, Function)}
    tests = {method: node for method, node in methods.items() if method.startswith("test")}
    of_unittest = any(ast.unparse(base).endswith("TestCase") for one in lineage for base in one.bases)
    if not tests or not (of_unittest or (name.startswith("Test") and "__init__" not in methods)):
        return [], []
    for method, node in tests.items():
        _check(f"{name}.{method}", node, of_method=True)
    bodies = [line for node in tests.values() for line in node.body]
    if of_unittest:
        return [f"{name}.setUpClass()", *(f"{name}({method!r}).debug()" for method in tests), f"{name}.tearDownClass()"], bodies
    calls = [f"{name}.setup_class()"] if "setup_class" in methods else []
    for method in tests:
        before, after = (
            [f"its_case.{other}({f'its_case.{method}' if _parameters(methods[other], True) else ''})"] if other in methods else []
            for other in ("setup_method", "teardown_method")
        )
        calls += [f"its_case = {name}()", *before, f"its_case.{method}()", *after]
    return calls + ([f"{name}.teardown_class()"] if "teardown_class" in methods else []), bodies


def _lineage(name: str, classes: Mapping[str, ast.ClassDef]) -> list[ast.ClassDef]:
    """A class and those that it inherits from, as far as the source defines them."""
    found: list[ast.ClassDef] = []
    todo = [name]
    while todo:
        node = classes.get(todo.pop(0))
        if node is not None and node not in found:
            found.append(node)
            todo += [base.id for base in node.bases if isinstance(base, ast.Name)]
    return found


def _check(name: str, node: Function, of_method: bool = False) -> None:
    """ValueError for a test that a call without arguments would not run."""
    if needs := _parameters(node, of_method):
        raise ValueError(
            f"{name} takes {', '.join(needs)}, which nothing here fills in (fixtures, parametrize); write it without parameters"
        )
    if isinstance(node, ast.AsyncFunctionDef) or any(isinstance(one, ast.Yield | ast.YieldFrom) for one in _running(node.body)):
        raise ValueError(f"{name} is a coroutine or a generator, which a call does not run; write it as a plain function")


def _parameters(node: Function, of_method: bool = False) -> list[str]:
    """The parameters without a default, but for a method's own object."""
    positional = [*node.args.posonlyargs, *node.args.args]
    needed = positional[: len(positional) - len(node.args.defaults)]
    own = of_method and not any(ast.unparse(one) == "staticmethod" for one in node.decorator_list)
    keywords = [one for one, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if default is None]
    return [one.arg for one in (*needed[own:], *keywords)]


def _running(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The nodes that run where these statements do: without functions, classes, and what only a program of its own would run."""
    todo = [*body]
    while todo:
        node = todo.pop()
        is_main = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "'__main__' == __name__")
        if not isinstance(node, Function | ast.ClassDef | ast.Lambda) and not is_main:
            yield node
            todo += ast.iter_child_nodes(node)


def _bound(body: Iterable[ast.AST]) -> Iterator[str]:
    """The names that statements assign and import."""
    for node in _running(body):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
