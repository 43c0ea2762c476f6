"""An obligation: a named check that either comes through, finds a counterexample, or cannot decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpfa_core.spec import Claim
from dpfa_verification.conformance.report import Finding, Verdict


class Violated(Exception):
    """The obligation does not hold; the text is the counterexample."""


class Undecided(Exception):
    """The suite has no check for this plugin; the text says why."""


def holds(condition: bool, counterexample: str) -> None:
    """Raise ``Violated`` unless `condition`; comparisons with NaN are false, so NaN is a counterexample."""
    if not condition:
        raise Violated(counterexample)


def obligation(name: str, source: str = "") -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Mark a method of an examination as the check of one obligation."""

    def mark(check: Callable[[Any], None]) -> Callable[[Any], None]:
        check.claim = Claim(name, status="tested", source=source)  # type: ignore[attr-defined]
        return check

    return mark


def obligations(examination: object) -> dict[str, Callable[[Any], None]]:
    """The checks of `examination` by the name of their obligation, in the order in which they are written."""
    members = [check for kind in reversed(type(examination).__mro__) for check in vars(kind).values()]
    return {check.claim.obligation: check for check in members if hasattr(check, "claim")}


def discharge(examination: object) -> tuple[Finding, ...]:
    """Check every obligation of `examination`."""
    checks = obligations(examination)
    return tuple((check.claim, *verdict(examination, name)) for name, check in checks.items())  # type: ignore[attr-defined]


def verdict(examination: object, name: str) -> tuple[Verdict, str]:
    """Check one obligation; an exception of the plugin's own counts as failed."""
    try:
        obligations(examination)[name](examination)
    except Violated as violated:
        return "failed", str(violated)
    except Undecided as undecided:
        return "assumed", str(undecided)
    except Exception as error:
        return "failed", f"raised {type(error).__name__}: {error}"
    return "tested", ""
