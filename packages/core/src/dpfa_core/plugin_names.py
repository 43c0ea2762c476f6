"""A plugin's name with parameters: ``low_rank(rank=8)`` is what ``create("low_rank", rank=8)`` makes."""

from __future__ import annotations

import re
from functools import lru_cache

from dpfa_core.errors import PrivacyParameterError

Value = bool | int | float

_WHOLE = re.compile(r"(?P<name>[^()]+)\((?P<parameters>[^()]*)\)")
_ONE = re.compile(r"\s*(?P<key>[A-Za-z_]\w*)\s*=\s*(?P<value>[^\s,]+)\s*")


@lru_cache(maxsize=1024)
def parts(name: str) -> tuple[str, tuple[tuple[str, Value], ...]]:
    """The bare name, and its parameters in the order of their names.

    Raises: PrivacyParameterError for parameters that are not ``name=number`` or ``name=True``.
    """
    found = _WHOLE.fullmatch(name)
    if found is None:
        return name, ()
    given: dict[str, Value] = {}
    for text in filter(str.strip, found["parameters"].split(",")):
        one = _ONE.fullmatch(text)
        value = None if one is None else _value(one["value"])
        if one is None or value is None or one["key"] in given:
            raise PrivacyParameterError(
                "a plugin's parameters must be like 'low_rank(rank=8)', numbers or True or False, each once, got "
                f"{name!r}."
            )
        given[one["key"]] = value
    return found["name"].strip(), tuple(sorted(given.items()))


def named(name: str, **parameters: Value) -> str:
    """`name` with `parameters` added to, or put in the place of, those it has."""
    bare, given = parts(name)
    together = sorted((dict(given) | parameters).items())
    return f"{bare}({', '.join(f'{key}={value!r}' for key, value in together)})" if together else bare


def _value(text: str) -> Value | None:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None
