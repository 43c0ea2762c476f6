"""Delta as a function of epsilon, with 60 digits: what a release really costs, or at least costs.

Every function returns a delta that some pair of neighbours reaches. A bound below it is no bound.
"""

from __future__ import annotations

from mpmath import exp, log, mp, mpf, ncdf, sqrt

from dpfa_core.events import (
    BallsInBins,
    DiscreteGaussian,
    EpsilonDelta,
    Event,
    Exponential,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    RandomizedResponse,
)

DIGITS = 60


def gaussian(epsilon: float | mpf, mu: float | mpf) -> mpf:
    """Two unit normals that lie `mu` apart (Balle & Wang 2018, Theorem 8)."""
    with mp.workdps(DIGITS):
        epsilon, mu = mpf(epsilon), mpf(mu)
        return ncdf(mu / 2 - epsilon / mu) - exp(epsilon) * ncdf(-mu / 2 - epsilon / mu)


def gaussian_epsilon(delta: float, mu: float | mpf) -> mpf:
    """The least epsilon at which `gaussian` is `delta` or less, to 40 digits."""
    with mp.workdps(DIGITS):
        delta = mpf(delta)
        if gaussian(0, mu) <= delta:
            return mpf(0)
        low, high = mpf(0), mpf(1)
        while gaussian(high, mu) > delta:
            low, high = high, 2 * high
        while high - low > mpf(10) ** -40 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if gaussian(middle, mu) <= delta else (middle, high)
        return high


def laplace(epsilon: float | mpf, noise_multiplier: float | mpf) -> mpf:
    """One number under Laplace noise of scale `noise_multiplier`, moved by 1."""
    with mp.workdps(DIGITS):
        return max(mpf(0), 1 - exp((mpf(epsilon) - 1 / mpf(noise_multiplier)) / 2))


def sampled_gaussian(epsilon: float | mpf, probability: float, mu: float | mpf) -> mpf:
    """A record that takes part with `probability` and then moves a unit normal by `mu`, against its absence."""
    with mp.workdps(DIGITS):
        epsilon, q, mu = mpf(epsilon), mpf(probability), mpf(mu)
        rest, factor = 1 - q, exp(epsilon)
        # The density ratio 1 - q + q exp(mu x - mu^2 / 2) grows with x: both worst events are half-lines.
        cut = (log((factor - rest) / q) + mu**2 / 2) / mu
        present = rest * ncdf(-cut) + q * ncdf(mu - cut) - factor * ncdf(-cut)
        if 1 / factor <= rest:
            return present
        cut = (log((1 / factor - rest) / q) + mu**2 / 2) / mu
        absent = ncdf(cut) - factor * (rest * ncdf(cut) + q * ncdf(cut - mu))
        return max(present, absent)


def sampled_gaussian_replaced(epsilon: float | mpf, probability: float, mu: float | mpf) -> mpf:
    """A record that, if sampled, moves a unit normal by mu/2 one way, against one that moves it the other way."""
    with mp.workdps(DIGITS):
        epsilon, q, half = mpf(epsilon), mpf(probability), mpf(mu) / 2
        rest, factor = 1 - q, exp(epsilon)
        # The ratio grows with x; where it equals exp(epsilon), u = exp(half x) solves a quadratic.
        moved = q * exp(-(half**2) / 2)
        u = (rest * (factor - 1) + sqrt((rest * (factor - 1)) ** 2 + 4 * factor * moved**2)) / (2 * moved)
        cut = log(u) / half
        return rest * ncdf(-cut) + q * ncdf(half - cut) - factor * (rest * ncdf(-cut) + q * ncdf(-half - cut))


def approximate(epsilon: float | mpf, event: EpsilonDelta) -> mpf:
    """The worst release of which (epsilon, delta) is known: randomised response that fails with delta."""
    with mp.workdps(DIGITS):
        known, failure = mpf(event.epsilon), mpf(event.delta)
        if mpf(epsilon) >= known:
            return failure
        return failure + (1 - failure) * (exp(known) - exp(mpf(epsilon))) / (1 + exp(known))


def discrete_gaussian(epsilon: float | mpf, noise_multiplier: float) -> mpf:
    """On whole numbers, moved by 1: the coarsest grid. The limit of fine grids is `gaussian`."""
    with mp.workdps(DIGITS):
        square, factor = 2 * mpf(noise_multiplier) ** 2, exp(mpf(epsilon))
        far = int(20 * noise_multiplier) + 20
        masses = {x: exp(-(mpf(x) ** 2) / square) for x in range(-far - 1, far + 2)}
        moved = sum(max(mpf(0), masses[x - 1] - factor * masses[x]) for x in range(-far, far + 2))
        return moved / sum(masses.values())


def randomized_response(epsilon: float | mpf, event: RandomizedResponse) -> mpf:
    """The own answer of one record, which is the other's only by chance."""
    with mp.workdps(DIGITS):
        other = mpf(event.noise_parameter) / event.num_buckets
        return max(mpf(0), 1 - mpf(event.noise_parameter) + other - exp(mpf(epsilon)) * other)


def selection(epsilon: float | mpf, event: Exponential) -> mpf:
    """The exponential mechanism where one answer gains the whole epsilon on all others, at its worst share."""
    with mp.workdps(DIGITS):
        gain, factor = exp(mpf(event.epsilon)), exp(mpf(epsilon))
        if factor >= gain:
            return mpf(0)
        share = (sqrt(gain / factor) - 1) / (gain - 1)
        return share * gain / (1 + share * (gain - 1)) - factor * share


def at_least(event: Event, epsilon: float | mpf) -> mpf | None:
    """A delta that one release of `event` has at `epsilon`, or None for an event without a formula here."""
    match event:
        case NonPrivate():
            return mpf(1)
        case Gaussian(noise_multiplier):
            return gaussian(epsilon, 1 / mpf(noise_multiplier))
        case Laplace(noise_multiplier):
            return laplace(epsilon, noise_multiplier)
        case EpsilonDelta():
            return approximate(epsilon, event)
        case DiscreteGaussian(noise_multiplier):
            return max(gaussian(epsilon, 1 / mpf(noise_multiplier)), discrete_gaussian(epsilon, noise_multiplier))
        case RandomizedResponse():
            return randomized_response(epsilon, event)
        case Exponential():
            return selection(epsilon, event)
        case BallsInBins(bins, 1, Gaussian(noise_multiplier), "add_or_remove"):
            # of all bins, only the first is looked at
            return sampled_gaussian(epsilon, 1 / mpf(bins), 1 / mpf(noise_multiplier))
        case PoissonSampled(probability, Gaussian(noise_multiplier), "add_or_remove"):
            return sampled_gaussian(epsilon, probability, 1 / mpf(noise_multiplier))
        case PoissonSampled(probability, Gaussian(noise_multiplier), "replace"):
            return sampled_gaussian_replaced(epsilon, probability, 1 / mpf(noise_multiplier))
        case FixedSizeSampled(size, population, Gaussian(noise_multiplier), "replace"):
            # Others that all push one way make one of the two records invisible.
            return sampled_gaussian(epsilon, size / population, 1 / mpf(noise_multiplier))
    return None


EXACT = (Gaussian, Laplace, EpsilonDelta, NonPrivate)
"""Events of which ``at_least`` is the whole cost, not only a part of it."""
