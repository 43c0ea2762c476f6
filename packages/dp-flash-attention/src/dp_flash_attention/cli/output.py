"""Where output goes: answers on stdout, everything else on stderr, JSON as one object."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

answers = Console()
errors = Console(stderr=True)


def print_json(value: dict[str, Any]) -> None:
    """One strict JSON object on stdout; infinities become strings."""
    sys.stdout.write(json.dumps(strict(value), allow_nan=False) + "\n")


def strict(value: Any) -> Any:
    """The value with NaN and infinities as strings, which JSON does not have."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def number(value: float) -> str:
    """Four significant digits for people; never rounded below the value."""
    from decimal import ROUND_CEILING, Context, Decimal

    if value in (float("inf"), 0.0):
        return str(value)
    return f"{Decimal(value).normalize(Context(prec=4, rounding=ROUND_CEILING)):f}"
