"""Models of one's own in the store: what they are made of, what they change, and that the store is whole whenever one is killed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2 import LLM, SamplingParams
from qwen2.config import tiny
from qwen2.weights.blobs import Blobs, parse_digest
from qwen2.weights.export import to_gguf
from qwen2.weights.model import load
from qwen2.weights.modelfile import Modelfile, parse
from qwen2.weights.store import Store
from tests.conftest import tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=10)
HELLO = [{"role": "user", "content": "Hello"}]
JINJA = "{% for m in messages %}<|im_start|>{{ m.role }}!{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "mine.gguf"
    to_gguf(tiny_model(tiny(context=512)), path, "F32")
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def store(home: Path, tiny_folder: Path) -> Store:
    """With a model whose files are the store's own."""
    store = Store(home)
    files = {}
    for path in sorted(tiny_folder.iterdir()):
        files[path.name] = upload(store, path.read_bytes())
    store.create("base:one", Modelfile(), files)
    return store


def upload(store: Store, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    coming = Blobs(store.home).upload(digest, len(data))
    coming.append(data[:7])
    coming.finish(data[7:])
    coming.close()
    return digest


def test_a_file_takes_no_disk_and_keeps_its_digest(home: Path, gguf: Path) -> None:
    store = Store(home)
    model = store.create("mine", parse("FROM ./mine.gguf\nSYSTEM Be brief."), folder=gguf.parent)
    assert (model.name, model.path, model.digest) == ("mine:latest", gguf, hashlib.sha256(gguf.read_bytes()).hexdigest())
    assert sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) < 4096
    assert model.made == Modelfile("mine.gguf", "Be brief.")
    assert store.list() == (model,)


def test_what_it_says_is_what_the_model_does(store: Store, home: Path) -> None:
    store.create("made", parse(
        'FROM base:one\nSYSTEM Be brief\nMESSAGE user a\nMESSAGE assistant b\nPARAMETER temperature 0.5\nPARAMETER seed 3\n'
        'PARAMETER num_predict 10\nPARAMETER presence_penalty 0.5\nPARAMETER num_ctx 100\nPARAMETER stop "\0"'
    ))  # fmt: skip
    made, base = LLM("made", home=home), LLM("base:one", home=home)
    before = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    output = made.chat(HELLO)
    same = SamplingParams(temperature=0.5, seed=3, max_tokens=10, presence_penalty=0.5, stop="\0", context=100)
    right = base.chat([*before, *HELLO], same)
    assert (output.token_ids, output.params) == (right.token_ids, right.params)
    own = [{"role": "system", "content": "Mine"}, *HELLO]
    asked = SamplingParams(temperature=0, max_tokens=5, seed=1, presence_penalty=0, stop=(), context=200)
    other = made.chat(own, asked)  # a request goes before the Modelfile, value by value
    assert other.token_ids == base.chat([own[0], *before[1:], *HELLO], asked).token_ids
    assert (other.params.presence_penalty, other.params.stop, other.params.context) == (0, (), 200)
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens and num_ctx is 100: raise it, or shorten the prompt"):
        made.chat([{"role": "user", "content": "x " * 100}])
    made.chat([{"role": "user", "content": "x " * 100}], SamplingParams(max_tokens=1, context=1000))


def test_a_template_of_ones_own(store: Store, home: Path) -> None:
    store.create("made", parse(f'FROM base:one\nTEMPLATE """{JINJA}"""'))
    model = load("made", home=home)
    assert model.template.render(HELLO).text == "<|im_start|>user!Hello<|im_end|><|im_start|>"
    with pytest.raises(ValueError, match=r"^TEMPLATE: the model's chat template failed: .*"):
        store.create("bad", parse("FROM base:one\nTEMPLATE {% for m in %}{{ messages }}"))
    with pytest.raises(ValueError, match=r"^TEMPLATE: what a person says does not appear in it"):
        store.create("bad", parse("FROM base:one\nTEMPLATE Good evening"))
    with pytest.raises(ValueError, match=r"^num_ctx 1,000,000: the model's window is"):
        store.create("bad", parse("FROM base:one\nPARAMETER num_ctx 1000000"))
    assert not store.has("bad")
    assert not (home / "partial" / "bad").exists() or not any((home / "partial" / "bad").iterdir())


