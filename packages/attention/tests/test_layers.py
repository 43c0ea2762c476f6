"""Layers that meet the same records compose in their ledger: exactly where all noise is Gaussian, by PLD otherwise."""

from __future__ import annotations

import math
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting import pld
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor, nn

from dpfa_attention.enhanced_module import EnhancedDPFlashAttention
from dpfa_attention.module import DPFlashAttention
from dpfa_core.events import Gaussian, Laplace
from dpfa_core.ledger import Ledger
from dpfa_core.spending import spending

E, H, DELTA = 32, 2, 1e-5


class Stack(nn.Module):
    """A release for each layer, and nothing around them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def run(ledger: Ledger, *layers: nn.Module, times: int = 1) -> None:
    for _ in range(times):
        Stack(*layers)(torch.randn(2, 5, E))
    assert len(list(ledger.releases())) == times * len(layers)


def gaussian_epsilon(mu: float, delta: float) -> float:
    def excess(epsilon: float) -> float:
        return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)) - delta)

    return float(brentq(excess, 0.0, 100.0, xtol=1e-12))


@pytest.mark.parametrize("times", [1, 4])
def test_gaussian_layers_cost_what_the_sum_of_their_squares_costs(times: int) -> None:
    ledger = Ledger.memory(unit="sequence", relation="replace", delta=DELTA)
    one = DPFlashAttention(E, H, 0.5, 1e-7, ledger=ledger)
    two = EnhancedDPFlashAttention(E, H, 1.5, 1e-7, mechanism="gaussian", noise_structure="low_rank", ledger=ledger)
    run(ledger, one, two, times=times)
    parts = [line.event.events for line in ledger.releases()]
    assert all(isinstance(noise, Gaussian) for noise, _ in parts)
    mu = math.sqrt(math.fsum(noise.noise_multiplier**-2.0 for noise, _ in parts))
    exact = gaussian_epsilon(mu, DELTA - math.fsum(end.delta for _, end in parts))
    assert exact * (1 - 1e-9) <= ledger.spent() <= exact * (1 + 1e-6)
    bounds = dict(spending(list(ledger.events()), DELTA).by_accountant)
    assert bounds["gdp"] == min(bounds.values()) == ledger.spent()
    # less than the layers' own costs added, and what each of them says of the whole
    alone = [module.get_privacy_spent() for module in (one, two)]
    assert max(map(float, alone)) < ledger.spent() < sum(map(float, alone))
    assert [report["ledger_epsilon"] for report in alone] == [ledger.spent()] * 2


def test_layers_of_which_one_is_not_gaussian_are_priced_by_their_loss_distributions() -> None:
    ledger = Ledger.memory(unit="sequence", relation="replace", delta=DELTA)
    options: dict[str, Any] = {"ledger": ledger}
    run(
        ledger,
        DPFlashAttention(E, H, 0.5, 1e-7, **options),
        DPFlashAttention(E, H, 0.7, 1e-7, noise_mechanism="laplace", **options),
    )
    (gaussian, end), (laplace, tail) = (line.event.events for line in ledger.releases())
    assert isinstance(laplace, Laplace)
    bounds = dict(spending(list(ledger.events()), DELTA).by_accountant)
    assert "gdp" not in bounds
    assert min(bounds.values()) == ledger.spent()
    assert bounds["pld"] == pytest.approx(ledger.spent(), rel=1e-3)
    assert bounds["pld"] < 0.98 * bounds["rdp"]
    theirs = pld.PLDAccountant()
    theirs.compose(dp_accounting.GaussianDpEvent(gaussian.noise_multiplier))
    theirs.compose(dp_accounting.LaplaceDpEvent(laplace.noise_multiplier))
    assert bounds["pld"] == pytest.approx(theirs.get_epsilon(DELTA - end.delta - tail.delta), rel=1e-4)
