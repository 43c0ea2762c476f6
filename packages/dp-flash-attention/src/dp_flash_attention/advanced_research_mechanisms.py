"""Tools of research: the loss distribution, per-head sensitivity, and bounds side by side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from dp_flash_attention.structured_noise import StructuredNoiseMechanism
from dpfa_core.checks import fraction, integer, require
from dpfa_core.errors import DPFAError, PrivacyParameterError
from dpfa_core.events import Event, Gaussian, PoissonSampled, SelfComposed
from dpfa_mechanisms.sensitivity_analysis import AttentionSensitivityAnalyzer

__all__ = [
    "AttentionSensitivityAnalyzer",
    "Bound",
    "CompositionAnalyzer",
    "PrivacyLossDistribution",
    "StructuredNoiseMechanism",
]

Events = Event | Iterable[Event | tuple[Event, int]]
"""One event, or several, each alone or with its count."""


def _pairs(events: Events) -> tuple[tuple[Event, int], ...]:
    items = (events,) if isinstance(events, Event) else tuple(events)
    pairs = tuple(item if isinstance(item, tuple) else (item, 1) for item in items)
    require(bool(pairs), "expected at least one event", events)
    for pair in pairs:
        good = len(pair) == 2 and isinstance(pair[0], Event)
        require(good, "expected events of dpfa_core.events, or pairs (event, count)", pair)
        integer("count", pair[1], least=1)
    return pairs


class PrivacyLossDistribution:
    """The composed privacy loss of releases, convolved on a grid.

    Guarantee: as of the "pld" accountant.
    Args: `events`: one event, or several, each alone or as (event, count); `delta` in (0, 1) of the answer.
    """

    def __init__(self, events: Events, delta: float = 1e-5) -> None:
        fraction("delta", delta, zero=False)
        self._events = _pairs(events)
        self._delta = delta

    @classmethod
    def from_noise_multiplier(
        cls, noise_multiplier: float, *, steps: int = 1, sampling_probability: float = 1.0, delta: float = 1e-5
    ) -> Self:
        """Of `steps` Gaussian releases, each on a Poisson sample where `sampling_probability` < 1."""
        step: Event = Gaussian(noise_multiplier)
        if sampling_probability != 1:
            step = PoissonSampled(sampling_probability, step)
        return cls(SelfComposed(step, steps), delta)

    def compose(self) -> tuple[float, float]:
        """(epsilon, delta) of all releases together, epsilon rounded up.

        Raises: UnsupportedEvent where an event has no loss distribution or delta is too small for the grid.
        """
        from dpfa_core.spending import upper_bound

        return upper_bound("pld", self._events, self._delta), self._delta

    def _advanced_composition(self) -> tuple[float, float]:
        return self.compose()

    def compose_with(self, other: PrivacyLossDistribution) -> Self:
        """The loss of the releases of both, which must ask for the same delta."""
        if other._delta != self._delta:
            raise PrivacyParameterError(
                f"both distributions must have the same delta, got {self._delta} and {other._delta}; "
                "build one from the events of both."
            )
        return type(self)((*self._events, *other._events), self._delta)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What one method says of the composition."""

    method: str
    epsilon: float | None
    """None where the method has no answer."""
    is_upper_bound: bool
    """Whether epsilon may be claimed."""
    note: str = ""


