"""All installed plugins, or those with the given names."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dpfa_core.errors import PluginError
from dpfa_core.registry import ACCOUNTANTS, BACKENDS, MECHANISMS, Registry
from dpfa_verification.conformance.checks import check_accountant, check_backend, check_mechanism
from dpfa_verification.conformance.level import LevelName
from dpfa_verification.conformance.report import Report

KINDS: tuple[tuple[Registry, Callable[..., Report]], ...] = (
    (MECHANISMS, check_mechanism),
    (ACCOUNTANTS, check_accountant),
    (BACKENDS, check_backend),
)


def verify(names: Iterable[str] = (), level: LevelName = "default") -> list[Report]:
    """Check the plugins called `names`, of whatever kind; no names means every plugin that is installed.

    Guarantee: tested (see ``check_mechanism``, ``check_accountant`` and ``check_backend``).
    Raises: PluginError for a name that no installed plugin has, before anything is checked.
    """
    names = tuple(names)
    installed = [sorted({entry.name for entry in registry.entries()}) for registry, _ in KINDS]
    unknown = sorted(set(names) - {name for group in installed for name in group})
    if unknown:
        listed = ", ".join(sorted({name for group in installed for name in group})) or "none"
        raise PluginError(
            f"a plugin to verify must be installed (installed: {listed}), got {', '.join(unknown)}; "
            "install the package that provides it or correct the name."
        )
    return [
        check(name, level=level)
        for (_, check), group in zip(KINDS, installed, strict=True)
        for name in group
        if not names or name in names
    ]