def test_made_of_made_and_the_base_may_go(store: Store, home: Path) -> None:
    before = LLM("base:one", home=home).chat(HELLO, GREEDY).text
    size = sum({stat.st_ino: stat.st_size for stat in (path.stat() for path in home.rglob("*") if path.is_file())}.values())
    store.create("first", parse("FROM base:one\nSYSTEM one\nPARAMETER top_k 5"))
    second = store.create("second", parse("FROM first\nPARAMETER temperature 0.1"))
    assert second.made == Modelfile("first:latest", "one", parameters={"top_k": 5, "temperature": 0.1})
    again = sum({stat.st_ino: stat.st_size for stat in (path.stat() for path in home.rglob("*") if path.is_file())}.values())
    assert again - size < 8192  # no weights were copied
    copied = store.copy("second", "third")
    assert copied.made == second.made
    for name in ("base:one", "first", "second"):
        assert store.remove(name) < 8192  # the files stay for as long as a model has them
    assert [model.name for model in store.list()] == ["third:latest"]
    assert LLM("third", home=home).chat([{"role": "system", "content": "You are a helpful assistant."}, *HELLO], GREEDY).text == before
    assert store.remove("third") > 8192


def test_its_modelfile_makes_it_again(store: Store) -> None:
    made = store.create("made", parse(f'FROM base:one\nSYSTEM "x"\nPARAMETER stop a\nTEMPLATE """{JINJA}"""\nMESSAGE user hi\nLICENSE MIT'))
    again = store.create("again", parse(made.made.text("made")))
    assert again.made == Modelfile(
        "made:latest", *[getattr(made.made, name) for name in ("system", "template", "parameters", "messages", "licence")]
    )
    itself = store.create("made", parse(made.made.text("made")))
    assert itself.files == made.files


def test_made_again_it_replaces_what_was_there(store: Store, home: Path, gguf: Path) -> None:
    first = store.create("mine", parse("FROM base:one\nSYSTEM one"))
    held = store.hold("mine")
    second = store.create("mine", parse("FROM base:one\nSYSTEM two"))
    assert (first.files, second.made.system) == (second.files, "two")
    quantized = store.create("mine", parse("FROM base:one"), mix="Q8_0")
    assert quantized.part is not None
    assert [file.path for file in quantized.files] == ["mine-latest-q8_0.gguf"]
    assert {path.name for path in quantized.folder.iterdir()} == {"manifest.json", quantized.part}
    assert len(LLM("mine", home=home).chat(HELLO, GREEDY).token_ids) > 0
    outside = store.create("mine", parse(f"FROM {gguf}"))
    assert [path.name for path in outside.folder.iterdir()] == ["manifest.json"]
    back = store.create("mine", parse("FROM base:one"))
    assert sorted(file.path for file in back.files) == sorted(file.path for file in first.files)
    assert store.copy("mine", "copy").path.exists()
    held.release()


def test_quantizing_tells_how_far_it_is(store: Store, home: Path) -> None:
    steps = []
    model = store.create("small", parse("FROM base:one\nSYSTEM one"), mix="q8_0", watch=steps.append)
    assert (model.format, model.made.system, model.path.suffix) == ("GGUF Q8_0", "one", ".gguf")
    assert "quantizing to q8_0" in [step.note for step in steps]
    done = [step.done for step in steps if step.total]
    assert done == sorted(done)
    assert done[-1] == next(step.total for step in steps if step.total)
    with pytest.raises(ValueError, match="q3_x"):
        store.create("small", parse("FROM base:one"), mix="q3_x")
    assert store.get("small") == model


@pytest.mark.parametrize(("text", "message"), [
    ("FROM nothing:here", "no model is named 'nothing:here'"),
    ("FROM ./nothing.gguf", r"FROM \./nothing\.gguf: no such file or folder, seen from /"),
    ("FROM Lab/Foo", "FROM Lab/Foo: no such file or folder; of the hubs' names only those of qwen2 list --all"),
    ("FROM ./text.gguf", "not a GGUF file"),
])  # fmt: skip
def test_what_it_cannot_be_made_of(store: Store, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises((ValueError, OSError), match=message):
        store.create("new", parse(text), folder=tmp_path)
    assert not store.has("new")


@pytest.mark.parametrize(
    "name", ["../evil", "a/b", "a:../b", "..", "qwen2:7b", "qwen2", "a:b:c", "C:\\x", "con", "x" * 65, "", "a\0b", "%2e%2e", "a\n"]
)
def test_names_by_the_grammar_only(store: Store, name: str) -> None:
    with pytest.raises(ValueError):
        store.create(name, parse("FROM base:one"))
    assert {path.name for path in store.home.iterdir()} <= {"models", "partial", "locks", "holds", "blobs"}


@pytest.mark.parametrize(
    "name", ["../x.gguf", "a/b.gguf", "/etc/passwd", "..", ".hidden.gguf", "a\\b.gguf", "x\0.gguf", "a b.gguf", "", "notes.txt", "x.py"]
)
def test_names_of_uploaded_files_by_the_grammar_only(store: Store, name: str, gguf: Path) -> None:
    digest = upload(store, gguf.read_bytes())
    with pytest.raises(ValueError, match=r"^files: "):
        store.create("new", Modelfile(), {name: digest})


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "sha256:",
        "sha256:" + "0" * 63,
        "sha256:" + "0" * 65,
        "sha256:" + "A" * 64,
        "sha256:../../" + "0" * 58,
        "md5:" + "0" * 64,
        "0" * 64,
        "sha256:" + "0" * 64 + "\n",
        "sha256:" + "\u0660" * 64,
    ],
)
def test_digests_by_the_grammar_only(digest: str) -> None:
    with pytest.raises(ValueError, match="is no digest"):
        parse_digest(digest)


