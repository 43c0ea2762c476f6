"""The page of the noise structures is what their plans say."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpfa_benchmarks import structures

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "structures.md"


def test_the_page_is_what_the_code_computes() -> None:
    assert PAGE.read_text(encoding="utf-8") == structures.page()


def test_every_structure_needs_less_energy_than_even_noise() -> None:
    for queries in ("public", "private"):
        lines = [line.split("|") for line in structures.structure_rows(queries)]
        assert float(lines[0][5]) == 1.0
        assert all(float(line[5]) < 0.6 for line in lines[1:])


def test_a_page_can_be_written_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert structures.main(["--page", str(tmp_path / "page.md")]) == 0
    assert structures.main([]) == 0
    assert capsys.readouterr().out == (tmp_path / "page.md").read_text(encoding="utf-8")
