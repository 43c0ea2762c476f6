"""The command line, called in this process."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dp_flash_attention.cli import main


class Outcome(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def dpfa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run ``dpfa ARGUMENTS`` and return exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["dpfa", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run


GOOD = ["wonderful", "delightful", "superb", "moving", "charming", "brilliant", "touching", "gripping"]
BAD = ["dreadful", "boring", "clumsy", "tedious", "shallow", "annoying", "pointless", "lifeless"]
THINGS = ["plot", "cast", "music", "pacing", "dialogue", "ending", "camera", "script", "humour", "setting"]
FILLER = (
    *(["the", "film", "was", "shown", "on", "a", "rainy", "evening"]),
    *(["and", "we", "talked", "about", "it", "on", "the", "way", "home"]),
)


def reviews(rows: int, seed: int = 0, label_noise: float = 0.12) -> list[tuple[str, str]]:
    """Reviews of several sentences with a leaning vocabulary; some labels are wrong."""
    draw = random.Random(seed)
    found = []
    for _ in range(rows):
        positive = draw.random() < 0.5
        parts = []
        for _ in range(draw.randint(2, 5)):
            leaning = positive if draw.random() < 0.8 else not positive
            word, thing = draw.choice(GOOD if leaning else BAD), draw.choice(THINGS)
            parts.append(
                draw.choice((f"The {thing} was {word}.", f"What a {word} {thing}!", f"I found the {thing} {word}."))
            )
            parts.append(" ".join(draw.sample(FILLER, 5)) + ".")
        label = positive if draw.random() >= label_noise else not positive
        found.append((" ".join(parts), "good" if label else "bad"))
    return found


@pytest.fixture
def csv(tmp_path: Path) -> Callable[..., Path]:
    """Write a CSV of reviews and return its path."""

    def write(rows: int = 300, columns: tuple[str, str] = ("text", "label"), **options: Any) -> Path:
        import csv

        path = tmp_path / "reviews.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(reviews(rows, **options))
        return path

    return write
