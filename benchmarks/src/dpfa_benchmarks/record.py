"""One benchmark run as one JSON line: what was measured, where, with which command."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Percentiles of a sample, in the sample's unit."""

    p20: float
    p50: float
    p80: float

    def __post_init__(self) -> None:
        values = (self.p20, self.p50, self.p80)
        if not all(math.isfinite(value) and value > 0 for value in values) or list(values) != sorted(values):
            raise ValueError(f"percentiles must be positive, finite and in order, got {values}.")

    @classmethod
    def of(cls, sample: list[float]) -> Quantiles:
        """Nearest-rank percentiles: each one is a value that was measured."""
        ordered = sorted(sample)
        p20, p50, p80 = (ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in (0.2, 0.5, 0.8))
        return cls(p20=p20, p50=p50, p80=p80)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one contender took, or the reason why it did not run."""

    name: str
    what: str
    seconds: Quantiles | None = None
    peak_memory_bytes: int | None = None
    """Peak resident memory in a process of its own, above what was resident before the first step."""
    error: float | None = None
    """Relative distance of its gradient or output from the plain definition."""
    unavailable: str = ""

    def __post_init__(self) -> None:
        if bool(self.unavailable) == (self.seconds is not None):
            raise ValueError(f"{self.name!r} must have either seconds or a reason why it did not run.")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run of one case."""

    case: str
    step: str
    """What one repetition is."""
    parameters: dict[str, Any]
    command: str
    time: str
    commit: str | None
    dirty: bool | None
    machine: dict[str, Any]
    versions: dict[str, str]
    threads: int
    repeats: int
    ours: str
    tolerance: float
    results: tuple[Result, ...]
    ratios: dict[str, Quantiles]
    """Seconds of ours divided by seconds of that contender, in the same round."""
    fastest_alternative: str | None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"expected a record of schema {SCHEMA}, got {self.schema}.")
        ran = {result.name for result in self.results if result.seconds is not None}
        ours = self.result(self.ours)
        if ours.error is None or not ours.error <= self.tolerance:
            raise ValueError(f"a record needs an error of ours of at most {self.tolerance}, got {ours.error}.")
        if set(self.ratios) != ran - {self.ours}:
            raise ValueError(f"a record needs one ratio for each contender that ran, got {sorted(self.ratios)}.")

    def result(self, name: str) -> Result:
        for result in self.results:
            if result.name == name:
                return result
        raise ValueError(f"the record holds no contender {name!r}.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """Raises: ValueError naming the keys that are missing or unknown."""
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise ValueError(f"a record must have exactly its keys; different: {sorted(names ^ set(data))}.")
        results = tuple(
            Result(**{**result, "seconds": result["seconds"] and Quantiles(**result["seconds"])})
            for result in data["results"]
        )
        ratios = {name: Quantiles(**ratio) for name, ratio in data["ratios"].items()}
        return cls(**{**data, "results": results, "ratios": ratios})


def append(path: Path, record: Record) -> None:
    """Add one line to `path`; lines that are there stay as they are."""
    append_line(path, line_of(record.to_json()))


def line_of(data: dict[str, Any]) -> str:
    """`data` as one line of JSON."""
    return json.dumps(data, sort_keys=True, allow_nan=False) + "\n"


def append_line(path: Path, line: str) -> None:
    """Add it to `path`; lines that are there stay as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def read(path: Path) -> list[Record]:
    """All records of a file, oldest first."""
    return [Record.from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line]
