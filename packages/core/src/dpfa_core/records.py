"""JSON for frozen dataclasses: what is written is strict JSON, what is read is checked again."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Self

from dpfa_core.errors import PrivacyParameterError


class Record:
    """Mixin: ``to_json`` gives a dict of JSON values, ``from_json`` restores an equal object."""

    def to_json(self) -> dict[str, Any]:
        """Fields as JSON values: tuples become lists, bytes hexadecimal, infinities strings."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: encode(getattr(self, field.name)) for field in fields}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Rebuild and check; an unknown or missing field raises ``PrivacyParameterError``."""
        if not isinstance(data, dict):
            raise PrivacyParameterError(f"expected the JSON object of a {cls.__name__}, got {data!r}.")
        hints = typing.get_type_hints(cls)
        names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(data) - names)
        if unknown:
            raise PrivacyParameterError(
                f"{cls.__name__} has the fields {sorted(names)}, got also {unknown}; remove them."
            )
        try:
            return cls(**{name: decode(hints[name], value) for name, value in data.items()})
        except TypeError as error:
            raise PrivacyParameterError(f"{cls.__name__} could not be restored: {error}.") from error


def encode(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def decode(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        rest = [argument for argument in arguments if argument is not type(None)]
        return decode(rest[0], value) if len(rest) == 1 else value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise PrivacyParameterError(f"expected a list, got {value!r}.")
        inner = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
        if not arguments:
            return tuple(value)
        if len(inner) != len(value):
            raise PrivacyParameterError(f"expected {len(inner)} entries, got {value!r}.")
        return tuple(decode(part, item) for part, item in zip(inner, value, strict=True))
    if hint is bytes and isinstance(value, str):
        try:
            return bytes.fromhex(value)
        except ValueError:
            raise PrivacyParameterError(f"expected hexadecimal bytes, got {value!r}.") from None
    if hint is float and value in ("inf", "-inf"):
        return float(value)
    if isinstance(hint, type) and issubclass(hint, Record) and isinstance(value, dict):
        return hint.from_json(value)
    return value
