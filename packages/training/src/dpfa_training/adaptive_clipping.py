"""A clip threshold that follows a quantile of the gradient norms, by a count that gets noise of its own.

Each step releases two things: the noised sum of gradients and the noised number of samples at or below the
threshold. Together they cost what the plan's event says: one sample moves the sum by the threshold C and the
centred count ``sum (1[norm <= C] - 1/2)`` by 1/2 (by twice as much where it is replaced), so with noise multipliers
z_grad and z_count the pair is one Gaussian release of noise multiplier ``(z_grad^-2 + z_count^-2)^(-1/2)``. The
gradients' noise is raised until that is the plan's z; nothing else is charged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch

from dpfa_core.checks import fraction, one_of, positive
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.records import Record

COUNT_PARAMETER = 2**32 - 1
"""The number under which the count draws its noise bits; no model parameter may have it."""

COUNT = "(samples at or below the threshold)"
"""Where the engine keeps the centred count of a draw, beside the sums of the parameters."""

USUAL_SHARE = 20.0
"""The default noise of the count is the expected batch size over this (Andrew et al. 2021) ..."""

LEAST_RATIO = 5.0
"""... or this many times the joint noise multiplier, which raises the gradients' noise by 2 %, if that is more."""

WIDEST = 2.0**20
"""The threshold stays within this factor of where it began: noise alone must not carry it out of float32."""


@dataclass(frozen=True, kw_only=True)
class QuantileClipping(Record):
    """Flat clipping whose threshold moves towards a quantile of the norms; ``max_grad_norm`` is where it begins.

    After each step C becomes ``C exp(-learning_rate (b - quantile))``, b the noisy share of norms at or below C.

    Guarantee: tested. Joint with the gradients' release: the event is that of the plan's noise multiplier, and the
    path of the threshold is part of what it covers.
    Args:
        quantile: share of samples whose gradient is to stay whole.
        learning_rate: eta, in units of log C.
        count_noise_std: of the noise on the centred count; by default the expected batch size / 20, or 5 times
            the noise multiplier times the count's sensitivity if that is more.
    Raises: PrivacyParameterError.
    Source: Andrew, Thakkar, McMahan & Ramaswamy 2021, Theorem 1.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise_std: float | None = None
    rule: Literal["quantile"] = "quantile"

    def __post_init__(self) -> None:
        fraction("quantile", self.quantile, zero=False)
        positive("learning_rate", self.learning_rate)
        if self.count_noise_std is not None:
            positive("count_noise_std", self.count_noise_std, remedy="Without noise the count is not private.")
        one_of("rule", self.rule, ("quantile",))

    def count_std(self, noise_multiplier: float, expected_batch_size: int, count_sensitivity: float) -> float:
        """Std of the noise on the centred count; 0 in a run without noise."""
        if noise_multiplier == 0:
            return 0.0
        usual = max(expected_batch_size / USUAL_SHARE, LEAST_RATIO * noise_multiplier * count_sensitivity)
        return usual if self.count_noise_std is None else self.count_noise_std

    def gradient_noise_multiplier(
        self, noise_multiplier: float, expected_batch_size: int, count_sensitivity: float
    ) -> float:
        """Noise multiplier of the gradients, rounded up, with which both releases have `noise_multiplier` jointly.

        Raises: PrivacyParameterError if the count alone costs as much.
        """
        if noise_multiplier == 0:
            return 0.0
        std = self.count_std(noise_multiplier, expected_batch_size, count_sensitivity)
        left = 1 / Fraction(noise_multiplier) ** 2 - (Fraction(count_sensitivity) / Fraction(std)) ** 2
        if left <= 0:
            raise PrivacyParameterError(
                f"count_noise_std must exceed {noise_multiplier * count_sensitivity:.6g}, the noise multiplier times "
                f"the count's sensitivity, got {std:.6g}: the count alone would cost the whole step. Raise it, or "
                "leave it out."
            )
        found = math.sqrt(1 / left)
        while Fraction(found) ** 2 * left < 1:
            found = math.nextafter(found, math.inf)
        return found


class MovingThreshold:
    """The threshold of a run: public, since each move is computed from a released number."""

    def __init__(self, start: float, rule: QuantileClipping, expected_batch_size: int) -> None:
        self.start, self.rule, self.expected_batch_size = start, rule, expected_batch_size
        self.value = start

    def centred_count(
        self, norms: torch.Tensor, weights: torch.Tensor, units: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(1,) float64: what samples of weight 1 add to the count; one whose norm is not finite lies above.

        Args: `units` of the rows that `weights` is about, where the norms are those of units.
        """
        if units is not None:
            weights = weights.new_zeros(len(norms)).scatter_(0, units, weights)
        below = (norms <= self.value).to(torch.float64) - 0.5
        return (below * weights.to(below)).sum().reshape(1)

    def move(self, noisy_count: float) -> None:
        """One step, by the noised centred count of a whole draw."""
        share = 0.5 + noisy_count / self.expected_batch_size
        ratio = math.log(self.value / self.start) - self.rule.learning_rate * (share - self.rule.quantile)
        widest = math.log(WIDEST)
        self.value = self.start * math.exp(min(widest, max(-widest, ratio)))
