"""Public things that are made once and kept on disk: drawn data and pre-trained weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/dp-flash-attention`, or the same under `~/.cache`; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dp-flash-attention"


def write_atomically(path: Path, content: bytes) -> bool:
    """Writes a file so that a reader sees all of it or none of it.

    Guarantee: tested. An interrupted or refused write leaves what was there before.

    Returns:
        False where the folder cannot be written to: the caller has its content, only the next run is slower.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    except OSError:
        return False
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return True
