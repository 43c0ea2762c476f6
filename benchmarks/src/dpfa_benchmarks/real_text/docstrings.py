"""Real texts without a download: docstrings, read from the sources of installed packages without importing them."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PRIVATE = ("stdlib", "torch", "sympy")
"""Who wrote the private texts: the three classes of the task."""

PUBLIC = (
    *("numpy", "scipy", "sklearn", "networkx", "matplotlib", "fontTools"),
    *("mpmath", "rich", "PIL", "polars", "jinja2"),
)
"""Who wrote the public ones, which make words, vectors and all choices. All are dependencies of this project."""

NAMES = frozenset((*PRIVATE, *PUBLIC, "pytorch", "scikit", "np", "nx", "plt", "fonttools", "pil"))
"""Words that name a package: left out of every text."""

WORDS = 64
"""A text is that many words from its beginning, at most."""

COPY = 8
"""Texts of one package that begin with the same words, that many, are copies: one record."""

_SKIPPED = {"tests", "test", "site-packages", "idlelib"}
_WORD = re.compile(r"[a-z]+")
_STRING = re.compile(
    r"(?P<indent>^[ \t]*[rRuU]?)?(?P<quotes>\"{3}|'{3})(?P<text>.*?)(?P=quotes)", re.DOTALL | re.MULTILINE
)

Text = tuple[str, ...]


def read(package: str, most: int | None = None) -> list[Text]:
    """Texts of one package without copies, at most `most`, in an order that depends on the texts alone."""
    root = _root(package)
    found: dict[Text, Text] = {}
    for file in sorted(root.rglob("*.py")):
        if _SKIPPED.intersection(file.relative_to(root).parts):
            continue
        for docstring in _docstrings(file.read_text(encoding="utf-8", errors="ignore")):
            words = [word for word in _WORD.findall(docstring.lower()) if word not in NAMES]
            if len(words) >= COPY:
                found.setdefault(tuple(words[:COPY]), tuple(words[:WORDS]))
    return sorted(found.values(), key=lambda text: _number(text, "order"))[:most]


def in_test(text: Text, seed: int, share: float = 0.2) -> bool:
    """Whether a text is a test text: a function of its own beginning and the seed."""
    return _number(text, f"split {seed}") < share * 2**64


def _number(text: Text, purpose: str) -> int:
    """Uniform in [0, 2**64), of a text's beginning."""
    digest = hashlib.blake2b(" ".join(text[:COPY]).encode(), key=purpose.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _root(package: str) -> Path:
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"the texts of {package!r} must be installed, got no such package; install it.")
    return Path(found.submodule_search_locations[0])


def _docstrings(source: str) -> Iterator[str]:
    """Strings in three quotes that begin a line. A parser of the language would take a minute for all packages."""
    for match in _STRING.finditer(source):
        if match["indent"] is not None:
            yield match["text"]
