"""The page of attacks lists every case, with what the tests ask of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dpfa_verification.audit.cases import Case, sequence_cases, token_cases

PAGE = Path(__file__).resolve().parents[2] / "docs" / "concepts" / "attacks.md"
REACHED = dict(re.findall(r"^\| (.+) \| ([01]\.\d{5}) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
CASES = [*token_cases(), *sequence_cases()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_page_says_what_was_reached(case: Case) -> None:
    assert (0.999 if case.attained else 0.65) <= float(REACHED[case.title]) <= 1.0


def test_the_page_has_no_case_that_is_not_attacked() -> None:
    assert set(REACHED) == {case.title for case in CASES}
