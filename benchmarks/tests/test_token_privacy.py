"""The page and the picture of token privacy are what the library's sensitivities and calibration say."""

from __future__ import annotations

import dataclasses
import math
import re
from html import unescape
from pathlib import Path

import pytest

from dpfa_benchmarks import token_privacy
from dpfa_core.spec import PrivacySpec
from dpfa_mechanisms.gaussian import Gaussian
from dpfa_mechanisms.sensitivity import sensitivity

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "token-privacy.md"


def test_the_page_is_what_the_code_computes() -> None:
    assert PAGE.read_text(encoding="utf-8") == token_privacy.page("token-privacy.svg")


def test_the_picture_carries_the_numbers_that_the_code_computes() -> None:
    # a picture's bytes depend on the version of matplotlib
    carried = re.search(r"<dc:description>(.*?)</dc:description>", PAGE.with_suffix(".svg").read_text(), re.DOTALL)
    assert carried is not None
    assert unescape(carried[1]) == token_privacy.description()


@pytest.mark.parametrize("queries", ["public", "private"])
@pytest.mark.parametrize("mask", ["dense", "causal", "window of 64"])
def test_noise_is_the_sensitivity_times_the_multiplier_and_never_above_the_naive_one(mask: str, queries: str) -> None:
    claim = PrivacySpec(epsilon=token_privacy.EPSILON, delta=token_privacy.DELTA, unit="token", queries=queries)  # type: ignore[arg-type]
    multiplier = Gaussian().calibrate(claim.epsilon, claim.delta)
    for length in (64, 256):
        found = [token_privacy.std(mask, queries, length, bound) for bound in token_privacy.LOGIT_BOUNDS]
        assert found == sorted(found)
        assert found[-1] <= token_privacy.naive(length)
        for std, bound in zip(found, token_privacy.LOGIT_BOUNDS, strict=True):
            fields = token_privacy.MASKS[mask] | {"q_len": length, "kv_len": length, "logit_bound": bound}
            moved = sensitivity(claim, dataclasses.replace(token_privacy.SHAPE, **fields))
            # what is above the multiplier pays the end of the sampler
            assert 1.0 <= std / (multiplier * moved.value) < 1.01
            assert moved.naive * multiplier == pytest.approx(token_privacy.naive(length), rel=0.01)


def test_the_weight_of_one_key_in_64_bounds_the_noise_by_hand() -> None:
    """Dense, public queries, B = 1: 2 C sqrt(H S) / (1 + (S - 1) e^-2), but for the margin of rounding."""
    by_hand = 2.0 * math.sqrt(8 * 64) / (1.0 + 63 * math.exp(-2.0))
    ratio = token_privacy.std("dense", "public", 64, 1.0) / token_privacy.naive(64)
    assert ratio == pytest.approx(by_hand / (2.0 * math.sqrt(8 * 64)), rel=1e-3)


def test_page_and_picture_can_be_written_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert token_privacy.main(["--page", str(tmp_path / "token-privacy.md")]) == 0
    assert (tmp_path / "token-privacy.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert token_privacy.main([]) == 0
    assert capsys.readouterr().out == (tmp_path / "token-privacy.md").read_text(encoding="utf-8")
