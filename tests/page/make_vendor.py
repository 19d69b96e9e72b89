"""The libraries of the page, taken from npm's packages: which versions, which of their files, and what was in them.

npm checks each package against the registry's integrity hash, which the manifest keeps beside a digest of every file taken;
`test_vendor.py` checks the tree against the manifest. To take newer versions, change PACKAGES and run, with npm installed:

    python -m tests.page.make_vendor
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

VENDOR = Path(__file__).parents[2] / "src" / "qwen2" / "server" / "web" / "vendor"

LANGUAGES = (
    "bash c cpp csharp css diff dockerfile go haskell ini java javascript json kotlin latex lua makefile markdown php powershell "
    "python r ruby rust sql swift typescript xml yaml"
)
FACES = (
    "AMS-Regular Caligraphic-Bold Caligraphic-Regular Fraktur-Bold Fraktur-Regular Main-Bold Main-BoldItalic Main-Italic Main-Regular "
    "Math-BoldItalic Math-Italic SansSerif-Bold SansSerif-Italic SansSerif-Regular Script-Regular Size1-Regular Size2-Regular "
    "Size3-Regular Size4-Regular Typewriter-Regular"
)

PACKAGES = {  # name and version: folder, and its files by their names in the package
    "markdown-it@15.0.3": ("markdown-it", {"dist/browser/markdown-it.esm.min.mjs": "markdown-it.mjs", "LICENSE": "LICENSE"}),
    # inside markdown-it's file: only their licences are taken
    "entities@8.1.0": ("markdown-it", {"LICENSE": "LICENSE.entities"}),
    "linkify-it@6.1.0": ("markdown-it", {"LICENSE": "LICENSE.linkify-it"}),
    "mdurl@2.1.0": ("markdown-it", {"LICENSE": "LICENSE.mdurl"}),
    "punycode.js@2.3.1": ("markdown-it", {"LICENSE-MIT.txt": "LICENSE.punycode"}),
    "uc.micro@3.0.0": ("markdown-it", {"LICENSE.txt": "LICENSE.uc.micro"}),
    "dompurify@3.5.0": ("dompurify", {"dist/purify.es.mjs": "purify.mjs", "LICENSE": "LICENSE"}),
    "@highlightjs/cdn-assets@11.12.0": (
        "highlight",
        {
            "es/core.min.js": "core.js",
            "LICENSE": "LICENSE",
            **{f"es/languages/{name}.min.js": f"languages/{name}.js" for name in LANGUAGES.split()},
        },
    ),
    "katex@0.19.1": (
        "katex",
        {
            "dist/katex.min.js": "katex.js",
            "dist/katex.min.css": "katex.css",
            "LICENSE": "LICENSE",
            **{f"dist/fonts/KaTeX_{face}.woff2": f"fonts/KaTeX_{face}.woff2" for face in FACES.split()},
        },
    ),
}


def take(package: str, folder: str, names: dict[str, str], at: Path) -> dict[str, object]:
    """Its entry of the manifest, with its files written below VENDOR."""
    told = subprocess.run(["npm", "pack", package, "--json", "--pack-destination", at], check=True, capture_output=True, text=True)
    packed = json.loads(told.stdout)
    facts = packed[0] if isinstance(packed, list) else next(iter(packed.values()))
    files = {}
    with tarfile.open(at / Path(facts["filename"]).name) as archive:
        licence = json.load(archive.extractfile("package/package.json"))["license"]  # type: ignore[arg-type]
        for inside, name in sorted(names.items(), key=lambda pair: pair[1]):
            content = archive.extractfile(f"package/{inside}").read()  # type: ignore[union-attr]
            target = VENDOR / folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            files[name] = {"from": inside, "sha256": hashlib.sha256(content).hexdigest()}
    return {
        "name": facts["name"], "version": facts["version"], "licence": licence, "integrity": facts["integrity"], "folder": folder, "files": files,
    }  # fmt: skip


def main() -> None:
    """Everything anew."""
    shutil.rmtree(VENDOR, ignore_errors=True)
    with tempfile.TemporaryDirectory() as at:
        entries = [take(package, folder, names, Path(at)) for package, (folder, names) in PACKAGES.items()]
    (VENDOR / "manifest.json").write_text(json.dumps({"packages": entries}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
