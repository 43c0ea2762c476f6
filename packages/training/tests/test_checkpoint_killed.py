"""Fault 14 with real deaths: SIGKILL at random places, resumed until the end, equal to the run that lived."""

import multiprocessing
import random
import signal

import pytest
import torch
from killed_run import DRAWS, run

from dpfa_core.ledger import Ledger

KILLS = 5


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dpfa_training", "dpfa_accounting", "torch._dynamo"])
    return context


def one(processes, *arguments):
    process = processes.Process(target=run, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize(("workers", "sampling"), [(0, "poisson"), (2, "poisson"), (0, "balls_in_bins")])
def test_a_run_killed_at_random_places_equals_the_uninterrupted_one(tmp_path, processes, workers, sampling):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    assert one(processes, str(whole), workers, sampling, None) == 0
    places, deaths = random.Random(workers), 0
    while (code := one(processes, str(parts), workers, sampling, places.randrange(8, 60))) == -signal.SIGKILL:
        deaths += 1
        if deaths == KILLS:
            code = one(processes, str(parts), workers, sampling, None)
            break
    assert code == 0
    assert deaths >= 2
    expected, found = (torch.load(folder / "end.pt") for folder in (whole, parts))
    assert not found["secure"]  # the same keys from the first to the last process
    for name, value in expected["weights"].items():
        assert torch.equal(value, found["weights"][name])
    spent = []
    for folder in (whole, parts):
        with Ledger.read(folder / "ledger.db") as ledger:
            spent.append(list(ledger.events()))
    assert spent[0] == spent[1]
    assert sum(count for _, count in spent[0]) == (DRAWS if sampling == "poisson" else 3)
