"""The command line: verbs of the store end to end, one line for every error, start-up without torch, completion."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from cyclopts.completion.detect import ShellDetectionError

from qwen2.cli.app import VERBS, main, make_app, one_line, take_debug
from qwen2.cli.pull import ensure
from qwen2.weights import registry
from qwen2.weights.partial import Partial
from qwen2.weights.registry import ENTRIES
from qwen2.weights.store import Store
from tests.weights import places
from tests.weights.places import DATA, FILE, NAME

HEAVY = {"torch", "numpy", "transformers", "tokenizers", "httpx", "huggingface_hub"}
Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with nothing in it, and a file to pull from."""
    monkeypatch.setenv("QWEN2_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QWEN2_DEBUG", raising=False)
    monkeypatch.setitem(registry.ENTRIES, NAME, places.entry())
    (tmp_path / FILE).write_bytes(DATA)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def run(capsys: Out, *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def error(capsys: Out, *arguments: str) -> str:
    """The one line that the command fails with."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("qwen2: ")
    assert err.count("\n") == 1
    return err[len("qwen2: ") : -1]


# ------------------------------------------------------------------------------------------------------------------- the store


def test_pull_list_cp_rm(capsys: Out) -> None:
    short = places.sha256(DATA)[:12]
    code, out, err = run(capsys, "pull", NAME, "--from", FILE)
    assert (code, out) == (0, f"{NAME} is here: 2.1 MB, GGUF Q8_0, sha256 {short}, from {FILE}\n")
    assert f"{NAME}: 2.1 MB of 2.1 MB\n" in err
    assert run(capsys, "pull", NAME) == (0, f"{NAME} is already here: 2.1 MB, GGUF Q8_0, sha256 {short}, from {FILE}\n", "")
    assert run(capsys, "cp", NAME, "mine:a")[:2] == (0, f"mine:a is here: 2.1 MB, sha256 {short}, no disk used\n")
    rows = json.loads(run(capsys, "list", "--json")[1])
    assert [row["name"] for row in rows] == ["mine:a", NAME]
    assert {(row["size"], row["sha256"]) for row in rows} == {(len(DATA), places.sha256(DATA))}
    lines = run(capsys, "list")[1].splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "FORMAT", "PULLED", "SOURCE"]
    assert lines[2].split()[:5] == [NAME, "2.1", "MB", "GGUF", "Q8_0"]
    assert run(capsys, "rm", NAME, "mine:a")[0] == 0
    assert run(capsys, "list")[1].startswith("no models here yet: qwen2 pull qwen2.5-coder:0.5b")


def test_quiet_says_nothing_on_the_way(capsys: Out) -> None:
    code, out, err = run(capsys, "pull", NAME, "--from", FILE, "--quiet")
    assert (code, err, out.count("\n")) == (0, "", 1)


def test_a_licence_that_is_not_apache_is_shown(capsys: Out) -> None:
    code, _, err = run(capsys, "pull", "qwen2:72b", "--from", FILE)
    assert code == 1
    url = "https://huggingface.co/Qwen/Qwen2-72B-Instruct/blob/main/LICENSE"
    assert err.splitlines()[0] == f"qwen2:72b is under the Tongyi Qianwen licence, not Apache-2.0: read {url}"


def test_list_all_shows_every_name(capsys: Out) -> None:
    rows = json.loads(run(capsys, "list", "--all", "--json")[1])
    assert [row["name"] for row in rows] == list(ENTRIES)
    (row,) = [row for row in rows if row["name"] == "qwen2:57b-a14b"]
    assert row == {"name": "qwen2:57b-a14b", "format": "safetensors BF16", "licence": "Apache-2.0", "where": "Qwen/Qwen2-57B-A14B-Instruct"}


def test_ensure_leaves_paths_and_own_models_alone(home: Path) -> None:
    for text in ("./nothing.gguf", FILE, "mine:a", "../../x", "no such thing"):
        ensure(text)
    assert not home.exists()


def test_ensure_pulls_once(home: Path, capsys: Out) -> None:
    Store().pull(NAME, local=Path(FILE))
    ensure(NAME)
    assert capsys.readouterr().err == ""


def test_a_folder_called_like_a_model_changes_nothing(tmp_path: Path, capsys: Out) -> None:
    """As after `git clone .../qwen2`."""
    (tmp_path / "qwen2").mkdir()
    (tmp_path / NAME).mkdir()
    assert run(capsys, "show", "qwen2", "--config", "--json")[1] == run(capsys, "show", "qwen2:7b", "--config", "--json")[1] != ""
    assert error(capsys, "show", "./qwen2", "--config").startswith("qwen2/config.json: missing")
    pulled: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "pull", lambda self, name, *_: pulled.append(name))
        ensure("qwen2")
        ensure(NAME)
        ensure("./qwen2")
    assert pulled == ["qwen2:7b", NAME]


def test_a_damaged_manifest_concerns_its_own_model_only(home: Path, capsys: Out) -> None:
    Store().pull(NAME, local=Path(FILE))
    assert run(capsys, "cp", NAME, "mine:a")[0] == 0
    damaged = home / "models" / "mine" / "a" / "manifest.json"
    damaged.write_text("{")
    assert run(capsys, "pull", NAME)[::2] == (0, "")
    ensure(NAME)
    code, out, err = run(capsys, "list", "--json")
    assert (code, [row["name"] for row in json.loads(out)]) == (0, [NAME])
    assert err.startswith(f"qwen2: {damaged}: not a manifest of this program")
    assert err.count("\n") == 1
    assert error(capsys, "show", "mine:a").startswith(f"{damaged}: not a manifest")
    assert run(capsys, "rm", "mine:a")[0] == 0


# ---------------------------------------------------------------------------------------------------------------------- errors


def test_errors_are_one_line(capsys: Out, tmp_path: Path) -> None:
    assert error(capsys, "rm", "qwen3:7b").startswith("no model is named 'qwen3:7b': did you mean qwen2:7b, qwen2:72b, qwen2.5:7b?")
    assert error(capsys, "show", "qwen2:7b", "--tensors") == "qwen2:7b is not pulled yet: run qwen2 pull qwen2:7b"
    assert error(capsys, "show", "./nothing") == "./nothing: no such file or folder"
    assert error(capsys, "pull", "../../x").startswith("'../../x' is not a model's name: write family:tag")
    assert error(capsys, "rm") == "name the models to remove: qwen2 list shows them"
    assert error(capsys, "pull", NAME, "--source", "ftp") == "source 'ftp' is not known; sources: hub, modelscope, index"


def test_rm_checks_every_name_before_the_first_is_removed(capsys: Out) -> None:
    assert run(capsys, "pull", NAME, "--from", FILE)[0] == 0
    assert error(capsys, "rm", NAME, "qwen2:7b") == "qwen2:7b is not pulled: qwen2 list shows what is"
    assert Store().has(NAME)
    assert run(capsys, "rm", NAME, NAME)[1].count("\n") == 1


def test_list_marks_files_that_are_gone(tmp_path: Path, capsys: Out) -> None:
    assert run(capsys, "cp", f"./{FILE}", "mine:a")[0] == 0
    assert "gone" not in run(capsys, "list")[1]
    (tmp_path / FILE).unlink()
    assert f"{FILE} (gone)" in run(capsys, "list")[1]
    assert [row["gone"] for row in json.loads(run(capsys, "list", "--json")[1])] == [True]


def test_a_command_line_that_cannot_be_read(capsys: Out) -> None:
    for arguments in (["pull"], ["pull", NAME, "--fast"], ["cp", "one"], ["list", "--json", "extra", "more"]):
        code, out, err = run(capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), arguments
        assert err.endswith(f"(see qwen2 {arguments[0]} --help)\n")
    assert run(capsys, "list", "two words")[2] == "qwen2: 'two words': more than list takes (see qwen2 list --help)\n"
    assert run(capsys, "fetch")[2].endswith("(see qwen2 --help)\n")


def test_debug_shows_where(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no model is named"):
        main(["rm", "qwen3:7b", "--debug"])
    monkeypatch.setenv("QWEN2_DEBUG", "1")
    with pytest.raises(ValueError, match="no model is named"):
        main(["rm", "qwen3:7b"])
    monkeypatch.setenv("QWEN2_DEBUG", "0")
    assert main(["rm", "qwen3:7b"]) == 1


def test_debug_as_a_word_of_a_prompt() -> None:
    assert take_debug(["--debug", "run", "--", "what is", "--debug"]) == (True, ["run", "--", "what is", "--debug"])
    assert take_debug(["run", "--", "what is", "--debug"]) == (False, ["run", "--", "what is", "--debug"])
    assert take_debug(["list"]) == (False, ["list"])


def test_main_leaves_its_caller_s_process_alone(capsys: Out) -> None:
    before = sys.excepthook, sys.stdout.encoding, sys.stdout.errors
    assert main(["list"]) == 0
    assert (sys.excepthook, sys.stdout.encoding, sys.stdout.errors) == before


def test_ctrl_c_and_a_closed_pipe(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen2.weights.store.Store.list", stop)
    assert run(capsys, "list") == (130, "", "\n")
    command = [sys.executable, "-m", "qwen2", "list", "--all"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_errors_of_the_system_lose_their_numbers() -> None:
    assert one_line(PermissionError(errno.EACCES, "Permission denied", "/x/y")) == "/x/y: Permission denied"
    assert one_line(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError()) == "ValueError"


def test_unexpected_errors_are_one_line_too() -> None:
    code = "import qwen2.cli.list as verb\nverb._stored = None\nfrom qwen2.cli.app import console\nconsole()"
    done = subprocess.run([sys.executable, "-c", code, "list"], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 1
    told = "qwen2: unexpected TypeError: 'NoneType' object is not callable; run it again with --debug to see where, and report it\n"
    assert done.stderr == told


# -------------------------------------------------------------------------------------------------------------------- start-up


def environment() -> dict[str, str]:
    """This environment, with this package first."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}


def test_help_names_every_verb_and_imports_no_torch() -> None:
    code = "import sys\nfrom qwen2.cli.app import main\nmain(['--help'])\nprint(*sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True).stdout
    text, _, modules = out.rstrip("\n").rpartition("\n")
    assert all(f" {verb} " in text for verb in VERBS)
    loaded = set(modules.split())
    assert "cyclopts" in loaded
    assert not loaded & {*HEAVY, "prompt_toolkit", "qwen2.weights.store"}


def test_the_store_s_verbs_import_no_torch() -> None:
    verbs = "main(['list'])\nmain(['show', 'qwen2:72b', '--config'])"
    code = f"import sys\nfrom qwen2.cli.app import main\n{verbs}\nprint(*sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True).stdout
    assert not set(out.splitlines()[-1].split()) & HEAVY


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help_with_an_example(capsys: Out, verb: str) -> None:
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert f"Example: {VERBS[verb][1]}" in " ".join(out.split())
    assert VERBS[verb][1].startswith(f"qwen2 {verb} ")


def test_version(capsys: Out) -> None:
    from qwen2 import __version__, kernels

    assert run(capsys, "--version") == (0, f"{__version__}\n{kernels.report()}\n", "")


def test_completion_in_a_file_leaves_the_startup_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert main(["--install-completion", "--shell", "bash", "--output", str(tmp_path / "script")]) == 0
    assert "qwen2" in (tmp_path / "script").read_text()
    assert not (tmp_path / ".bashrc").exists()
    assert main(["--install-completion", "--shell", "bash"]) == 0
    assert (tmp_path / ".bashrc").exists()
    monkeypatch.setattr("cyclopts.completion.detect.detect_shell", Mock(side_effect=ShellDetectionError))
    assert main(["--install-completion"]) == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, tmp_path: Path) -> None:
    script = make_app().generate_completion(shell=shell)  # type: ignore[arg-type]
    assert all(verb in script for verb in VERBS)
    assert ("-l quiet" if shell == "fish" else "--quiet") in script
    path = shutil.which(shell)
    if path is not None:
        (tmp_path / "completion").write_text(script)
        subprocess.run([path, "-n", str(tmp_path / "completion")], check=True)


