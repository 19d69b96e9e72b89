"""Conversations with a real model through the clients that people use: what they do with our server, client by client.

It makes a virtual environment and a folder of node modules of their own (--environment), starts `qwen2 serve`, runs the
conversations of bench/client/ (plain, streamed, tools, structured output, embeddings; each asserts what came back) and writes
a table. Left out: the official Python clients, which the test suite itself uses (tests/server).

    python bench/clients.py [--model qwen2.5-coder:0.5b] [--only litellm] [--write bench/results/clients.md]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peer.machine import command_line, name_and_flags

HERE = Path(__file__).parent / "client"
SUITES = ("langchain", "llama_index", "litellm", "agents", "javascript")
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "ANONYMIZED_TELEMETRY": "False", "OPENAI_API_KEY": "none"}
AGENTS = {"qwen_agent": "qwen-agent", "openai_agents": "openai-agents", "pydantic_ai": "pydantic-ai-slim", "smolagents": "smolagents"}


@dataclass(frozen=True)
class Outcome:
    """One conversation."""

    client: str
    what: str
    result: str  # ok, failed, left out
    why: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder:0.5b")
    parser.add_argument("--only", choices=SUITES, action="append", help="leave the others out; may be repeated")
    parser.add_argument("--environment", type=Path, default=Path("out/clients"), help="where the clients are installed, 0.6 GB")
    parser.add_argument("--write", type=Path, help="the table, as Markdown")
    args = parser.parse_args()
    folder = args.environment.absolute()
    python = install(folder)
    versions = installed(folder, python)
    suites = args.only or SUITES
    outcomes: list[Outcome] = []
    with served(args.model, folder) as url:
        for suite in suites:
            print(f"{suite} ...", file=sys.stderr, flush=True)
            outcomes += (
                javascript(folder, url, args.model) if suite == "javascript" else conversations(suite, folder, python, url, args.model)
            )
    text = report(outcomes, versions, args.model, (folder / "server.log").read_text())
    print(text)
    if args.write is not None:
        args.write.write_text(text)
    sys.exit(any(one.result == "failed" for one in outcomes))


# --- what they need


def install(folder: Path) -> Path:
    """The environment's Python; made anew where its requirements have changed."""
    python, mark = folder / ".venv" / "bin" / "python", folder / "installed"
    wanted = "".join((HERE / name).read_text() for name in ("requirements.txt", "package.json"))
    if mark.exists() and mark.read_text() == wanted:
        return python
    print("installing the clients, which takes a few minutes", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-r", HERE / "requirements.txt"], check=True)
    for name in ("package.json", "clients.test.mjs"):
        (folder / name).write_text((HERE / name).read_text())
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--silent"], cwd=folder, check=True)
    mark.write_text(wanted)
    return python


def installed(folder: Path, python: Path) -> dict[str, str]:
    """Versions by name."""
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True).stdout
    found = {one["name"].lower().replace("_", "-"): one["version"] for one in json.loads(listed)}
    for name in ("ollama", "openai"):
        found[f"{name} (js)"] = json.loads((folder / "node_modules" / name / "package.json").read_text())["version"]
    return found


@contextmanager
def served(model: str, folder: Path) -> Iterator[str]:
    """A server with the model in memory, and where it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "qwen2", "serve", "--port", str(port), "--load", model], stderr=log)
        try:
            while not healthy(url):
                if process.poll() is not None:
                    raise SystemExit((folder / "server.log").read_text().strip())
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


# --- the conversations


def conversations(suite: str, folder: Path, python: Path, url: str, model: str) -> list[Outcome]:
    """Of one of Python's clients."""
    results = folder / f"{suite}.xml"
    results.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "--rootdir", HERE, "-c", os.devnull, "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["-o", "asyncio_mode=auto", f"--junitxml={results}", f"--url={url}", f"--model={model}", HERE / f"test_{suite}.py"]
    with (folder / f"{suite}.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **QUIET}, cwd=folder)
    if not results.exists():
        raise SystemExit(f"{suite}: nothing ran; {folder / f'{suite}.log'} says why")
    cases = list(ET.parse(results).iter("testcase"))
    if not all(case.get("name", "").startswith("test_") and case.get("classname") for case in cases):
        raise SystemExit(f"{suite}: its file cannot be read; {folder / f'{suite}.log'} says why")
    return [named(suite, case) for case in cases]


def javascript(folder: Path, url: str, model: str) -> list[Outcome]:
    """Of those in JavaScript."""
    (folder / "clients.test.mjs").write_text((HERE / "clients.test.mjs").read_text())
    command = ["node", "--test", "--test-reporter=junit", "clients.test.mjs"]
    environment = {**os.environ, "SERVER_URL": url, "SERVER_MODEL": model}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    (folder / "javascript.log").write_text(done.stdout + done.stderr)
    found = []
    for case in ET.fromstring(done.stdout).iter("testcase"):
        client, _, what = case.get("name", "").partition(": ")
        found.append(Outcome(client, what, *result_of(case)))
    return found


def named(suite: str, case: ET.Element) -> Outcome:
    """Which client it was, and what it did: `test_stream[langchain-openai]` is the streaming of langchain-openai."""
    name, _, param = case.get("name", "").removesuffix("]").partition("[")
    what = name.removeprefix("test_")
    client = {"langchain": "langchain", "llama_index": "llama-index", "litellm": f"litellm {param}/".removesuffix(" /"), "agents": ""}[
        suite
    ]
    if suite == "agents":
        key = next(key for key in AGENTS if what.startswith(key))
        client, what = f"{AGENTS[key]} {param}".strip(), what.removeprefix(key).lstrip("_")
    elif suite != "litellm" and param:
        client = param
    return Outcome(client, what.replace("_", " "), *result_of(case))


def result_of(case: ET.Element) -> tuple[str, str]:
    """ok, failed or left out, and why in one line."""
    for tag, word in (("failure", "failed"), ("error", "failed"), ("skipped", "left out")):
        found = case.find(tag)
        if found is not None:
            said = found.get("message") or found.text or ""
            return word, re.sub(r"\s+", " ", said).strip()[:240]
    return "ok", ""


# --- the table


def report(outcomes: list[Outcome], versions: dict[str, str], model: str, log: str) -> str:
    """Markdown."""
    name, flags = name_and_flags()
    broken = len(re.findall(r" /(?!health)\S* 5[0-9][0-9] [0-9.]+ s$", log, re.M))
    lines = [
        "# Clients", "",
        f"`{command_line()}`, {name}, {' '.join(flags)}; model {model}, temperature 0.", "",
        f"{sum(one.result == 'ok' for one in outcomes)} conversations as they should be, "
        f"{sum(one.result == 'failed' for one in outcomes)} not, {sum(one.result == 'left out' for one in outcomes)} left out; "
        f"{broken} answers of the server with a status of 500 or above.", "",
        "| client | version | what | result |", "|---|---|---|---|",
    ]  # fmt: skip
    for one in outcomes:
        package = next((known for known in (one.client, one.client.split(" ")[0], f"{one.client}-core") if known in versions), "")
        why = one.why.replace("|", "\\|")
        lines.append(f"| {one.client} | {versions.get(package, '')} | {one.what} | {one.result}{': ' + why if why else ''} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
