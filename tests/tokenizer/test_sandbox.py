"""Templates that loop, grow, reach for Python or are wrong: each ends with a clear error, and the next rendering works."""

from __future__ import annotations

import os
import pickle
import sys
import threading

import pytest

from qwen2.tokenizer.sandbox import JinjaSandbox, Limits


@pytest.fixture(scope="module")
def sandbox():
    sandbox = JinjaSandbox(Limits(seconds=20))
    yield sandbox
    sandbox.close()


LOOP = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"


def test_an_endless_loop_is_stopped_and_the_next_rendering_works():
    sandbox = JinjaSandbox(Limits(seconds=0.5))
    assert sandbox.render("{{ x }}", {"x": 1}) == "1"
    with pytest.raises(ValueError, match=r"^the model's chat template ran longer than 0.5 s and was stopped$"):
        sandbox.render(LOOP, {})
    assert sandbox.render("{{ x }}", {"x": 2}) == "2"


def test_it_works_from_many_threads():
    sandbox, results = JinjaSandbox(), {}

    def work(i: int) -> None:
        for k in range(10):
            results[i, k] = sandbox.render("{{ i }}-{{ k }}", {"i": i, "k": k})

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {(i, k): f"{i}-{k}" for i in range(4) for k in range(10)}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'a' * 10**9 }}", "a repetition of more than"),
        ("{{ 10**9 * [1] }}", "a repetition of more than"),
        ("{{ 10**(10**10) }}", "a power of more than 4096 bits"),
        ("{{ x**10 }}", "a power of more than 4096 bits"),
        ("{{ 'x'|center(10**9) }}", "a width of more than"),
        ("{{ 'x'|indent(10**9) }}", "an indentation of more than 1000"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}", "it wrote more than 1677721"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it is nested too deeply"),
        ("{{ ''.__class__ }}", "access to attribute '__class__' of a str is not allowed"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__'"),
        ("{{ ''['__class__'] }}", "access to attribute '__class__'"),
        ("{{ ''|attr('__class__') }}", "access to attribute '__class__'"),
        ("{{ ['']|map(attribute='__class__')|list }}", "access to attribute '__class__'"),
        ("{{ '{0.__class__}'.format('') }}", "access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__ }}", "access to attribute '__init__'"),
        ("{{ self.__init__ }}", "access to attribute '__init__'"),
        ("{{ lipsum.__globals__['os'] }}", "access to attribute '__globals__'"),
        ("{{ items.append(1) }}", "access to attribute 'append' of a list is not allowed"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('roles must alternate') }}", "failed: roles must alternate"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("\n{% if %}", "line 2: Expected an expression"),
        ("{% for %}", "line 1: "),
        ("{{ open('/etc/passwd') }}", "'open' is undefined"),
        ("{{ cycler() }}", "RuntimeError: at least one item has to be provided"),
        ("{{ 5|int(base=99) }}{{ [1]|first|nofilter }}", "line 1: No filter named 'nofilter'"),
    ],
)
def test_what_a_template_may_not_do(sandbox, source, message):
    with pytest.raises(ValueError, match=r"^the model's chat template failed: ") as caught:
        sandbox.render(source, {"x": 10**1000, "items": [1]})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's address space reliably")
def test_memory_is_bounded():
    sandbox = JinjaSandbox(Limits(seconds=30, memory=256 << 20))
    growing = "{% set ns = namespace(s='ab') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    filling = ("{{ '%999999999d'|format(1) }}", "{{ '{:>999999999}'.format(1) }}", "{{ ('ab' * 99)|replace('', 'x' * 9999999) }}")
    for source in (growing, *filling):
        with pytest.raises(ValueError, match=r"chat template (failed: it used more memory than it may|broke its process)"):
            sandbox.render(source, {})
    assert sandbox.render("ok", {}) == "ok"


def test_the_settings_are_the_references(sandbox):
    source = (
        "{% for x in xs %}\n  {% if x == 3 %}\n    {% break %}\n  {% endif %}\n{{ x|tojson }},\n{% endfor %}\n"
        "{{ {'ü': '<é>'}|tojson }}|{{ {'a': 1}|tojson(indent=2) }}|{{ strftime_now('%Y')|length }}|{{ none_given }}|"
        "{% generation %}g{{ xs[0] }}{% endgeneration %}"
    )
    assert sandbox.render(source, {"xs": [1, "a", 3, 4]}) == '1,\n"a",\n{"ü": "<é>"}|{\n  "a": 1\n}|4||g1'


def test_a_copy_starts_its_own_process():
    sandbox = JinjaSandbox(Limits(seconds=7))
    sandbox.render("x", {})
    copy = pickle.loads(pickle.dumps(sandbox))
    assert copy.limits == sandbox.limits
    assert copy.render("y", {}) == "y"


def test_a_killed_process_is_replaced():
    sandbox = JinjaSandbox()
    sandbox.render("x", {})
    process = sandbox._process
    process.kill()
    process.wait()
    assert sandbox.render("y", {}) == "y"
    assert sandbox._process is not process


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_uses_a_worker_of_its_own():
    sandbox = JinjaSandbox()
    sandbox.render("x", {})
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, sandbox.render("child", {}).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100) == b"child"
    assert sandbox.render("parent", {}) == "parent"


def test_closing_ends_the_process():
    sandbox = JinjaSandbox()
    sandbox.render("x", {})
    process = sandbox._process
    sandbox.close()
    assert process.poll() is not None
