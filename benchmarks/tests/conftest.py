"""A record that the tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dpfa_benchmarks.record import Quantiles, Record, Result

STEADY = Quantiles(p20=1.0, p50=2.0, p80=3.0)


def a_record(error: float = 1e-7) -> Record:
    return Record(
        case="case",
        step="one step",
        parameters={"batch": 4},
        command="python -m dpfa_benchmarks run case",
        time="2026-01-01T00:00:00+00:00",
        commit=None,
        dirty=None,
        machine={"cpu": "c", "cores": 2, "memory_gib": 8.0, "os": "o", "load_average_1min": 0.1},
        versions={"torch": "1"},
        threads=1,
        repeats=3,
        ours="dpfa",
        tolerance=1e-5,
        results=(
            Result(name="dpfa", what="ours", seconds=STEADY, peak_memory_bytes=1, error=error),
            Result(name="plain", what="plain", seconds=STEADY, peak_memory_bytes=1),
            Result(name="peer", what="peer", unavailable="not installed"),
        ),
        ratios={"plain": STEADY},
        fastest_alternative=None,
    )


@pytest.fixture(name="a_record")
def a_record_() -> Callable[..., Record]:
    return a_record
