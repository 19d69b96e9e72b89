"""Our server beside llama.cpp's: many clients, a shared system prompt, a long prompt amid streams. One run, alternating, medians.

Both servers are up, on the same file with the same number of threads, and one works at a time. Every request is new to both but for
what a scenario shares. Answers are of a set length (`ignore_eos`), greedy. Then ours alone: what a JSON schema costs a token, what
guesses give where code is edited, and what of a step with 32 clients is not the model. Left out: the engines without a server
(peers.py), quality, memory.

    python bench/serve.py --llama-server BUILD/bin/llama-server            # table and raw figures into bench/results/
    python bench/serve.py --llama-server BUILD/bin/llama-server --rounds 1 --only chats --clients 1,16
    python bench/serve.py --only own                                       # ours alone

llama-server: cmake -S llama.cpp -B BUILD -DGGML_NATIVE=ON -DLLAMA_CURL=OFF; cmake --build BUILD --target llama-server. The sdist of
llama-cpp-python has the source in vendor/llama.cpp.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from peer.load import Heard, arrivals, ask, clients, intrusion, middle, percentile, rate
from peer.machine import command_line, idle, processor
from peer.own import guesses, offline, schema_cost, served
from peer.servers import Server, llama, ours

from qwen2.weights.store import Store

SCENARIOS = ("chats", "poisson", "shared", "intrusion", "own")
TOKENS = 64  # of an answer
STREAM_TOKENS = 400  # of one that a long prompt comes amid: more than any server writes meanwhile
SHARERS = 7  # who come together with one system prompt
REQUESTS = {1: 4, 4: 4, 16: 3, 32: 2}  # of each client
SHARED_WORDS, LONG_WORDS = 1150, 4600  # about 1,500 and 6,000 tokens
WORDS = """
apple bridge candle desert engine forest garden harbour island jacket kitchen ladder mountain needle orchard painter
quarry river school teacher umbrella village window winter summer morning evening letter music silver copper paper stone
water bread market station railway captain doctor farmer soldier singer baker hunter the a of and to in with under over
before after between without against because although quickly slowly quietly almost never always often red green blue yellow
old young small large broken empty heavy bright dark early late wide narrow simple careful walked found carried opened built
painted asked answered followed remembered forgot wrote sold bought kept gave took brought heard saw felt knew thought said
table chair door wall roof floor field road path cloud rain snow wind storm fire smoke light shadow bird horse dog cat fish
tree flower grass seed fruit root branch leaf hill valley lake ocean shore ship boat sail anchor rope wheel hammer nail saw
coin price debt gift promise secret story song dance game prize rule law court judge king queen castle tower gate key lock
"""


class Prompts:
    """Texts that no server has seen: sentences of common words, drawn by a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.words = WORDS.split()

    def text(self, count: int) -> str:
        """So many words, in sentences of twelve."""
        words = [self.random.choice(self.words) for _ in range(count)]
        return " ".join(word + "." if index % 12 == 11 else word for index, word in enumerate(words))

    def chat(self, words: int = 24, system: str | None = None, tokens: int = TOKENS) -> dict[str, Any]:
        """A request's body."""
        messages = [{"role": "user", "content": f"Write a story of these words: {self.text(words)}"}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return {"model": "it", "messages": messages, "max_tokens": tokens, "ignore_eos": True}


class Bench:
    """The servers, and what was measured: scenario -> measure -> column -> a value for each round."""

    def __init__(self, args: argparse.Namespace, servers: list[Server]) -> None:
        self.args, self.servers = args, servers
        self.prompts = Prompts(args.seed)
        self.samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def note(self, measure: str, server: Server, value: float) -> None:
        self.samples[measure][server.name].append(value)

    def turn(self, number: int) -> None:
        """A round: the same requests to each server; who begins changes."""
        order = self.servers[number % len(self.servers) :] + self.servers[: number % len(self.servers)]
        only = self.args.only
        for count in self.args.clients if "chats" in only else ():
            bodies = [self.prompts.chat() for _ in range(count * REQUESTS.get(count, 2))]
            for server in order:
                self.speeds(
                    f"{count} client{'s' if count > 1 else ''}", server, asyncio.run(clients(server.port, named(bodies, server), count))
                )
        if "poisson" in only:
            bodies = [self.prompts.chat() for _ in range(32)]
            for server in order:
                heard = asyncio.run(arrivals(server.port, named(bodies, server), self.args.rate, number))
                self.speeds(f"arrivals, {self.args.rate:g} a second", server, heard)
        if "shared" in only:
            system = self.prompts.text(SHARED_WORDS)
            bodies = [self.prompts.chat(system=system) for _ in range(2 + SHARERS)]
            for server in order:
                self.shared(server, named(bodies, server))
        if "intrusion" in only:
            streams = [self.prompts.chat(tokens=STREAM_TOKENS) for _ in range(8)]
            long = self.prompts.chat(words=LONG_WORDS, tokens=4)
            for server in order:
                idle()  # what was broken off before may still be written
                pause, first = asyncio.run(intrusion(server.port, named(streams, server), named([long], server)[0]))
                self.note("longest pause of 8 streams, s", server, pause)
                self.note("first token of the long prompt, s", server, first)
            idle()

    def speeds(self, label: str, server: Server, heard: list[Heard]) -> None:
        firsts = [one.first for one in heard]
        self.note(f"{label}: tokens/s", server, rate(heard))
        self.note(f"{label}: first token, median, s", server, middle(firsts))
        self.note(f"{label}: first token, 99th percentile, s", server, percentile(firsts, 0.99))

    def shared(self, server: Server, bodies: list[dict[str, Any]]) -> None:
        first, *others = bodies
        self.note("shared prompt: first request's first token, s", server, asyncio.run(ask(server.port, first)).first)
        one, *many = others[:1], *others[1:]
        self.note("shared prompt: a later request's first token, s", server, asyncio.run(ask(server.port, one[0])).first)
        heard = asyncio.run(clients(server.port, many, len(many)))
        self.note(f"shared prompt: {len(many)} later ones together, median, s", server, middle([each.first for each in heard]))


def named(bodies: list[dict[str, Any]], server: Server) -> list[dict[str, Any]]:
    """The bodies with the name that the server has for the model."""
    return [{**body, "model": server.model} for body in bodies]


def report(run: dict[str, Any]) -> str:
    """In Markdown: what `run` holds."""
    cpu, lines = run["machine"], []
    lines += [f"# {run['model']} served, beside llama.cpp's server: {cpu['kind']} machine", ""]
    lines += [f"{cpu['name']}, {cpu['cores']} cores ({', '.join(cpu['flags'])}); {run['threads']} threads; {run['date']}."]
    lines += [f"Medians of {run['rounds']} rounds, alternating. Command: `{run['command']}`", ""]
    names = list(run["servers"])
    lines += ["| | " + " | ".join(names) + " | ours / llama.cpp |", "|---" * (len(names) + 2) + "|"]
    for measure, columns in run["samples"].items():
        values = [middle(columns[name]) if name in columns else None for name in names]
        cells = ["" if value is None else f"{value:.1f}" if "tokens/s" in measure else f"{value:.3f}" for value in values]
        ratio = f"{values[0] / values[1]:.2f}" if len(values) == 2 and None not in values else ""  # type: ignore[operator]
        lines.append(f"| {measure} | {' | '.join(cells)} | {ratio} |")
    lines += ["", *(f"- {name}: {about}" for name, about in run["servers"].items())]
    if run["own"]:
        lines += ["", "Ours alone:", "", *(f"- {line}" for line in run["own"])]
    return "\n".join(lines) + "\n"


def comma(text: str) -> list[str]:
    return text.split(",")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, metavar="PROGRAM", help="left out: ours alone")
    parser.add_argument("--model", default="qwen2.5-coder:0.5b", help="a name or a GGUF file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=lambda text: [int(word) for word in comma(text)], default=list(REQUESTS))
    parser.add_argument("--rate", type=float, default=1.0, help="arrivals a second")
    parser.add_argument("--only", type=comma, default=list(SCENARIOS), help=f"some of {','.join(SCENARIOS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the results' files; left out: serve_ and the machine's kind")
    parser.add_argument("--out", type=Path, help="left out: bench/results/ for all scenarios, nowhere for some")
    args = parser.parse_args()
    for scenario in args.only:
        if scenario not in SCENARIOS:
            parser.error(f"--only {scenario}: there are {', '.join(SCENARIOS)}")
    if args.llama_server is not None and not args.llama_server.is_file():
        parser.error(f"--llama-server {args.llama_server}: there is no such program")
    return args


def write(args: argparse.Namespace, run: dict[str, Any]) -> None:
    """Print the report, and keep it where results are kept; after every round, so that a run can be stopped."""
    text = report(run)
    print(text)
    out = args.out if args.out is not None or set(args.only) != set(SCENARIOS) else Path(__file__).with_name("results")
    if out is not None:
        name = args.name or f"serve_{run['machine']['kind']}"
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.md").write_text(text)
        (out / f"{name}.json").write_text(json.dumps(run, indent=1) + "\n")


def main() -> None:
    """Measure, print, write."""
    args = arguments()
    path, shown = Store().resolve(args.model)
    run: dict[str, Any] = {"model": shown, "machine": processor(), "threads": args.threads, "rounds": 0, "date": time.strftime("%Y-%m-%d")}
    servers = [ours(args.model, args.threads)]
    if args.llama_server is not None:
        servers.append(llama(args.llama_server, path, args.threads))
    try:
        bench = Bench(args, servers)
        run |= {
            "command": command_line(),
            "servers": {server.name: server.about for server in servers},
            "samples": bench.samples,
            "own": [],
        }
        for server in servers:
            asyncio.run(clients(server.port, named([bench.prompts.chat() for _ in range(2)], server), 2))  # for nothing
        bodies = [bench.prompts.chat() for _ in range(64)]
        speed, own = served(servers[0], named(bodies, servers[0])) if "own" in args.only else (0.0, [])
        for number in range(args.rounds):
            bench.turn(number)
            run["rounds"] = number + 1
            write(args, run)
    finally:
        for server in servers:
            server.close()
    if "own" in args.only:
        own += offline(path, args.threads, bodies, speed) + schema_cost(path, args.threads) + guesses(path, args.threads)
        write(args, run | {"own": own})


if __name__ == "__main__":
    main()
