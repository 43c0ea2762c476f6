"""Epsilon is never shown below its value."""

from __future__ import annotations

import math

import pytest

from dp_flash_attention.numbers import number, strict


@pytest.mark.parametrize(
    ("value", "shown"),
    [(2.99986, "3"), (2.0001, "2.001"), (0.12341, "0.1235"), (0.0, "0.0"), (math.inf, "inf"), (12345.6, "12350")],
)
def test_numbers_round_up(value, shown):
    assert number(value) == shown
    assert float(number(value)) >= value


def test_strict_leaves_nothing_that_json_does_not_know():
    assert strict({"a": [math.inf, (math.nan, 1.0)]}) == {"a": ["inf", ["nan", 1.0]]}
