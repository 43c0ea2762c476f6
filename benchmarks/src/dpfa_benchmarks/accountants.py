"""``python -m dpfa_benchmarks.accountants``: epsilon and seconds of every accountant on the same releases.

The record is one JSON line with every answer or the reason for none; the page is written from a record only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.progress import track

from dp_flash_attention.numbers import number
from dpfa_benchmarks import surroundings
from dpfa_benchmarks.plot import where
from dpfa_benchmarks.record import append_line, line_of
from dpfa_core.errors import UnsupportedEvent
from dpfa_core.events import DiscreteGaussian, Event, FixedSizeSampled, Gaussian, Laplace, PoissonSampled
from dpfa_core.spending import upper_bound

DELTA = 1e-5
ACCOUNTANTS = ("gdp", "rdp", "pld", "prv")
LIBRARIES = ("dp-accounting", "prv-accountant", "numpy", "scipy")


@dataclass(frozen=True)
class Setting:
    """One release and how often it is made on the same records."""

    name: str
    event: Event
    count: int


def sampled(noise_multiplier: float, probability: float) -> Event:
    return PoissonSampled(probability, Gaussian(noise_multiplier))


# no two settings share an event, so that none finds another's work in a cache
SETTINGS = (
    *(
        Setting(f"Gaussian, z = {z:g}", Gaussian(z), count)
        for count, multipliers in ((1, (0.5, 1.0, 4.0)), (10, (2.0, 8.0)), (100, (5.0, 20.0)), (1000, (25.0, 80.0)))
        for z in multipliers
    ),
    Setting("Poisson, q = 0.02, z = 0.6", sampled(0.6, 0.02), 300),
    Setting("Poisson, q = 0.001, z = 0.8", sampled(0.8, 0.001), 10_000),
    Setting("Poisson, q = 0.01, z = 1", sampled(1.0, 0.01), 1000),
    Setting("Poisson, q = 256/60000, z = 1.1", sampled(1.1, 256 / 60_000), 14_062),
    Setting("Poisson, q = 0.1, z = 2", sampled(2.0, 0.1), 100),
    Setting("Poisson, q = 0.01, z = 1.3", sampled(1.3, 0.01), 10_000),
    Setting("Poisson, q = 0.0001, z = 0.5", sampled(0.5, 0.0001), 10_000),
    Setting("Poisson, q = 0.001, z = 0.7", sampled(0.7, 0.001), 100_000),
    Setting("Poisson, q = 0.01, z = 4", sampled(4.0, 0.01), 100_000),
    Setting("Fixed size, 600 of 60000, z = 2", FixedSizeSampled(600, 60_000, Gaussian(2.0)), 1000),
    Setting("Laplace, b = 20", Laplace(20.0), 100),
    Setting("Poisson, q = 0.05, Laplace, b = 2", PoissonSampled(0.05, Laplace(2.0)), 500),
    Setting("Discrete Gaussian, z = 10", DiscreteGaussian(10.0), 100),
)


def main(arguments: list[str]) -> int:
    """Price all settings; print the record, append it and write the page where the options say."""
    parser = argparse.ArgumentParser(prog="python -m dpfa_benchmarks.accountants", description=__doc__)
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the record to this file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the Markdown page of the record")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="run nothing: its newest record")
    options = parser.parse_args(arguments)
    if options.source:
        record = newest(options.source)
    else:
        record = measured(SETTINGS, shlex.join(["python", "-m", "dpfa_benchmarks.accountants", *arguments]))
        line = line_of(record)
        sys.stdout.write(line)
        if options.record:
            append_line(options.record, line)
    if options.page:
        # the record as it is read back, whose keys are in another order
        options.page.write_text(page(json.loads(json.dumps(record, sort_keys=True))), encoding="utf-8")
    return 0


def measured(settings: Iterable[Setting], command: str) -> dict[str, Any]:
    """One record: where it was made, and what every accountant answered."""
    machine, (commit, dirty) = surroundings.machine(), surroundings.commit()
    # the libraries are imported outside the clock
    for name in ACCOUNTANTS:
        upper_bound(name, ((Gaussian(1.5), 1),), DELTA)
    return {
        "what": "epsilon of every accountant",
        "command": command,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "machine": machine,
        "threads": os.environ.get("OMP_NUM_THREADS", "numpy's own choice"),
        "versions": surroundings.versions(LIBRARIES),
        "delta": DELTA,
        "rows": [row(setting) for setting in track(tuple(settings), description="releases")],
    }


def row(setting: Setting) -> dict[str, Any]:
    """The answers for one setting."""
    answers = {name: answer(name, setting) for name in ACCOUNTANTS}
    return {"name": setting.name, "event": setting.event.to_json(), "count": setting.count, "answers": answers}


def answer(accountant: str, setting: Setting) -> dict[str, Any]:
    """Epsilon and seconds, or the accountant's reason for having no bound."""
    start = time.perf_counter()
    try:
        epsilon = upper_bound(accountant, ((setting.event, setting.count),), DELTA)
    except UnsupportedEvent as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - start
    if not math.isfinite(epsilon):
        return {"refused": "its epsilon is infinite."}
    return {"epsilon": epsilon, "seconds": seconds}