class CompositionAnalyzer:
    """The epsilon of one composition by every method, to be compared."""

    def __init__(self, events: Events) -> None:
        self._events = _pairs(events)

    def analyze(self, delta: float) -> list[Bound]:
        """Every installed accountant, then basic and advanced composition, then the central limit's estimate.

        The last is no bound, and is there to show by how much it can be too small. Upper bounds come first,
        least first.
        """
        from dpfa_core.spending import first_party_accountants, upper_bound

        fraction("delta", delta, zero=False)
        rows = []
        for name in first_party_accountants():
            try:
                rows.append(Bound(method=name, epsilon=upper_bound(name, self._events, delta), is_upper_bound=True))
            except DPFAError as error:
                rows.append(Bound(method=name, epsilon=None, is_upper_bound=False, note=str(error)))
        rows += [self._basic(delta), self._advanced(delta), self._central_limit(delta)]
        return sorted(rows, key=lambda row: (not row.is_upper_bound, math.inf if row.epsilon is None else row.epsilon))

    def table(self, delta: float) -> str:
        """``analyze`` as Markdown, epsilon rounded up."""
        from dp_flash_attention.numbers import number

        lines = ["| method | epsilon | upper bound | note |", "|---|---|---|---|"]
        for row in self.analyze(delta):
            epsilon = "-" if row.epsilon is None else number(row.epsilon)
            lines.append(f"| {row.method} | {epsilon} | {'yes' if row.is_upper_bound else 'no'} | {row.note} |")
        return "\n".join(lines)

    def _basic(self, delta: float) -> Bound:
        """Epsilons add up when each release has its share of delta."""
        try:
            parts = self._single(delta)
        except DPFAError as error:
            return Bound(method="basic composition", epsilon=None, is_upper_bound=False, note=str(error))
        total = math.fsum(epsilon * count for epsilon, count in parts) * (1.0 + 2.0**-50)
        note = "the sum of every release's epsilon at its share of delta"
        return Bound(method="basic composition", epsilon=total, is_upper_bound=True, note=note)

    def _advanced(self, delta: float) -> Bound:
        """sqrt(2 log(1/delta') sum e**2) + sum e (exp(e) - 1), half of delta for delta'."""
        name = "advanced composition"
        try:
            parts = self._single(delta / 2.0)
        except DPFAError as error:
            return Bound(method=name, epsilon=None, is_upper_bound=False, note=str(error))
        squares = math.fsum(count * epsilon**2 for epsilon, count in parts)
        means = math.fsum(count * epsilon * math.expm1(min(epsilon, 700.0)) for epsilon, count in parts)
        total = (math.sqrt(2.0 * math.log(2.0 / delta) * squares) + means) * (1.0 + 2.0**-40)
        note = "Dwork, Rothblum & Vadhan 2010, Theorem III.3; half of delta for the releases, half for the theorem"
        return Bound(method=name, epsilon=total, is_upper_bound=True, note=note)

    def _single(self, delta: float) -> list[tuple[float, int]]:
        """(epsilon of one release at its equal share of `delta`, count), of every different release."""
        from dpfa_accounting.composition import leaves
        from dpfa_core.spending import spending

        counts: Counter[Event] = Counter()
        for event, times in self._events:
            for leaf, count in leaves(event, times):
                counts[leaf] += count
        share = math.nextafter(delta / counts.total(), 0.0)
        return [(spending([(event, 1)], share).epsilon, count) for event, count in counts.items()]

    def _central_limit(self, delta: float) -> Bound:
        """mu = q sqrt(T (exp(1/z**2) - 1)) for T equal Poisson-sampled Gaussians, as if it were exact."""
        from dpfa_accounting.composition import leaves
        from dpfa_accounting.gdp import GdpAccountant

        name = "central limit"
        squares = 0.0
        for event, times in self._events:
            for leaf, count in leaves(event, times):
                if not (isinstance(leaf, PoissonSampled) and isinstance(leaf.event, Gaussian)):
                    note = f"it is stated for Poisson-sampled Gaussians, got {type(leaf).__name__}"
                    return Bound(method=name, epsilon=None, is_upper_bound=False, note=note)
                z = leaf.event.noise_multiplier
                squares += count * leaf.sampling_probability**2 * math.expm1(min(z**-2.0, 700.0))
        estimate = GdpAccountant().compose(Gaussian(squares**-0.5)).epsilon(delta)
        note = "an estimate that can be too small: Bu, Dong, Long & Su 2020, not to be claimed"
        return Bound(method=name, epsilon=estimate, is_upper_bound=False, note=note)
