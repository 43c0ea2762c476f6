"""``python -m dpfa_benchmarks``: list, run, training, long-release, plot."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from dpfa_benchmarks import record as records
from dpfa_benchmarks.case import GateFailed, Skipped
from dpfa_benchmarks.record import Quantiles, Record

DONE, FAILED, BAD_INPUT = 0, 1, 2
answers, messages = Console(), Console(stderr=True)

# As `dpfa` does, before torch loads: waiting threads that spin would measure who else is on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(arguments: list[str]) -> int:
    """Exit codes: 0 done, 1 the gate failed and nothing was measured, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m dpfa_benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the cases and their parameters")
    run = commands.add_parser("run", help="gate, time and memory of one case")
    run.add_argument("case", nargs="?", help="its name; without one, every case runs")
    _add_run_options(run)
    _add_run_options(commands.add_parser("training", help="private_step on every model, with the options of run"))
    long = commands.add_parser("long-release", help="one long forward call: seconds and peak memory of its process")
    long.add_argument("--length", type=int, default=16384, help="tokens; memory grows linearly with them")
    long.add_argument("--threads", type=int, default=1)
    long.add_argument("--json", action="store_true", help="print one JSON object")
    plot = commands.add_parser("plot", help="pictures and tables of the newest records, for the docs")
    plot.add_argument("--records", type=Path, default=Path("benchmarks/records"))
    plot.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            return _list()
        if options.command == "plot":
            return _plot(options.records, options.out)
        if options.command == "long-release":
            return _long_release(options)
        if options.command == "training":
            return _training(arguments[arguments.index("training") + 1 :])
        return _run(options, arguments)
    except Skipped as error:
        messages.print(f"skipped: {error}", style="yellow", markup=False)
        return DONE
    except GateFailed as error:
        messages.print(str(error), style="red", markup=False)
        return FAILED
    except (ValueError, OSError) as error:
        messages.print(str(error), style="red", markup=False)
        return BAD_INPUT


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=20, help="rounds in which every contender takes one step")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the case")
    parser.add_argument("--peer-path", metavar="DIR", help="a checkout of fastDP, a peer that no registry has")
    parser.add_argument("--toy", action="store_true", help="the case at a size that takes seconds; no record")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the run to this file")
    parser.add_argument("--json", action="store_true", help="print each record as one JSON object")


def _training(options: list[str]) -> int:
    """Each model by the command that would run it alone, so that its record names one; the worst exit code."""
    from dpfa_benchmarks.workloads import MODELS

    worst = DONE
    for model in MODELS:
        messages.print(f"private_step, {model}", style="bold")
        worst = max(worst, main(["run", "private_step", "--set", f"model={model}", *options]))
    return worst


def _long_release(options: argparse.Namespace) -> int:
    from dpfa_benchmarks.long_release import LIMIT, long_release

    if options.length < 1 or options.threads < 1:
        raise ValueError("--length and --threads must be at least 1.")
    found = long_release(options.length, threads=options.threads)
    if options.json:
        sys.stdout.write(json.dumps(found, sort_keys=True) + "\n")
    else:
        answers.print(
            f"{found['length']} tokens, backend {found['backend']}: {found['seconds']:.1f} s, "
            f"{found['peak_rss_bytes'] / 2**20:.0f} MiB at most"
        )
    return DONE if found["peak_rss_bytes"] < LIMIT else FAILED


def _list() -> int:
    from dpfa_benchmarks.cases import CASES

    table = Table("case", "one step", "parameters", box=None, header_style="bold")
    for case in CASES.values():
        table.add_row(case.name, case.step, " ".join(f"{key}={value}" for key, value in case.defaults.items()))
    answers.print(table)
    return DONE


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    import torch

    from dpfa_benchmarks.cases import CASES
    from dpfa_benchmarks.runner import run

    if options.case is not None and options.case not in CASES:
        raise ValueError(f"the case must be one of {', '.join(CASES)}, got {options.case!r}.")
    if options.case is None and options.set:
        raise ValueError("--set changes the parameters of one case; name it.")
    if options.repeats < 1 or (options.threads is not None and options.threads < 1):
        raise ValueError("--repeats and --threads must be at least 1.")
    if options.toy and options.record:
        raise ValueError("a toy run is not recorded; leave out --toy or --record.")
    if options.threads:
        torch.set_num_threads(options.threads)
    command = shlex.join(["python", "-m", "dpfa_benchmarks", *arguments])
    cases = CASES.values() if options.case is None else (CASES[options.case],)
    if options.peer_path and not any("peer_path" in case.defaults for case in cases):
        raise ValueError(f"--peer-path must be given to a case that has such a peer, got {options.case!r}.")
    for case in cases:
        peer = {"peer_path": options.peer_path} if options.peer_path and "peer_path" in case.defaults else {}
        changes = {**(case.toy if options.toy else {}), **peer, **dict(_assignment(text) for text in options.set)}
        columns = (TextColumn(f"{case.name} {{task.description}}"), BarColumn(), TaskProgressColumn())
        with Progress(*columns, TimeRemainingColumn(), console=messages) as bar:
            tasks = {stage: bar.add_task(stage, total=None) for stage in ("checking", "timing", "memory")}

            def show(stage: str, done: int, total: int, bar: Progress = bar, tasks: Any = tasks) -> None:
                bar.update(tasks[stage], completed=done, total=total)

            found = run(case, changes, repeats=options.repeats, command=command, progress=show)
        if options.record:
            records.append(options.record, found)
        if options.json:
            sys.stdout.write(json.dumps(found.to_json(), sort_keys=True, allow_nan=False) + "\n")
        else:
            _show(found)
    return DONE


def _plot(folder: Path, out: Path) -> int:
    from dpfa_benchmarks.plot import write_page

    for path in write_page(folder, out):
        answers.print(str(path))
    return DONE


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set needs NAME=VALUE, got {text!r}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _show(found: Record) -> None:
    table = Table("contender", "ms per step (p20 p50 p80)", "ours / it", "peak memory", "error", box=None)
    for result in found.results:
        if result.seconds is None:
            table.add_row(result.name, escape(result.unavailable))
            continue
        ratio = found.ratios.get(result.name)
        table.add_row(
            result.name,
            _three(result.seconds, 1e3),
            _three(ratio) if ratio else "",
            f"{(result.peak_memory_bytes or 0) / 2**20:.0f} MiB",
            "" if result.error is None else f"{result.error:.1e}",
        )
    answers.print(table)


def _three(values: Quantiles, scale: float = 1.0) -> str:
    return " ".join(f"{value * scale:.3g}" for value in (values.p20, values.p50, values.p80))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
