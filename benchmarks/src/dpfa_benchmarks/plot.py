"""Pictures and tables of the newest records: the only source of numbers for the docs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from dpfa_benchmarks.record import Record, Result, read

MAIN_JOB = "test accuracy of dpfa train"
"""What the records of ``dpfa_benchmarks.utility`` say that they are about."""
OURS, OTHERS = "#2a6f97", "#b8c4cc"


def newest(folder: Path) -> list[Record]:
    """The newest record of each case and set of parameters, in the order of their first appearance.

    Raises: ValueError if there is none.
    """
    latest: dict[str, Record] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for record in read(path):
            key = json.dumps([record.case, _setting(record)], sort_keys=True)
            if key not in latest or record.time >= latest[key].time:
                latest[key] = record
    if not latest:
        raise ValueError(f"expected at least one record in {str(folder)!r}, got none; run a case with --record.")
    return list(latest.values())


def write_page(folder: Path, out: Path) -> list[Path]:
    """Pictures and tables of all newest records under `folder`; returns the files written."""
    files = sorted((folder / "utility").glob("*.jsonl"))
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines() if line]
    latest: dict[str, dict[str, Any]] = {}
    for found in map(json.loads, lines):
        if found.get("what", MAIN_JOB) == MAIN_JOB:
            latest[found["command"]] = found
    return write(newest(folder), out, [utility_table(found) for found in latest.values()])


def write(records: Iterable[Record], out: Path, tables: Iterable[str] = ()) -> list[Path]:
    """One SVG and one Markdown table for each record, below `tables`; returns the files written."""
    out.mkdir(parents=True, exist_ok=True)
    written, tables = [], list(tables)
    for record in records:
        path = out / f"{slug(record)}.svg"
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dpfa", "font.size": 10}):
            picture(record).savefig(path, format="svg", metadata={"Date": None})
        written.append(path)
        tables.append(table(record))
    page = out / "tables.md"
    page.write_text("\n".join(tables), encoding="utf-8")
    return [*written, page]


def slug(record: Record) -> str:
    """The record's file name: its case, those parameters that are words, and the rows taken at a time."""
    setting = _setting(record)
    rows = setting.pop("physical_batch", None)
    words = [value for value in setting.values() if isinstance(value, str)]
    if rows is not None:
        words.append("rows-" + "-".join(str(n or "all") for n in (rows if isinstance(rows, list) else [rows])))
    return "-".join([record.case, *words])


def _setting(record: Record) -> dict[str, Any]:
    """The parameters that set a record apart: without where a peer lies, and without what is zero or empty, so
    that a parameter that a case gained later does not part its records."""
    return {name: value for name, value in record.parameters.items() if value and name != "peer_path"}


def picture(record: Record) -> Figure:
    """Median time per step (line: 20th to 80th percentile) and peak memory of every contender that ran."""
    ran = [result for result in record.results if result.seconds is not None][::-1]
    figure = Figure(figsize=(7.6, 0.9 + 0.42 * len(ran)), layout="constrained")
    times, memories = figure.subplots(1, 2, sharey=True)
    for row, result in enumerate(ran):
        colour = OURS if result.name == record.ours else OTHERS
        assert result.seconds is not None  # noqa: S101  (filtered above)
        milliseconds = [value * 1e3 for value in (result.seconds.p20, result.seconds.p50, result.seconds.p80)]
        times.barh(row, milliseconds[1], color=colour, height=0.6)
        times.plot([milliseconds[0], milliseconds[2]], [row, row], color="black", linewidth=1.5)
        memories.barh(row, (result.peak_memory_bytes or 0) / 2**20, color=colour, height=0.6)
    times.set_yticks(range(len(ran)), [result.name for result in ran])
    times.set(xlabel="ms per step", xlim=(0, None))
    memories.set(xlabel="peak memory above baseline, MiB", xlim=(0, None))
    for axes in (times, memories):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def table(record: Record) -> str:
    """The record in Markdown: numbers, machine, versions and the command that made them."""
    rows = [_row(record, result) for result in record.results]
    parameters = ", ".join(f"{name}={value}" for name, value in record.parameters.items())
    return "\n".join(
        [
            f"### {slug(record)}",
            "",
            f"![{slug(record)}: time and memory](benchmarks/{slug(record)}.svg)",
            "",
            "| contender | ms (p20, **p50**, p80) | ours / it (p20, **p50**, p80) | peak memory | error |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"One repetition: {record.step}; {record.repeats} rounds; threads: {record.threads}; {parameters}.",
            "",
            where(record.machine, record.time, record.commit, record.dirty, record.versions),
            "",
            "```console",
            f"$ {record.command}",
            "```",
            "",
        ]
    )


def utility_table(found: dict[str, Any]) -> str:
    """A record of ``dpfa_benchmarks.utility`` in Markdown."""
    error = found["standard_error"]
    mean = f"{found['mean']:.1%}" + ("" if error is None else f" (standard error {error:.1%})")
    rows = [
        f"| {run['seed']} | {run['test_accuracy']:.1%} | {run['baseline_nonprivate']:.1%} | "
        f"{run['baseline_majority']:.1%} | {_up(run['epsilon'])} at {run['delta']:g} | {run['seconds']:.0f} |"
        for run in found["runs"]
    ]
    return "\n".join(
        [
            "### Accuracy of the main job",
            "",
            f"Mean over {len(rows)} seeds: **{mean}**, from {found['lowest']:.1%} to {found['highest']:.1%}.",
            "",
            "| seed | test accuracy | not private | majority class | ε at δ | seconds |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"Threads: {found['threads']}. "
            + where(found["machine"], found["time"], found["commit"], found["dirty"], found["versions"]),
            "",
            "```console",
            f"$ {found['command']}",
            "```",
            "",
        ]
    )


def _up(value: float) -> str:
    """Four decimals, never below the value."""
    return f"{math.ceil(value * 1e4) / 1e4:.4f}"


def where(machine: dict[str, Any], time: str, commit: str | None, dirty: bool | None, versions: dict[str, str]) -> str:
    """Machine, time, source and versions of a record, in a sentence each."""
    source = "no commit" if commit is None else f"commit {commit[:12]}" + (" (modified)" if dirty else "")
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['os']}, load "
        f"average at the start {machine['load_average_1min']:.1f}. {time}, {source}. {packages}."
    )


def _row(record: Record, result: Result) -> str:
    name = f"**{result.name}**" if result.name == record.ours else result.name
    if result.seconds is None:
        return f"| {name}: {result.what} | {result.unavailable.replace('|', '/')} | | | |"
    time = ", ".join(
        text.format(value * 1e3)
        for text, value in zip(
            ("{:.1f}", "**{:.1f}**", "{:.1f}"),
            (result.seconds.p20, result.seconds.p50, result.seconds.p80),
            strict=True,
        )
    )
    ratio = record.ratios.get(result.name)
    against = f"{ratio.p20:.2f}, **{ratio.p50:.2f}**, {ratio.p80:.2f}" if ratio else ""
    memory = f"{(result.peak_memory_bytes or 0) / 2**20:.0f} MiB"
    error = "" if result.error is None else f"{result.error:.1e}"
    return f"| {name}: {result.what} | {time} | {against} | {memory} | {error} |"
