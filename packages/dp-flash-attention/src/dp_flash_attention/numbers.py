"""Numbers as people and JSON read them: epsilon never below its value, no NaN and no infinity in JSON."""

from __future__ import annotations

from decimal import ROUND_CEILING, Context, Decimal
from typing import Any


def strict(value: Any) -> Any:
    """The value with NaN and infinities as strings, which JSON does not have."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def number(value: float, digits: int = 4) -> str:
    """That many significant digits for people; never rounded below the value."""
    if value in (float("inf"), 0.0):
        return str(value)
    return f"{Decimal(value).normalize(Context(prec=digits, rounding=ROUND_CEILING)):f}"
