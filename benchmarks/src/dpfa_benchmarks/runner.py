"""Runs a case: gate, then time, then memory, then one record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from dpfa_benchmarks import surroundings
from dpfa_benchmarks.case import Case, Contender, GateFailed, Step, sentence
from dpfa_benchmarks.memory import peak_memory
from dpfa_benchmarks.record import Quantiles, Record, Result
from dpfa_benchmarks.timing import interleaved

WARMUPS = 3


def run(
    case: Case,
    changes: Mapping[str, Any],
    *,
    repeats: int,
    command: str,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Record:
    """Measure `case` with its default parameters overridden by `changes`.

    Args: `progress` is called with (stage, steps done, steps in all).
    Raises: GateFailed before anything is timed; ValueError for unknown parameters.
    """
    parameters = with_changes(case, changes)
    machine = surroundings.machine()  # before we make it busy ourselves
    contenders = case.contenders(parameters)
    errors: dict[str, float] = {}
    checked: list[Contender] = []
    for index, contender in enumerate(contenders):
        progress("checking", index, len(contenders))
        checked.append(_checked(case, contender, errors))
    contenders = tuple(checked)
    gate(case, errors, contenders)
    progress("checking", len(contenders), len(contenders))
    steps: dict[str, Step] = {}
    contenders = tuple(_built(case, contender, steps) for contender in contenders)
    able = [contender for contender in contenders if not contender.unavailable]

    total, done = (WARMUPS + repeats) * len(able), 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress("timing", done, total)

    seconds = interleaved(steps, warmups=WARMUPS, repeats=repeats, advance=advance)
    steps.clear()

    peaks: dict[str, int] = {}
    for index, contender in enumerate(able):
        progress("memory", index, len(able))
        peaks[contender.name] = peak_memory(case.name, contender.name, parameters, torch.get_num_threads())
    progress("memory", len(able), len(able))

    commit, dirty = surroundings.commit()
    return Record(
        case=case.name,
        step=case.step,
        parameters=parameters,
        command=command,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit,
        dirty=dirty,
        machine=machine,
        versions=surroundings.versions(case.peers),
        threads=torch.get_num_threads(),
        repeats=repeats,
        ours=case.ours,
        tolerance=case.tolerance,
        results=tuple(_result(contender, seconds, peaks, errors) for contender in contenders),
        ratios={
            name: Quantiles.of([a / b for a, b in zip(seconds[case.ours], theirs, strict=True)])
            for name, theirs in seconds.items()
            if name != case.ours
        },
        fastest_alternative=_fastest(case, [c for c in able if errors.get(c.name, 0.0) <= case.tolerance], seconds),
    )


def gate(case: Case, errors: Mapping[str, float], contenders: Iterable[Contender] = ()) -> None:
    """Raises: GateFailed unless all of ours were compared with the definition and are within the tolerance."""
    for name in dict.fromkeys([case.ours, *(contender.name for contender in contenders if contender.ours)]):
        error = errors.get(name)
        if error is None or not error <= case.tolerance:  # a NaN is not within it
            raise GateFailed(
                f"{name!r} must agree with the plain definition to {case.tolerance:g} before it is timed, "
                f"got a relative error of {error}; nothing was measured."
            )


def _built(case: Case, contender: Contender, steps: dict[str, Step]) -> Contender:
    """Adds the contender's step, taken once; a peer that cannot take it is listed with what it said."""
    if contender.unavailable:
        return contender
    try:
        step = contender.build()
        step()
    except Exception as error:
        if _is_ours(case, contender):
            raise
        return replace(contender, unavailable=f"failed: {sentence(error)}")
    steps[contender.name] = step
    return contender


def _is_ours(case: Case, contender: Contender) -> bool:
    return contender.ours or contender.name == case.ours


def _checked(case: Case, contender: Contender, errors: dict[str, float]) -> Contender:
    """Notes the contender's error; a peer that cannot do the step is listed with what it said."""
    if contender.unavailable or contender.error is None:
        return contender
    try:
        errors[contender.name] = contender.error()
    except Exception as error:
        if _is_ours(case, contender):
            raise
        return replace(contender, unavailable=f"failed: {sentence(error)}")
    return contender


def with_changes(case: Case, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The case's parameters; each change must name one and have its type."""
    unknown = sorted(set(changes) - set(case.defaults))
    if unknown:
        raise ValueError(f"{case.name} has the parameters {', '.join(case.defaults)}, got {', '.join(unknown)}.")
    return case.settled({**case.defaults, **changes})


def _result(
    contender: Contender,
    seconds: Mapping[str, list[float]],
    peaks: Mapping[str, int],
    errors: Mapping[str, float],
) -> Result:
    name = contender.name
    if contender.unavailable:
        return Result(name=name, what=contender.what, unavailable=contender.unavailable)
    return Result(
        name=name,
        what=contender.what,
        seconds=Quantiles.of(seconds[name]),
        peak_memory_bytes=peaks[name],
        error=errors.get(name),
    )


def _fastest(case: Case, right: list[Contender], seconds: Mapping[str, list[float]]) -> str | None:
    """The private alternative with the smallest median, of those that compute the step."""
    others = [contender.name for contender in right if contender.private and not _is_ours(case, contender)]
    return min(others, key=lambda name: Quantiles.of(seconds[name]).p50, default=None)