def test_uploads_are_verified_found_and_swept(store: Store, gguf: Path) -> None:
    data = gguf.read_bytes()
    blobs = Blobs(store.home)
    wrong = blobs.upload("0" * 64)
    with pytest.raises(ValueError, match=r"have the digest sha256:[0-9a-f]{64}, not sha256:0000"):
        wrong.finish(data)
    wrong.close()
    assert not any(blobs.folder.iterdir())
    digest = upload(store, data)
    assert store.blob(digest) == blobs.path(digest)
    store.create("new", Modelfile(), {"mine.gguf": digest})
    assert not blobs.path(digest).exists()  # it is the model's now, and found there
    assert store.blob(digest) == store.get("new").path
    kept, old = upload(store, b"young"), upload(store, b"old")
    os.utime(blobs.path(old), (1, 1))
    draft = blobs.upload("1" * 64)
    os.utime(draft.draft, (1, 1))
    blobs.sweep()
    assert list(blobs.folder.iterdir()) == [blobs.path(kept)]
    with pytest.raises(OSError, match="not enough space"):
        blobs.upload("1" * 64, 1 << 60)


KILLED = """
import os, signal, sys
from pathlib import Path
from qwen2.weights.modelfile import parse
from qwen2.weights.store import Store

home, text = Path(sys.argv[1]), sys.argv[2]
store, real = Store(home), {name: getattr(os, name) for name in ("replace", "link", "fsync", "unlink", "mkdir", "rmdir")}

def creation(at):  # killed at this call to the system
    count = 0
    def counted(function):
        def call(*given, **named):
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)
        return call
    for name, function in real.items():
        setattr(os, name, counted(function))
    store.create("mine", parse(text))
    os._exit(0)

for at in range(1, 60):
    store.create("mine", parse("FROM base:one\\nSYSTEM one"))
    child = os.fork()
    if child == 0:
        creation(at)
    status = os.waitpid(child, 0)[1]
    model = Store(home).get("mine")
    assert not model.gone, at
    assert [one.name for one in store.list()] == ["base:one", "mine:latest", "other:latest"], at
    print(at, model.made.system, "whole" if status == 0 else "killed" if os.WIFSIGNALED(status) else "failed")
    if not os.WIFSIGNALED(status):
        break
"""


@pytest.mark.parametrize(
    "text", ["FROM base:one\nSYSTEM two", "FROM {gguf}\nSYSTEM two", "FROM other\nSYSTEM two"], ids=["same", "outside", "other"]
)
def test_killed_at_any_step_the_store_is_whole(store: Store, gguf: Path, text: str) -> None:
    """One of the two, with its files, wherever the process is killed; the next creation goes through and clears up."""
    store.create("other", Modelfile(), {"mine.gguf": upload(store, gguf.read_bytes())})
    given = [sys.executable, "-c", KILLED, str(store.home), text.format(gguf=gguf)]
    done = subprocess.run(given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = [line.split() for line in done.stdout.splitlines()]
    assert [ended for _, _, ended in steps] == ["killed"] * (len(steps) - 1) + ["whole"]
    systems = [system for _, system, _ in steps]
    assert systems == sorted(systems)  # the one, up to some step, and from there on the two
    assert {"one", "two"} == set(systems)
    last = store.create("mine", parse("FROM base:one"))
    assert {path.name for path in last.folder.iterdir()} == {
        "manifest.json",
        *([last.part] if last.part else [file.path for file in last.files]),
    }
    assert not (store.home / "partial" / "mine" / "latest").exists()
