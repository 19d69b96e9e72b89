"""The libraries that come with the page are those of the manifest, whole, and each with its licence."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

from tests.page.make_vendor import PACKAGES, VENDOR

BYTES = 1_500_000
PERMISSIVE = {"MIT", "BSD-2-Clause", "BSD-3-Clause", "(MPL-2.0 OR Apache-2.0)"}
MANIFEST = json.loads((VENDOR / "manifest.json").read_text("utf-8"))["packages"]


def test_every_file_is_the_one_that_was_taken() -> None:
    listed = {VENDOR / "manifest.json"}
    for package in MANIFEST:
        for name, file in package["files"].items():
            path = VENDOR / package["folder"] / name
            assert hashlib.sha256(path.read_bytes()).hexdigest() == file["sha256"], f"{path} is not the file of {package['name']}"
            listed.add(path)
    assert {path for path in VENDOR.rglob("*") if path.is_file()} == listed
    assert sum(path.stat().st_size for path in listed) < BYTES


def test_the_manifest_is_the_script_s() -> None:
    taken = {
        f"{package['name']}@{package['version']}": (package["folder"], {file["from"]: name for name, file in package["files"].items()})
        for package in MANIFEST
    }
    assert taken == PACKAGES, "run python -m tests.page.make_vendor"


def test_each_has_its_licence_and_its_integrity() -> None:
    for package in MANIFEST:
        assert any(name.startswith("LICENSE") for name in package["files"]), package["name"]
        assert package["licence"] in PERMISSIVE, package["name"]
        kind, _, digest = package["integrity"].partition("-")
        assert (kind, len(base64.b64decode(digest))) == ("sha512", 64)


def test_no_style_or_script_names_a_file_elsewhere() -> None:
    """A browser that is offline has everything: the style's fonts are here, and no module imports by an address."""
    style = VENDOR / "katex" / "katex.css"
    fonts = set(re.findall(r"url\(([^)]+\.woff2)\)", style.read_text("utf-8")))
    assert fonts == {path.relative_to(style.parent).as_posix() for path in (VENDOR / "katex" / "fonts").iterdir()}
    for path in [*VENDOR.rglob("*.js"), *VENDOR.rglob("*.mjs")]:
        assert not re.search(r"""(?:^|[;}\s])import\s*(?:[\w*{][^;"']*from\s*)?["']""", path.read_text("utf-8")), path


def test_the_wheel_takes_them_along() -> None:
    """Nothing of what is left out of the wheel or of git is a file of the page."""
    left_out = (Path(__file__).parents[2] / ".gitignore").read_text("utf-8").split()
    assert not [path for path in VENDOR.parent.rglob("*") for pattern in left_out if path.match(pattern.strip("/"))]