def newest(path: Path) -> dict[str, Any]:
    """The last record of a file.

    Raises: ValueError if there is none.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    if not lines:
        raise ValueError(f"expected at least one record in {str(path)!r}, got none; run it with --record.")
    found = json.loads(lines[-1])
    if not isinstance(found, dict):
        raise ValueError(f"a record must be a JSON object, got {type(found).__name__} in {str(path)!r}.")
    return found


def below(found: dict[str, Any]) -> float | None:
    """By which share PLD's epsilon lies below RDP's; None where one of them has no answer."""
    pld, rdp = (found["answers"][name].get("epsilon") for name in ("pld", "rdp"))
    return None if pld is None or not rdp else 1.0 - pld / rdp


def page(record: dict[str, Any]) -> str:
    """The record in Markdown; epsilons are rounded up."""
    refused = refusals(record)
    lines = [
        "# Accountants compared",
        "",
        f"Epsilon of the same releases at δ = {record['delta']:g}, and the seconds that the answer took. Every number "
        "is an upper bound, rounded up in its last digit. *PLD below RDP* is by which share the loss distribution's "
        "epsilon lies below the Rényi one; where it is negative, RDP is the tighter one. GDP is exact where it "
        "answers; PRV adds its error bound of 0.01.",
        "",
        "| release | times | GDP | RDP | PLD | PRV | PLD below RDP | seconds GDP, RDP, PLD, PRV |",
        "|---|---|---|---|---|---|---|---|",
        *(line(found, refused) for found in record["rows"]),
        "",
        "No answer, because the accountant has no bound for such a release:",
        "",
        *(f"- [{mark}] {name}: {plain(reason)}" for (name, reason), mark in refused.items()),
        "",
        where(record["machine"], record["time"], record["commit"], record["dirty"], record["versions"])
        + f" Threads: {record['threads']}.",
        "",
        "```console",
        f"$ {record['command']}",
        "```",
        "",
    ]
    return "\n".join(lines)


def refusals(record: dict[str, Any]) -> dict[tuple[str, str], int]:
    """Every different (accountant, reason), numbered in order of appearance."""
    found: dict[tuple[str, str], int] = {}
    for each in record["rows"]:
        for name in ACCOUNTANTS:
            reason = each["answers"][name].get("refused")
            if reason is not None:
                found.setdefault((name, reason), len(found) + 1)
    return found


def plain(reason: str) -> str:
    """The reason without the words that every refusal begins with."""
    return reason.partition(": ")[2] if reason.startswith("accountant ") else reason


def line(found: dict[str, Any], refused: dict[tuple[str, str], int]) -> str:
    """One row of the table."""
    answers = [(name, found["answers"][name]) for name in ACCOUNTANTS]
    cells = [
        number(each["epsilon"], 5) if "epsilon" in each else f"[{refused[name, each['refused']]}]"
        for name, each in answers
    ]
    share = below(found)
    seconds = ", ".join(f"{each['seconds']:.2f}" if "seconds" in each else "–" for _, each in answers)
    saved = "" if share is None else f"{share:.1%}"
    return f"| {found['name']} | {found['count']} | {' | '.join(cells)} | {saved} | {seconds} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
