"""Where output goes: answers on stdout, everything else on stderr, JSON as one object."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dp_flash_attention.numbers import number, strict

answers = Console()
errors = Console(stderr=True)


def print_json(value: dict[str, Any]) -> None:
    """One strict JSON object on stdout; infinities become strings."""
    sys.stdout.write(json.dumps(strict(value), allow_nan=False) + "\n")


def two_columns(title: str, rows: list[tuple[str, str]]) -> None:
    """Name and value, one row each, under a title."""
    table = Table(box=None, show_header=False, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for name, value in rows:
        table.add_row(name, Text(value))
    answers.print(table)


def down(value: float, digits: int = 4) -> str:
    """That many significant digits for people; never rounded above the value: what is saved, heard or left."""
    if value in (float("inf"), 0.0):
        return str(value)
    return f"{Decimal(value).normalize(Context(prec=digits, rounding=ROUND_FLOOR)):f}"


def size(count: int) -> str:
    """Bytes for people, rounded up."""
    for unit, bytes_ in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= bytes_:
            return f"{number(count / bytes_, 3)} {unit}"
    return f"{count} bytes"


def side_by_side(prices: dict[str, dict[str, float]], reasons: dict[str, str], remarks: list[str]) -> None:
    """Epsilon by every accountant; ``prices`` is {column: {accountant: epsilon}}.

    Why others have none, and how bounds are loose, follows in dim lines.
    """
    table = Table("accountant", *prices, box=None, header_style="bold", pad_edge=False)
    least = {column: min(values.values(), default=None) for column, values in prices.items()}
    for name in dict.fromkeys(name for values in prices.values() for name in values):
        cells = []
        for column, values in prices.items():
            text = number(values[name]) if name in values else "-"
            cells.append(Text(text, style="bold" if values.get(name) == least[column] else ""))
        table.add_row(name, *cells)
    answers.print(table)
    for line in (*(f"{name}: {reason}" for name, reason in reasons.items()), *remarks):
        answers.print(Text(line, style="dim"), soft_wrap=True)


def warn(sentences: list[str]) -> None:
    """Plain warnings: they change no number."""
    for sentence in sentences:
        answers.print(Text(f"Warning: {sentence}", style="yellow"), soft_wrap=True)


@contextmanager
def working() -> Iterator[Callable[[str], None]]:
    """A function that shows on stderr what is computed, where somebody watches."""
    with errors.status("computing") as status:
        yield lambda text: status.update(f"computing {text}")