# ------------------------------------------------------------------------------------------------------------------------ show


def test_config_of_a_published_model_without_a_download(capsys: Out) -> None:
    """Facts of the published files, to the unit."""
    facts = json.loads(run(capsys, "show", "qwen2:72b", "--config", "--json")[1])
    assert (facts["parameters"], facts["non_embedding_parameters"]) == (72_706_203_648, 70_214_787_072)
    assert (facts["embedding_parameters"], facts["cache_bytes_per_token"]) == (1_245_708_288, 327_680)
    text = run(capsys, "show", "Qwen/Qwen2-57B-A14B", "--config")[1]
    rows = dict(line.split("  ", 1) for line in text.splitlines())
    assert rows["active_parameters"].strip() == "14,249,270,784"
    assert rows["parameters"].strip() == "57,408,658,944"
    assert rows["context"].strip() == "131,072"


def test_show_of_a_published_model_that_is_not_here(capsys: Out) -> None:
    facts = json.loads(run(capsys, "show", "Qwen/Qwen2-72B", "--json")[1])
    assert (facts["name"], facts["layers"], facts["parameters"]) == ("qwen2:72b-base", 80, 72_706_203_648)
    assert (facts["licence"], facts["source"]) == ("Tongyi Qianwen", "Qwen/Qwen2-72B")
    assert facts["defaults"]["temperature"] == 0
    assert facts["state"] == "not pulled: qwen2 pull qwen2:72b-base gets it"
    text = run(capsys, "show", "smollm2")[1]
    assert "not pulled" in text
    assert "98.4 MB (98,362,432 bytes)" in text


