"""``python -m dpfa_benchmarks.real_text``: accuracy of a private memory and of DP-Forward against epsilon.

A seed draws the split; noise, keys and answers come from the operating system, so that two runs differ.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from dpfa_benchmarks import surroundings
from dpfa_benchmarks.real_text import docstrings, page, tasks
from dpfa_benchmarks.real_text.bag_of_words import bag_of_words
from dpfa_benchmarks.real_text.public_encoder import PublicEncoder
from dpfa_benchmarks.record import append_line, line_of

LEAST = 500
"""Texts of a class: fewer would leave too few test texts to ask in one call."""

LIBRARIES = ("numpy", "scipy", "scikit-learn", "sympy", "networkx", "matplotlib", "polars")
"""Whose versions change the texts most."""


def main(arguments: list[str]) -> int:
    """Run both tasks, print the record, append it where ``--record`` says; or only write the page of a record."""
    parser = argparse.ArgumentParser(prog="python -m dpfa_benchmarks.real_text", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="splits 0, 1, 2 ...")
    parser.add_argument("--texts", type=int, default=5000, help="of each private class, at most")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the record to this file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="run nothing: the page of the newest record in --of")
    parser.add_argument("--of", type=Path, default=page.RECORD, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.page:
        page.write(page.newest(options.of), options.page)
        return 0
    if options.seeds < 1 or options.texts < LEAST:
        parser.error(f"--seeds must be at least 1 and --texts at least {LEAST}.")
    line = line_of(measured(options.seeds, options.texts, arguments))
    sys.stdout.write(line)
    if options.record:
        append_line(options.record, line)
    return 0


def measured(seeds: int, texts: int, arguments: list[str]) -> dict[str, Any]:
    """The record of one run; infinities are null in it."""
    start, machine = time.perf_counter(), surroundings.machine()
    private = {name: docstrings.read(name, texts) for name in docstrings.PRIVATE}
    public = {name: docstrings.read(name) for name in docstrings.PUBLIC}
    encoder = PublicEncoder([text for found in public.values() for text in found])
    read = time.perf_counter() - start
    texts_of_class = [(text, kind) for kind, found in enumerate(private.values()) for text in found]
    ids = encoder.ids([text for text, _ in texts_of_class])
    steps, runs = [(seed, epsilon) for seed in range(seeds) for epsilon in tasks.EPSILONS], []
    for seed, epsilon in track(steps, description="seeds and epsilons", console=Console(stderr=True)):
        split = split_of(texts_of_class, ids, seed)
        runs += [{"seed": seed, "epsilon": epsilon} | line for line in lines(encoder, split, seed, epsilon)]
    commit, dirty = surroundings.commit()
    return {
        "what": page.WHAT,
        "command": shlex.join(["python", "-m", "dpfa_benchmarks.real_text", *arguments]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "machine": machine,
        "threads": os.environ.get("OMP_NUM_THREADS", "torch's own choice"),
        "versions": surroundings.versions(LIBRARIES),
        "private": {name: len(found) for name, found in private.items()},
        "public": {name: len(found) for name, found in public.items()},
        "seconds": time.perf_counter() - start,
        "seconds_to_read_and_encode": read,
        "runs": [{key: _finite(value) for key, value in run.items()} for run in runs],
    }


def lines(encoder: PublicEncoder, split: tasks.Split, seed: int, epsilon: float) -> Iterator[dict[str, Any]]:
    """All tasks, and for the first seed the comparison with a head on words."""
    sizes = {"train": len(split.train), "test": len(split.test)}
    for line in tasks.accuracies(encoder, split, epsilon):
        yield line | sizes
    if seed == 0:
        yield {"task": "bag of words", "accuracy": bag_of_words(split, len(encoder.numbers), epsilon)} | sizes


def split_of(texts: list[tuple[docstrings.Text, int]], ids: torch.Tensor, seed: int) -> tasks.Split:
    """Train and test texts in a random order: the queries of one call are of all classes."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([kind for _, kind in texts])
    test = torch.tensor([docstrings.in_test(text, seed) for text, _ in texts])
    kept, asking = order[~test[order]], order[test[order]]
    return tasks.Split(ids[kept], labels[kept], ids[asking], labels[asking], int(labels.max()) + 1)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and math.isinf(value) else value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
