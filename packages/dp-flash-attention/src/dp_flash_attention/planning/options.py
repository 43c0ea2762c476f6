"""What a command line says in text: a window, a mechanism's parameters."""

from __future__ import annotations

from dpfa_core.checks import require


def window_of(text: str) -> tuple[int, int]:
    """``LEFT,RIGHT`` as two integers; -1 is unlimited.

    Raises: PrivacyParameterError.
    """
    try:
        left, right = (int(side) for side in text.split(","))
    except ValueError:
        require(
            False, "window must be two integers LEFT,RIGHT with -1 for unlimited", text, 'Write for example "128,0".'
        )
        raise
    return left, right


def parameters_of(texts: list[str]) -> dict[str, int | float | str]:
    """``name=value`` pairs; a value that reads as a number, true or false is one.

    Raises: PrivacyParameterError for a text without a name, and for a name given twice.
    """
    found: dict[str, int | float | str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        require(
            bool(equals) and name.isidentifier(), "parameter must be name=value", text, 'Write for example "rank=16".'
        )
        require(name not in found, "each parameter must be given once", text)
        found[name] = _value(value)
    return found


def _value(text: str) -> int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
