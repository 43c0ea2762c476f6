"""SIGKILL at any moment never leaves less spending on disk than was released.

Writers are forked from this process, so a kill costs milliseconds and not the start of an interpreter. A release
is one byte appended to a file, which the system keeps when the writer dies.
"""

from __future__ import annotations

import os
import random
import select
import signal
import time
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from dpfa_core.events import Gaussian
from dpfa_core.ledger import Ledger

TERMS: dict[str, Any] = {"unit": "example", "relation": "replace", "delta": 1e-5}
LINE: dict[str, Any] = {"purpose": "release", "mechanism": "gaussian", "backend": "torch"}

Release = Callable[[], object]
Work = Callable[[Ledger, Release], None]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def record_each(ledger: Ledger, release: Release) -> None:
    while True:
        ledger.record(Gaussian(1.0), **LINE)
        release()


def reserve_several(ledger: Ledger, release: Release) -> None:
    for size in count(1):
        reservation = ledger.reserve(Gaussian(1.0), 1 + size % 4, **LINE)
        # every third reservation is left with unused releases
        for _ in range(reservation.count - (size % 3 == 0)):
            reservation.use()
            release()


def release_before_it_is_recorded(ledger: Ledger, release: Release) -> None:
    while True:
        release()
        # A write that is killed while it waits for the disk is there all the same, so most kills would find it.
        time.sleep(0.01)
        ledger.record(Gaussian(1.0), **LINE)


class Killing:
    """A ledger, the file of what was released, and writers that are killed."""

    def __init__(self, folder: Path) -> None:
        self.ledger, self.released, self.failure = folder / "spent.ledger", folder / "released", folder / "failure"
        self.released.touch()

    def start(self, work: Work) -> tuple[int, int]:
        """A forked writer: its process id and a pipe that says something at its first release."""
        first, told = os.pipe()
        child = os.fork()
        if child:
            os.close(told)
            return child, first
        try:
            file = os.open(self.released, os.O_WRONLY | os.O_APPEND)
            said = False

            def release() -> None:
                nonlocal said
                os.write(file, b".")
                if not said:
                    said = bool(os.write(told, b"."))

            work(Ledger.open(self.ledger, **TERMS), release)
        except BaseException:
            self.failure.write_text(traceback.format_exc())
        finally:
            os._exit(1)

    def kill(self, work: Work, writers: int, delay: float, *, after_first: bool) -> None:
        """Start `writers` at once and kill them `delay` seconds after their start or their first release."""
        started = [self.start(work) for _ in range(writers)]
        if after_first:
            # Whichever comes first: the others may be waiting for its lock.
            (first, *_), _, _ = select.select([first for _, first in started], [], [], 30.0)
            assert os.read(first, 1) == b".", self.failure.read_text()
        time.sleep(delay)
        for child, first in started:
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, self.failure.read_text()
            os.close(first)

    def owed(self) -> int:
        """Releases that the ledger does not know of."""
        with Ledger.open(self.ledger, **TERMS) as ledger:
            recorded = sum(n for _, n in ledger.events())
        return self.released.stat().st_size - recorded


@pytest.mark.parametrize(
    ("work", "writers", "kills", "after_first"),
    [
        (record_each, 1, 70, True),
        (record_each, 1, 60, False),
        (record_each, 2, 40, True),
        (reserve_several, 1, 70, True),
        (reserve_several, 2, 40, True),
    ],
)
def test_what_was_released_is_recorded_whenever_the_writer_is_killed(
    tmp_path: Path, work: Work, writers: int, kills: int, after_first: bool
) -> None:
    killing, moments = Killing(tmp_path), random.Random(0)
    for _ in range(kills):
        killing.kill(work, writers, moments.uniform(0.0, 0.02), after_first=after_first)
        assert killing.owed() <= 0
    assert killing.released.stat().st_size >= (kills if after_first else 1)
    with Ledger.open(killing.ledger, **TERMS) as ledger:
        before = len(list(ledger.releases()))
        ledger.record(Gaussian(1.0), **LINE)
        assert len(list(ledger.releases())) == before + 1


def test_a_ledger_whose_maker_was_killed_can_be_opened_and_used(tmp_path: Path) -> None:
    moments = random.Random(0)
    begun = 0
    for number in range(80):
        folder = tmp_path / str(number)
        folder.mkdir()
        killing = Killing(folder)
        killing.kill(record_each, 1, moments.uniform(0.0, 0.008), after_first=False)
        begun += killing.ledger.exists() and not killing.released.stat().st_size
        assert killing.owed() <= 0
        with Ledger.open(killing.ledger, **TERMS) as ledger:
            ledger.record(Gaussian(1.0), **LINE)
    assert begun, "no kill came between the making of the file and its first release"


def test_a_release_before_its_record_would_be_seen(tmp_path: Path) -> None:
    killing, moments = Killing(tmp_path), random.Random(0)
    for _ in range(25):
        killing.kill(release_before_it_is_recorded, 1, moments.uniform(0.0, 0.02), after_first=True)
    assert killing.owed() > 0
