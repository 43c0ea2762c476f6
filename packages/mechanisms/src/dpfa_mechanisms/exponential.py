"""The exponential mechanism: one of several candidates, the better its score the likelier, sampled exactly."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from dpfa_core.checks import fraction, is_real, positive, require
from dpfa_core.events import Exponential as ExponentialEvent
from dpfa_core.spec import AttentionProblem, Claim, Norm, PrivacySpec, Reasons
from dpfa_mechanisms.bernoulli import RandomBits, bernoulli_exp, uniform_below


class Exponential:
    """Selects candidate i with probability proportional to exp(epsilon score_i / (2 sensitivity)).

    The sensitivity is the largest change of any one score. A selection clips no rows and adds no noise, so
    ``norm`` is there for the contract only; it says "l1", as for the other mechanism of a pure epsilon.
    ``noise_multiplier`` = 1 / epsilon.
    """

    contract_version = 1
    name = "exponential"
    kind: Literal["additive", "selection"] = "selection"
    norm: Norm = "l1"

    def supports(self, spec: PrivacySpec, problem: AttentionProblem) -> Reasons:
        """One reason against: a selection picks a candidate and releases no attention."""
        return ("the exponential mechanism picks one of several scored candidates and releases no attention.",)

    def calibrate(self, epsilon: float, delta: float) -> float:
        """1 / epsilon, rounded up, whatever `delta` is.

        Args: epsilon > 0 and finite, 0 <= delta < 1.
        Raises: PrivacyParameterError.
        Source: McSherry & Talwar 2007.
        """
        positive("epsilon", epsilon, remedy="Without privacy, take the best candidate.")
        fraction("delta", delta)
        multiplier = math.nextafter(1.0 / epsilon, math.inf)
        require(math.isfinite(multiplier), "epsilon must not be below the normal numbers", epsilon)
        return multiplier

    def event(self, noise_multiplier: float) -> ExponentialEvent:
        """The price of one selection with epsilon = 1 / noise_multiplier, rounded up."""
        positive("noise_multiplier", noise_multiplier)
        return ExponentialEvent(math.nextafter(1.0 / noise_multiplier, math.inf))

    def select(
        self,
        scores: Sequence[float | Fraction],
        sensitivity: float | Fraction,
        epsilon: float,
        random_bits: RandomBits = os.urandom,
    ) -> int:
        """The index of the candidate that is picked.

        A candidate is proposed uniformly and accepted with probability exp(-epsilon (best - score) / (2
        sensitivity)), by coins of exactly that probability: floats are taken for the rational numbers they are.
        The time that it takes depends on the scores; keep it from whoever must not learn them.

        Guarantee: tested (chi-square against the exact law).
        Args: `scores`, at least one, finite; `sensitivity` > 0 in units of the scores, `epsilon` > 0;
        `random_bits(n)` returns n secret uniform bytes.
        Raises: PrivacyParameterError.
        Source: McSherry & Talwar 2007; Canonne, Kamath & Steinke 2020, Algorithm 1.
        """
        require(len(scores) > 0, "scores must hold at least one number", tuple(scores))
        for score in scores:
            good = isinstance(score, Fraction) or (is_real(score) and math.isfinite(score))
            require(good, "each of scores must be a finite number", score)
        if not isinstance(sensitivity, Fraction) or sensitivity <= 0:
            positive("sensitivity", sensitivity)
        positive("epsilon", epsilon)
        exact = [Fraction(score) for score in scores]
        best, rate = max(exact), Fraction(epsilon) / (2 * Fraction(sensitivity))
        while True:
            index = uniform_below(len(exact), random_bits)
            if bernoulli_exp(rate * (best - exact[index]), random_bits):
                return index

    def claims(self) -> tuple[Claim, ...]:
        """What the verifier must discharge."""
        return (
            Claim("price", status="tested", source="McSherry & Talwar 2007"),
            Claim("selection_law", status="tested", source="Canonne, Kamath & Steinke 2020, Algorithm 1"),
        )
