"""The argument checks that several dataclasses share."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from dpfa_core.errors import PrivacyParameterError


def is_real(value: object) -> bool:
    """True for a float or int that is not a bool and not NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def require(condition: bool, expected: str, value: object, remedy: str = "") -> None:
    """Raise ``PrivacyParameterError`` with one sentence unless `condition` holds."""
    if not condition:
        raise PrivacyParameterError(f"{expected}, got {value!r}." + (f" {remedy}" if remedy else ""))


def positive(name: str, value: Any, *, finite: bool = True, remedy: str = "") -> None:
    good = is_real(value) and value > 0 and (not finite or math.isfinite(value))
    require(good, f"{name} must be a {'finite ' if finite else ''}number > 0", value, remedy)


def non_negative(name: str, value: Any, remedy: str = "") -> None:
    good = is_real(value) and 0 <= value < math.inf
    require(good, f"{name} must be a finite number >= 0", value, remedy)


def fraction(name: str, value: Any, *, zero: bool = True, one: bool = False, remedy: str = "") -> None:
    """`value` lies between 0 and 1; each end is allowed only if said so."""
    good = is_real(value) and 0 <= value <= 1 and (zero or value > 0) and (one or value < 1)
    require(good, f"{name} must be in {'[' if zero else '('}0, 1{']' if one else ')'}", value, remedy)


def integer(name: str, value: Any, *, least: int, remedy: str = "") -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(good, f"{name} must be an integer >= {least}", value, remedy)


def a_tuple(name: str, value: Any) -> None:
    """Lists are refused: what holds one cannot be hashed."""
    require(isinstance(value, tuple), f"{name} must be a tuple", value)


def one_of(name: str, value: Any, allowed: Collection[Any], remedy: str = "") -> None:
    names = ", ".join(repr(item) for item in allowed)
    require(value in allowed, f"{name} must be one of {names}", value, remedy)
