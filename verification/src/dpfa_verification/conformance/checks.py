"""One plugin at a time: found by name, loaded, and put through the examination of its kind."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from dpfa_core.errors import PluginError
from dpfa_core.registry import ACCOUNTANTS, BACKENDS, MECHANISMS, Registry
from dpfa_core.spec import Claim
from dpfa_verification.conformance.accountant import AccountantExamination
from dpfa_verification.conformance.level import Level, LevelName, level_named
from dpfa_verification.conformance.mechanism import MechanismExamination, stated_claims
from dpfa_verification.conformance.obligation import discharge
from dpfa_verification.conformance.report import Finding, Report
from dpfa_verification.conformance.selection import SelectionExamination

LOAD = Claim("load", status="tested", source="the registry's rules")


def check_mechanism(name: str, *, level: LevelName = "default", **parameters: Any) -> Report:
    """Check the obligations of the installed mechanism `name`, created with `parameters`.

    Guarantee: tested (rejects each broken mechanism of this package's tests).
    Returns: a report; a plugin that is installed but cannot be loaded has failed "load".
    Raises: PluginError if no such mechanism is installed; PrivacyParameterError for another level.
    """

    def examine(mechanism: Any, chosen: Level) -> tuple[Finding, ...]:
        if hasattr(mechanism, "add_noise") and not hasattr(mechanism, "plan"):
            text = "noise on a finished tensor has no plan to check; without dp_event it counts as not private"
            return ((Claim("slow_path"), "assumed", text),)
        examination = SelectionExamination if mechanism.kind == "selection" else MechanismExamination
        findings = discharge(examination(mechanism, chosen))
        return findings + stated_claims(mechanism, findings)

    return _report("mechanism", MECHANISMS, name, level, lambda: MECHANISMS.create(name, **parameters), examine)


def check_accountant(name: str, *, level: LevelName = "default") -> Report:
    """Check the obligations of the installed accountant `name`.

    Guarantee: tested (rejects each broken accountant of this package's tests).
    Returns: a report; a plugin that is installed but cannot be loaded has failed "load".
    Raises: PluginError if no such accountant is installed; PrivacyParameterError for another level.
    """

    def examine(_: Any, chosen: Level) -> tuple[Finding, ...]:
        return discharge(AccountantExamination(ACCOUNTANTS.load(name), chosen))

    return _report("accountant", ACCOUNTANTS, name, level, lambda: ACCOUNTANTS.create(name), examine)


def check_backend(name: str, device: str = "cpu", *, level: LevelName = "default", seed: int | None = None) -> Report:
    """Check the obligations of the installed backend `name`, for every operation it lists.

    Guarantee: tested (rejects each broken backend of this package's tests; each statistic raises a false
    alarm with a probability of 1e-6).
    Args: seed: of all inputs and keys; drawn afresh by default, and told in counterexamples.
    Returns: a report; a plugin that is installed but cannot be loaded has failed "load".
    Raises: PluginError if no such backend is installed; PrivacyParameterError for another level.
    """

    def examine(backend: Any, chosen: Level) -> tuple[Finding, ...]:
        # torch takes a second to import, and only backends need it
        from dpfa_verification.conformance.backend import examine_backend
        from dpfa_verification.conformance.bench import Bench

        return examine_backend(backend, Bench(device, secrets.randbits(32) if seed is None else seed), chosen)

    return _report("backend", BACKENDS, name, level, lambda: BACKENDS.create(name), examine)


def _report(
    kind: str,
    registry: Registry,
    name: str,
    level: str,
    create: Callable[[], Any],
    examine: Callable[[Any, Level], tuple[Finding, ...]],
) -> Report:
    chosen = level_named(level)
    entries = [entry for entry in registry.entries() if entry.name == name]
    if not entries:
        registry.entry(name)  # raises, and says which names are installed
    origin = " and ".join(entry.origin for entry in entries)
    try:
        plugin = create()
    except PluginError as error:
        return Report(False, ((LOAD, "failed", str(error)),), name, kind, origin)
    findings = ((LOAD, "tested", ""), *examine(plugin, chosen))
    ok = all(verdict != "failed" for _, verdict, _ in findings)
    return Report(ok, findings, name, kind, origin)
