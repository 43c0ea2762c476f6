"""Plugins, found through entry points: listing imports nothing, loading imports one.

First-party packages come through the same door as everybody else's. A plugin asked for by name either
works or raises with its cause; a name that two distributions provide is disabled; a plugin of another
contract version is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from dpfa_core.contracts import OPERATIONS
from dpfa_core.errors import PluginError, PrivacyParameterError
from dpfa_core.plugin_names import parts
from dpfa_core.spec import CONTRACT_VERSION

FIRST_PARTY = frozenset(
    {
        "dpfa-mechanisms",
        "dpfa-accounting",
        "dpfa-kernels-torch",
        "dpfa-kernels-triton",
        "dpfa-kernels-cuda",
        "dpfa-kernels-cpu",
        "dpfa-verification",
    }
)
"""Distributions whose plugins "auto" may choose; everybody else's are chosen by name only."""

MECHANISM_GROUP = "dp_flash_attention.mechanisms"
ACCOUNTANT_GROUP = "dp_flash_attention.accountants"
BACKEND_GROUP = "dp_flash_attention.backends"


@dataclass(frozen=True)
class Entry:
    """One plugin as its distribution's metadata describes it; nothing is imported for it."""

    name: str
    distribution: str
    version: str
    target: str
    first_party: bool
    disabled: str = ""
    """The reason why this name cannot be used; empty means that it can."""

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version} ({self.target})"


class Registry:
    """All plugins of one entry-point group."""

    def __init__(self, group: str) -> None:
        self.group = group
        self._entries: tuple[Entry, ...] | None = None
        self._points: dict[str, metadata.EntryPoint] = {}

    def entries(self) -> tuple[Entry, ...]:
        """Every plugin installed, disabled ones with their reason; read once, see ``refresh``."""
        if self._entries is None:
            self._entries = self._read()
        return self._entries

    def refresh(self) -> None:
        """Read the installed metadata again at the next question."""
        self._entries = None

    def entry(self, name: str) -> Entry:
        """The one usable entry called `name`; ``PluginError`` with the remedy otherwise.

        A name may carry parameters, ``low_rank(rank=8)``, and the entry then has that name.
        """
        bare, given = parts(name)
        found = [entry for entry in self.entries() if entry.name == bare]
        if not found:
            names = ", ".join(sorted({entry.name for entry in self.entries()})) or "none"
            raise PluginError(
                f"{self._kind} must be the name of an installed plugin (installed: {names}), got {name!r}; "
                "install the package that provides it or correct the name."
            )
        if found[0].disabled:
            raise PluginError(f"{self._kind} {name!r} is disabled: {found[0].disabled}")
        return replace(found[0], name=name) if given else found[0]

    def load(self, name: str) -> Callable[..., Any]:
        """Import and return the entry point's object.

        Raises: PluginError naming cause, distribution, version and target; nothing else is tried.
        """
        entry = self.entry(name)
        try:
            loaded = self._points[parts(name)[0]].load()
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{self._kind} {name!r} of {entry.origin} failed to load: "
                f"{type(error).__name__}: {error}; repair or uninstall {entry.distribution}."
            ) from error
        if not callable(loaded):
            raise PluginError(
                f"{self._kind} {name!r} of {entry.origin} must be a callable, got {type(loaded).__name__}; "
                f"correct its entry point."
            )
        if hasattr(loaded, "contract_version"):
            self._check_version(entry, loaded)
        return loaded  # type: ignore[no-any-return]

    def create(self, name: str, **parameters: Any) -> Any:
        """Load the plugin, call it, and check the contract version and the members of what it returns."""
        entry, factory = self.entry(name), self.load(name)
        bare, given = parts(name)
        parameters = dict(given) | parameters
        try:
            plugin = factory(**parameters)
        except PrivacyParameterError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{self._kind} {name!r} of {entry.origin} could not be created with {parameters!r}: "
                f"{type(error).__name__}: {error}."
            ) from error
        slow_path = self.group == MECHANISM_GROUP and hasattr(plugin, "add_noise")
        if not slow_path:
            self._check_version(entry, plugin)
            missing = [member for member in required_members(self.group, plugin) if not hasattr(plugin, member)]
            if missing:
                raise PluginError(
                    f"{self._kind} {name!r} of {entry.origin} must offer {', '.join(missing)} "
                    f"(contract {CONTRACT_VERSION}), got {type(plugin).__name__} without; update the plugin."
                )
            if plugin.name != bare:
                raise PluginError(
                    f"{self._kind} {name!r} of {entry.origin} must be named as its entry point, "
                    f"got {plugin.name!r}; correct the plugin."
                )
        return plugin

    @property
    def _kind(self) -> str:
        return self.group.rpartition(".")[2].removesuffix("s")

    def _check_version(self, entry: Entry, plugin: object) -> None:
        version = getattr(plugin, "contract_version", None)
        if version != CONTRACT_VERSION:
            raise PluginError(
                f"{self._kind} {entry.name!r} of {entry.origin} must state contract_version = "
                f"{CONTRACT_VERSION}, got {version!r}; install a version made for this contract."
            )

    def _read(self) -> tuple[Entry, ...]:
        by_name: dict[str, list[Entry]] = defaultdict(list)
        self._points = {}
        for point in _points(self.group):
            distribution, version = _owner(point)
            by_name[point.name].append(
                Entry(point.name, distribution, version, point.value, distribution in FIRST_PARTY)
            )
            self._points[point.name] = point
        return tuple(
            entry if len(same) == 1 else _disabled(entry, same) for _, same in sorted(by_name.items()) for entry in same
        )


def _points(group: str) -> list[metadata.EntryPoint]:
    try:
        return list(metadata.entry_points(group=group))
    except Exception:
        # Some distribution's entry_points.txt cannot be parsed: leave out that one, not everybody.
        points: dict[tuple[str, str], metadata.EntryPoint] = {}
        for distribution in metadata.distributions():
            with suppress(Exception):
                for point in distribution.entry_points.select(group=group):
                    points.setdefault((distribution.name, point.name), point)
        return list(points.values())


def _owner(point: metadata.EntryPoint) -> tuple[str, str]:
    """Normalised name and version of the distribution, which may have lost its metadata."""
    try:
        found = (point.dist.name, point.dist.version) if point.dist else ()
    except Exception:
        found = ()
    name, version = (part or "unknown" for part in found or ("", ""))
    return re.sub(r"[-_.]+", "-", name).lower(), version


def _disabled(entry: Entry, same: list[Entry]) -> Entry:
    owners = " and ".join(sorted(other.origin for other in same))
    reason = f"{owners} provide the same name; uninstall all but one."
    return Entry(entry.name, entry.distribution, entry.version, entry.target, entry.first_party, reason)


def required_members(group: str, plugin: object) -> tuple[str, ...]:
    """The names that the contract asks of a plugin of this group."""
    if group == ACCOUNTANT_GROUP:
        return ("name", "bound", "supports", "compose", "epsilon", "delta", "state", "from_state")
    if group == BACKEND_GROUP:
        operations: frozenset[str] = getattr(plugin, "ops", frozenset())
        methods = [method for op in sorted(operations) for method in OPERATIONS.get(op, ())]
        return ("name", "ops", "supports", "counter_layout", *methods)
    last = "select" if getattr(plugin, "kind", None) == "selection" else "plan"
    return ("name", "kind", "norm", "supports", "calibrate", "event", "claims", last)


MECHANISMS = Registry(MECHANISM_GROUP)
ACCOUNTANTS = Registry(ACCOUNTANT_GROUP)
BACKENDS = Registry(BACKEND_GROUP)