def test_an_output_matrix_that_the_released_model_shares(coder: Path, capsys: Out) -> None:
    """494,032,768 parameters are the released model's."""
    facts = json.loads(run(capsys, "show", str(coder), "--json")[1])
    assert (facts["parameters"], facts["own_output_parameters"]) == (494_032_768 + 151_936 * 896, 151_936 * 896)
    assert "  630,167,424, of which 136,134,656 in an output matrix of its own\n" in run(capsys, "show", str(coder))[1]
    assert "own_output_parameters" not in json.loads(run(capsys, "show", "qwen2:7b", "--config", "--json")[1])


@pytest.mark.parametrize("fixture", ["tiny_folder", "coder"])
def test_the_template_shown_is_the_one_that_renders(fixture: str, request: pytest.FixtureRequest, capsys: Out) -> None:
    """Printed, and rendered by Jinja itself as transformers sets it up, it gives what our own gives."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from qwen2.tokenizer import ChatTemplate
    from qwen2.weights.describe import describe

    path = request.getfixturevalue(fixture)
    code, source, _ = run(capsys, "show", str(path), "--template")
    assert code == 0
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "So"}]
    theirs = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source.removesuffix("\n"))
    ours = ChatTemplate.of(describe(path).tokenizer).render(messages).text
    assert theirs.render(messages=messages, add_generation_prompt=True) == ours


def test_a_folder_without_a_template_is_rendered_with_qwen2s(tiny_folder: Path, tmp_path: Path, capsys: Out) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "bare")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    code, source, err = run(capsys, "show", str(folder), "--template")
    assert (code, err) == (0, "qwen2: the files have no template: Qwen2's own is used\n")
    assert "You are a helpful assistant." in source


def test_show_of_a_real_file(smollm: Path, capsys: Out) -> None:
    facts = json.loads(run(capsys, "show", str(smollm), "--json")[1])
    assert facts["weights"] == {"Q4_1": "210 tensors, 66.4 MB", "Q8_0": "1 tensors, 30.1 MB", "F32": "61 tensors, 141 kB"}
    assert (facts["architecture"], facts["parameters"], facts["size"]) == ("llama", 134_515_008 + 30 * (576 + 2 * 192), 98_362_432)
    assert facts["tokenizer"] == {"ids": 49_152, "control": 17}
    tensors = json.loads(run(capsys, "show", str(smollm), "--tensors", "--json")[1])
    assert tensors[0] == {"name": "token_embd.weight", "type": "Q8_0", "shape": [49152, 576], "size": 30_081_024}
    assert "<|im_start|>" in run(capsys, "show", str(smollm), "--template")[1]
    assert "layers" in run(capsys, "show", str(smollm), "--config")[1]


def test_show_of_files_that_are_no_models(tmp_path: Path, capsys: Out) -> None:
    assert FILE in error(capsys, "show", f"./{FILE}")
    (tmp_path / "empty").mkdir()
    assert error(capsys, "show", "./empty") == "empty/config.json: missing; a Hugging Face folder has it beside the weights"


def test_the_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen2.cli.progress import PullWatcher

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    with PullWatcher(NAME) as watch:
        Store().pull(NAME, watch, local=Path(FILE))
    assert "2.1/2.1 MB" in screen.getvalue()
    assert f"{NAME}: from {FILE}\n" in screen.getvalue()


def test_an_interrupted_pull_says_how_far_it_is(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen2.weights.sources import Local

    fetch = Local.fetch

    def cut(self: Local, entry: object, file: object, partial: Partial, advance: Callable[[int], None]) -> None:
        partial.append(DATA[: 1 << 20])
        partial.flush()
        advance(partial.size)
        raise KeyboardInterrupt

    monkeypatch.setattr(Local, "fetch", cut)
    code, _, err = run(capsys, "pull", NAME, "--from", FILE)
    assert (code, err.splitlines()[-1]) == (130, f"{NAME}: interrupted at 1.05 MB of 2.1 MB; the same command goes on")
    monkeypatch.setattr(Local, "fetch", fetch)
    code, _, err = run(capsys, "pull", NAME, "--from", FILE)
    assert (code, err.splitlines()[0]) == (0, f"{NAME}: from {FILE}, going on at 1.05 MB of 2.1 MB")
