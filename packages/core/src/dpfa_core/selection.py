"""Which backend runs a problem, and for every other one the reasons against it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from dpfa_core.errors import BackendUnavailable, PluginError
from dpfa_core.registry import BACKENDS, Entry
from dpfa_core.spec import AttentionProblem, NoisePlan, Reasons

PREFERENCE = ("cuda", "triton", "cpu", "torch")
"""First-party backends, fastest first; "torch" is the one that always works."""

PACKAGES = {name: f"dpfa-kernels-{name}" for name in PREFERENCE}

_instances: dict[str, Any] = {}


@dataclass(frozen=True)
class Selection:
    """The backend chosen, and the trace: every backend looked at with the reasons against it."""

    name: str
    trace: tuple[tuple[str, Reasons], ...]

    def explain(self) -> str:
        """The trace as text, one line for each backend."""
        return _lines(self.trace)


def backend(name: str) -> Any:
    """The backend called `name`, one object per process; ``PluginError`` if it cannot be had."""
    if name not in _instances:
        _instances[name] = BACKENDS.create(name)
    return _instances[name]


def select(
    op: str,
    problem: AttentionProblem | None,
    plan: NoisePlan | None,
    backend: str = "auto",
) -> Selection:
    """Choose a backend for `op`.

    Args:
        op: "release", "privatize" or "training".
        problem, plan: what is to be computed; None where the operation has none ("training").
        backend: a name, or "auto" for the first one in ``PREFERENCE`` without a reason against it.

    Raises:
        PluginError: the backend asked for by name is not installed or broken; nothing else is tried.
        BackendUnavailable: it, or under "auto" every first-party one, has reasons against the problem.
    """
    if backend != "auto":
        reasons = _reasons(backend, op, problem, plan)
        trace = ((backend, reasons),)
        if reasons:
            raise BackendUnavailable(
                f'backend {backend!r} cannot run {op!r} here: {" ".join(reasons)} Choose another one or backend="auto".'
            )
        return Selection(backend, trace)

    installed: dict[str, list[Entry]] = {}
    for entry in BACKENDS.entries():
        installed.setdefault(entry.name, []).append(entry)
    found: list[tuple[str, Reasons]] = []
    chosen = ""
    for name in PREFERENCE:
        if name not in installed:
            found.append((name, (f"not installed: pip install {PACKAGES[name]}",)))
            continue
        if not any(entry.first_party for entry in installed[name]):
            continue
        try:
            reasons = _reasons(name, op, problem, plan)
        except PluginError as error:
            reasons = (str(error),)
        found.append((name, reasons))
        if not reasons:
            chosen = chosen or name
    for name, entries in installed.items():
        if not any(entry.first_party for entry in entries):
            found.append((name, (entries[0].disabled or "third party: chosen only when asked for by name.",)))
    if not chosen:
        raise BackendUnavailable(
            f"no first-party backend can run {op!r} for this problem; see the reasons, change the problem "
            f"or install a backend.\n{_lines(tuple(found))}"
        )
    return Selection(chosen, tuple(found))


def _reasons(name: str, op: str, problem: AttentionProblem | None, plan: NoisePlan | None) -> Reasons:
    try:
        candidate = backend(name)
        if op not in candidate.ops:
            return (f"does not offer the operation {op!r}.",)
        reasons = tuple(candidate.supports(op, problem, plan))
        if op == "release" and problem is not None and problem.biased and not _takes_bias(candidate):
            reasons += ("its release takes no bias of the logits: leave out alibi_slopes and additive masks.",)
        return reasons
    except PluginError:
        raise
    except Exception as error:
        origin = BACKENDS.entry(name).origin
        raise PluginError(
            f"backend {name!r} of {origin} failed to say what it supports: {type(error).__name__}: {error}; "
            "repair or uninstall it."
        ) from error


def _takes_bias(candidate: Any) -> bool:
    # backends that were written before there were biases have no such argument
    named = inspect.signature(candidate.release).parameters
    return "bias" in named or any(each.kind is each.VAR_KEYWORD for each in named.values())


def _lines(trace: tuple[tuple[str, Reasons], ...]) -> str:
    return "\n".join(f"  {name}: {'; '.join(reasons) if reasons else 'can run it'}" for name, reasons in trace)
