"""Numbers that others have published, each with the place where it stands."""

from __future__ import annotations

import pytest

from dpfa_accounting.calibration import calibrate
from dpfa_core.events import EpsilonDelta, Event, Gaussian, PoissonSampled, SelfComposed
from dpfa_core.registry import ACCOUNTANTS


def epsilon(accountant: str, event: Event, delta: float) -> float:
    return float(ACCOUNTANTS.create(accountant).compose(event).epsilon(delta))


def steps(noise_multiplier: float, sampling_probability: float, count: int) -> Event:
    return SelfComposed(PoissonSampled(sampling_probability, Gaussian(noise_multiplier)), count)


def test_opacus_renyi_value() -> None:
    """pytorch/opacus, opacus/tests/accountants_test.py, test_rdp_accountant: 7.32911117143."""
    found = epsilon("rdp", steps(1.5, 0.04, 2250), 1e-5)
    # its orders lie closer together around the best one
    assert 7.32911117143 <= found <= 7.32911117143 * (1 + 1e-4)


def test_opacus_prv_value_and_pld_within_its_error_bound() -> None:
    """The same file, test_prv_accountant, 90 // 0.04 steps: 6.777395712150674, with an error bound of 0.01."""
    event = steps(1.5, 0.04, 2249)
    assert epsilon("prv", event, 1e-5) == pytest.approx(6.777395712150674, rel=1e-6)
    assert 6.777395712150674 - 0.02 <= epsilon("pld", event, 1e-5) <= 6.777395712150674


@pytest.mark.parametrize(("count", "published"), [(2250, 1.416), (2000, 1.3562)])
def test_opacus_noise_multipliers(count: int, published: float) -> None:
    """The same file, test_get_noise_multiplier_rdp_epochs and _rdp_steps, four decimals, epsilon to 0.01."""
    found = calibrate(lambda z: steps(z, 0.04, count), EpsilonDelta(8.0, 1e-5), accountant="rdp")
    assert found == pytest.approx(published, abs=2e-4)


def test_dp_accounting_noise_for_epsilon_one_by_renyi() -> None:
    """google/differential-privacy, rdp_privacy_accountant_test.py: 4.530877117 gives exactly (1, 1e-6)."""
    assert 1.0 <= epsilon("rdp", Gaussian(4.530877117), 1e-6) <= 1.0 + 1e-4
    assert epsilon("gdp", Gaussian(4.530877117), 1e-6) < 1.0


@pytest.mark.parametrize(
    ("noise_multiplier", "epochs", "published"), [(1.12, 60, 2.92), (0.6, 30, 9.74), (1.2, 10, 1.20)]
)
def test_tensorflow_privacy_tutorial_is_an_upper_bound_that_later_conversions_improve(
    noise_multiplier: float, epochs: int, published: float
) -> None:
    """tensorflow/privacy, tutorials/README.md: batches of 256 among 60,000 at delta = 1e-5, by an older conversion."""
    event = steps(noise_multiplier, 256 / 60_000, epochs * 60_000 // 256)
    by_rdp, by_pld = epsilon("rdp", event, 1e-5), epsilon("pld", event, 1e-5)
    assert by_pld < by_rdp < published
    assert by_rdp > 0.75 * published
