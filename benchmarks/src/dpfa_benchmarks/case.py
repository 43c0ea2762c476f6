"""What a case is: contenders that do the same work, and the one that must be right before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do the step."""

    name: str
    what: str
    """One sentence for people: what runs, and what it does differently from the others."""
    build: Callable[[], Step]
    """Sets everything up and returns the step that is timed."""
    private: bool
    ours: bool = False
    """Whether it must pass the gate; what the case calls ours does so anyway."""
    error: Callable[[], float] | None = None
    """Relative distance from the plain definition; none for what has nothing to compare."""
    unavailable: str = ""
    """Why it cannot run here; empty if it can."""


class Case(Protocol):
    """One comparison; its parameters are plain numbers, strings and booleans, or lists of them."""

    name: str
    step: str
    """What one repetition is."""
    ours: str
    tolerance: float
    """Largest relative error of ours with which a number may be written."""
    peers: tuple[str, ...]
    """Distributions of others whose versions belong into the record."""
    defaults: Mapping[str, Any]
    toy: Mapping[str, Any]
    """Parameters at which the case runs in seconds."""

    def settled(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """`parameters` with what depends on others filled in, as the record keeps them."""
        ...

    def contenders(self, parameters: Mapping[str, Any]) -> tuple[Contender, ...]: ...


class GateFailed(Exception):
    """Ours does not compute what it should; nothing may be timed."""


class Skipped(Exception):
    """The case needs something that is not installed; the message says what."""


def sentence(error: Exception, longest: int = 240) -> str:
    """What an error says, in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= longest else text[: longest - 3] + "..."
