"""Everything that we ship passes."""

from __future__ import annotations

import pytest

from dpfa_core.registry import ACCOUNTANTS, BACKENDS, MECHANISMS
from dpfa_verification.conformance import check_accountant, check_backend, check_mechanism, render

KINDS = ((MECHANISMS, check_mechanism), (ACCOUNTANTS, check_accountant), (BACKENDS, check_backend))
OURS = [
    pytest.param(check, entry.name, id=entry.name)
    for registry, check in KINDS
    for entry in registry.entries()
    if entry.first_party
]


def test_there_is_something_to_check() -> None:
    names = {parameter.id for parameter in OURS}
    assert {"gaussian", "laplace", "gdp", "rdp", "pld", "prv", "torch"} <= names
    assert {"low_rank", "sparse", "block_diagonal", "attention_aware", "discrete_gaussian", "exponential"} <= names


@pytest.mark.parametrize(("check", "name"), OURS)
def test_own_plugin_passes(check: object, name: str) -> None:
    report = check(name)  # type: ignore[operator]
    assert report.ok, render(report)
    assert (report.name, report.failed()) == (name, ())
    assert "load" in [claim.obligation for claim, verdict, _ in report.obligations if verdict == "tested"]


@pytest.mark.parametrize("name", [entry.name for entry in MECHANISMS.entries() if entry.first_party])
def test_nothing_about_an_own_mechanism_is_left_open(name: str) -> None:
    """What this suite has a name for was looked at; only the noise itself belongs to the backends' checks."""
    findings = check_mechanism(name, level="quick").obligations
    assert {claim.obligation for claim, verdict, _ in findings if verdict == "assumed"} <= {"noise_law"}
