"""An account of training steps by Renyi divergences, with black boxes beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, SupportsFloat

from dpfa_core.checks import fraction, positive, require
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import EpsilonDelta, Event, Gaussian, PoissonSampled

if TYPE_CHECKING:
    from dpfa_accounting.optimal_composition import OptimalComposition
    from dpfa_accounting.rdp import RdpAccountant

__all__ = ["RenyiAccountant"]

SPLITS = 64
"""Shares of delta that are tried between the Gaussian steps and the black boxes."""

LOOSER = (
    "steps given by epsilon and delta alone are black boxes: they are amplified and composed by general theorems, "
    "which is looser than pricing the mechanism itself; give noise_multiplier where the noise is Gaussian."
)


class RenyiAccountant:
    """Epsilon of many steps on Poisson samples, under add_or_remove.

    Guarantee: tested (not below another library's Renyi accountant; never falls when steps are added).
    A Gaussian step adds its Renyi divergence. A black box is amplified by its sampling rate and composed as
    randomised response. Where both occur, the answer is the lesser of two bounds: all on one Renyi curve,
    and delta shared between both kinds over a grid of shares.
    Source: Mironov 2017; Mironov, Talwar & Zhang 2019; Balle, Barthe & Gaboardi 2018, Theorem 8;
    Kairouz, Oh & Viswanath 2015, Theorems 3.3 and 3.5.
    """

    def __init__(self) -> None:
        self._gaussians: Counter[Event] = Counter()
        self._boxes: Counter[EpsilonDelta] = Counter()
        self._counted: dict[Hashable, Event] = {}
        self._ids = 0
        self._notes: dict[str, None] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes the answer looser than it could be, one sentence each."""
        return tuple(self._notes)

    def add_step(
        self,
        epsilon: SupportsFloat | None = None,
        delta: float | None = None,
        sampling_rate: float = 1.0,
        *,
        noise_multiplier: float | None = None,
    ) -> None:
        """Add one step.

        Args: `epsilon` of the step on the whole data, a number or what ``get_privacy_spent()`` gives, whose
        ``event_id`` is counted once; `delta` beside it, 0.0 for a pure release; `sampling_rate` in (0, 1] of
        a Poisson sample; `noise_multiplier`: the step is this Gaussian, and epsilon and delta are not used.
        Raises: PrivacyParameterError; nothing is added then.
        """
        from dpfa_accounting.amplification import amplified

        fraction("sampling_rate", sampling_rate, zero=False, one=True)
        require(
            epsilon is not None or noise_multiplier is not None,
            "a step must have an epsilon or a noise_multiplier",
            epsilon,
        )
        event_id = getattr(epsilon, "event_id", None)
        if noise_multiplier is not None:
            step: Event = Gaussian(noise_multiplier)
            if sampling_rate < 1:
                step = PoissonSampled(sampling_rate, step)
            if self._first_time(event_id, step):
                self._gaussians[step] += 1
            return
        try:
            value = float(epsilon)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise PrivacyParameterError(f"epsilon must be a number or have float(), got {epsilon!r}.") from error
        positive("epsilon", value)
        own = _delta_of(epsilon) if delta is None else delta
        require(own is not None, "delta must be given beside epsilon", delta, "Use 0.0 for a pure release.")
        fraction("delta", own)
        box = amplified(value, float(own or 0.0), sampling_rate)
        if self._first_time(event_id, box):
            self._boxes[box] += 1
            self._notes[LOOSER] = None

    def get_epsilon(self, delta: float) -> float:
        """An upper bound on epsilon at `delta`, rounded up; infinite where the black boxes' own deltas reach it.

        Args: 0 < delta < 1.
        """
        return self._answer(delta)[0]

    def describe(self, delta: float) -> str:
        """Epsilon at `delta` in words: what was counted, by which bound, and what makes it looser."""
        from dp_flash_attention.numbers import number

        epsilon, method = self._answer(delta)
        counts = f"{self._gaussians.total()} Gaussian steps, {self._boxes.total()} black boxes"
        return " ".join([f"epsilon <= {number(epsilon)} at delta = {delta:g}: {counts}; {method}.", *self._notes])

    def _first_time(self, event_id: Hashable, step: Event) -> bool:
        if event_id is None:
            return True
        counted = self._counted.setdefault(event_id, step)
        require(counted == step, f"event {event_id!r} must cost the same each time, {counted} before", step)
        if len(self._counted) == self._ids:
            self._notes["an event that was given again was counted once."] = None
            return False
        self._ids += 1
        return True

    def _answer(self, delta: float) -> tuple[float, str]:
        from dpfa_accounting.optimal_composition import OptimalComposition
        from dpfa_accounting.rdp import RdpAccountant

        fraction("delta", delta, zero=False)
        curve, boxes = RdpAccountant(), OptimalComposition(self._boxes.items())
        for event, count in self._gaussians.items():
            curve.compose(event, count)
        if boxes.failure >= delta:
            return math.inf, "the black boxes' own deltas reach the target"
        if not self._boxes:
            return curve.epsilon(delta), "Renyi"
        if not self._gaussians:
            return boxes.epsilon(delta), "optimal composition of black boxes"
        together = RdpAccountant.from_state(curve.state())
        for box, count in self._boxes.items():
            # a black box fails openly with its delta, and is pure otherwise
            if box.delta:
                together.compose(EpsilonDelta(0.0, box.delta), count)
            if box.epsilon:
                together.compose(EpsilonDelta(box.epsilon, 0.0), count)
        one_curve, shared = together.epsilon(delta), _shared(curve, boxes, delta)
        if one_curve <= shared:
            return one_curve, "one Renyi curve for both"
        return shared, "delta shared between Renyi and optimal composition"


def _shared(curve: RdpAccountant, boxes: OptimalComposition, delta: float) -> float:
    """The least sum of both epsilons when each kind has a share of delta; any split is a bound."""
    spare = delta - boxes.failure
    best = math.inf
    for step in range(1, SPLITS):
        share = math.nextafter(spare * step / SPLITS, 0.0)
        rest = math.nextafter(delta - share, 0.0)
        best = min(best, math.nextafter(curve.epsilon(share) + boxes.epsilon(rest), math.inf))
    return best


def _delta_of(spent: object) -> float | None:
    """The delta that a report of spending carries."""
    found = spent.get("total_delta") if isinstance(spent, Mapping) else None
    return getattr(spent, "delta", None) if found is None else found
