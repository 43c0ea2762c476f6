"""What sampling the records of every step saves."""

from __future__ import annotations

from dpfa_accounting.black_box import subsampled
from dpfa_accounting.optimal_composition import OptimalComposition
from dpfa_core.checks import fraction, integer, one_of, positive
from dpfa_core.errors import PrivacyParameterError, UnsupportedEvent
from dpfa_core.events import EpsilonDelta, Gaussian, PoissonSampled
from dpfa_core.spec import RELATIONS, Relation
from dpfa_core.spending import first_party_accountants, upper_bound

SKIPPED = ("prv",)
"""Seconds where pld takes tenths, and its upper end lies above that of pld by its error bound."""


def amplified(epsilon: float, delta: float, sampling_rate: float) -> EpsilonDelta:
    """What an (epsilon, delta)-private release costs on a random sample, rounded up.

    Guarantee: tested (attained by randomised response). Under add_or_remove the sample is Poisson, under
    replace it has a fixed size; the release must keep (epsilon, delta) under the same relation.
    Returns: log(1 + q (exp(epsilon) - 1)) and q delta, with q the sampling rate.
    Source: Balle, Barthe & Gaboardi 2018, Theorems 8 and 9.
    """
    positive("epsilon", epsilon)
    fraction("delta", delta)
    fraction("sampling_rate", sampling_rate, zero=False, one=True)
    return subsampled(epsilon, delta, sampling_rate)


class SubsamplingAmplification:
    """Epsilon of `num_steps` releases, each on a fresh random sample of the records.

    Guarantee: tested (never below the exact loss distribution of sampled Laplace and randomised response).
    Args: `base_epsilon` and `base_delta` of one release on the whole data; `sampling_rate` in (0, 1];
    `noise_multiplier`: the release is this Gaussian, which is then priced itself, and the base numbers are
    not used; `relation`: add_or_remove for Poisson samples, replace for samples of a fixed size.
    Raises: PrivacyParameterError.
    Source: Balle, Barthe & Gaboardi 2018, Theorems 8 and 9; Kairouz, Oh & Viswanath 2015, Theorem 3.3.
    """

    def __init__(
        self,
        base_epsilon: float,
        sampling_rate: float,
        num_steps: int,
        *,
        base_delta: float = 0.0,
        noise_multiplier: float | None = None,
        relation: Relation = "add_or_remove",
    ) -> None:
        positive("base_epsilon", base_epsilon)
        fraction("sampling_rate", sampling_rate, zero=False, one=True)
        integer("num_steps", num_steps, least=1)
        fraction("base_delta", base_delta)
        one_of("relation", relation, RELATIONS)
        self._num_steps = num_steps
        self._sampled: PoissonSampled | None = None
        self._composition = OptimalComposition([(amplified(base_epsilon, base_delta, sampling_rate), num_steps)])
        if noise_multiplier is not None:
            if relation == "replace" and sampling_rate < 1:
                raise PrivacyParameterError(
                    "a sampled Gaussian must be priced under add_or_remove here, got relation='replace'; "
                    "compose FixedSizeSampled events, which know the sample's size."
                )
            self._sampled = PoissonSampled(sampling_rate, Gaussian(noise_multiplier))
        self._method = "Balle-Barthe-Gaboardi amplification of (epsilon, delta), Kairouz-Oh-Viswanath composition"
        if self._sampled is not None:
            self._method = "Poisson-sampled Gaussian, least bound of the installed accountants"

    @property
    def method(self) -> str:
        """What the epsilon comes from; after ``compute_epsilon`` also which accountant gave it."""
        return self._method

    def compute_epsilon(self, delta: float) -> float:
        """An upper bound on epsilon at `delta`, rounded up; infinite where the steps' own deltas exceed it.

        Args: 0 < delta < 1.
        Raises: PrivacyParameterError; UnsupportedEvent if no accountant has a bound.
        """
        fraction("delta", delta, zero=False)
        if self._sampled is None:
            return self._composition.epsilon(delta)
        found: dict[str, float] = {}
        reasons = []
        for name in (name for name in first_party_accountants() if name not in SKIPPED):
            try:
                found[name] = upper_bound(name, ((self._sampled, self._num_steps),), delta)
            except UnsupportedEvent as error:
                reasons.append(f"{name}: {error}")
        if not found:
            raise UnsupportedEvent(f"no accountant can price this Gaussian at {delta=}: " + " ".join(reasons))
        least = min(found, key=lambda name: found[name])
        self._method = f"Poisson-sampled Gaussian, priced by {least}"
        return found[least]
