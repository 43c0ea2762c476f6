"""What a mechanism that picks a candidate must keep: its law, its price, and a pick made of the bits it is given."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from dpfa_core.contracts import SelectionMechanism
from dpfa_core.errors import DPFAError
from dpfa_core.events import EpsilonDelta, Event, Exponential, NonPrivate
from dpfa_core.spec import AttentionProblem, Claim, PrivacySpec
from dpfa_verification.conformance.level import Level
from dpfa_verification.conformance.obligation import Undecided, Violated, holds, obligation
from dpfa_verification.truth import selections
from dpfa_verification.truth.statistics import NORMAL_LIMIT

LAWS: tuple[tuple[tuple[float, ...], float, float], ...] = (
    ((0.0, 1.0, 2.0, 4.0), 1.0, 1.0),
    ((-3.0, -3.0, -3.5, -1.0, 0.25), 0.5, 0.7),
    ((1e9, 1e9 + 2.0), 1.0, 1.5),
    ((7.0,), 1.0, 1.0),
)
"""Scores, their sensitivity, epsilon."""

NEIGHBOURS: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = (
    ((0.0,) * 16, (1.0,) + (-1.0,) * 15),
    ((1.0, 0.0), (0.0, 1.0)),
    ((3.0,) + (0.0,) * 7, (2.0,) + (1.0,) * 7),
)
"""Scores of which none differs by more than 1."""

PICKS = 600
"""For each point of a level's grid."""


class SelectionExamination:
    """The obligations of a mechanism of kind "selection"."""

    def __init__(self, mechanism: SelectionMechanism, level: Level) -> None:
        self.mechanism, self.level = mechanism, level

    def counts(self, scores: tuple[float, ...], sensitivity: float, epsilon: float) -> NDArray[np.int64]:
        """How often each candidate is picked."""
        found = np.zeros(len(scores), dtype=np.int64)
        for _ in range(PICKS * self.level.grid):
            pick = self.mechanism.select(scores, sensitivity, epsilon, os.urandom)
            good = isinstance(pick, int) and not isinstance(pick, bool) and 0 <= pick < len(scores)
            holds(good, f"select() among {len(scores)} candidates must return an index, not {pick!r}")
            found[pick] += 1
        return found

    @obligation("contract", "the plugin contract")
    def contract(self) -> None:
        claims = self.mechanism.claims()
        good = isinstance(claims, tuple) and claims and all(isinstance(claim, Claim) for claim in claims)
        holds(bool(good), f"claims() must be a tuple of claims, not empty; it is {claims!r}")
        holds(
            self.mechanism.norm in ("l1", "l2", "whitened_l2"),
            f"norm must be l1, l2 or whitened_l2; it is {self.mechanism.norm!r}",
        )

    @obligation("selection_law", "McSherry & Talwar 2007: proportional to exp(epsilon score / (2 sensitivity))")
    def selection_law(self) -> None:
        """For a mechanism that claims this law; others are held to the ratio of neighbours alone."""
        if "selection_law" not in [claim.obligation for claim in self.mechanism.claims()]:
            raise Undecided("the mechanism does not claim the law of the exponential mechanism")
        for scores, sensitivity, epsilon in LAWS:
            counts = self.counts(scores, sensitivity, epsilon)
            law = selections.exponential(scores, sensitivity, epsilon)
            holds(
                selections.agrees(counts, law),
                f"select({scores}, {sensitivity:g}, {epsilon:g}) picked the candidates {counts.tolist()} times, "
                f"expected {np.round(law * counts.sum(), 1).tolist()}",
            )

    @obligation("privacy_ratio", "the definition of a pure epsilon, for scores that differ by their sensitivity")
    def privacy_ratio(self) -> None:
        epsilon = 1.0
        for one, other in NEIGHBOURS:
            left, right = self.counts(one, 1.0, epsilon), self.counts(other, 1.0, epsilon)
            for first, second in ((left, right), (right, left)):
                far, candidate = selections.excess(first, second, epsilon)
                holds(
                    far <= NORMAL_LIMIT,
                    f"of {first.sum()} picks each at epsilon = {epsilon:g}, candidate {candidate} had "
                    f"{first[candidate]} with one of the neighbouring scores {one} and {other}, and "
                    f"{second[candidate]} with the other",
                )

    @obligation("price", "select(epsilon) costs epsilon; noise_multiplier = 1 / epsilon")
    def price(self) -> None:
        """calibrate() asks for no more epsilon than promised, event() charges no less than is spent."""
        for epsilon, delta in itertools.product(np.geomspace(0.01, 20.0, 4 * self.level.grid).tolist(), (0.0, 1e-5)):
            multiplier = self.mechanism.calibrate(epsilon, delta)
            holds(
                0 < multiplier < math.inf and Fraction(multiplier) * Fraction(epsilon) >= 1,
                f"calibrate({epsilon!r}, {delta:g}) = {multiplier!r} is below 1 / epsilon",
            )
            event = self.mechanism.event(multiplier)
            holds(isinstance(event, Event), f"event() must return an event, not {event!r}")
            if isinstance(event, NonPrivate):
                continue
            if not isinstance(event, Exponential | EpsilonDelta):
                raise Undecided(f"no formula for the event {event!r}")
            holds(
                Fraction(event.epsilon) * Fraction(multiplier) >= 1,
                f"event({multiplier!r}) = {event!r} is below 1 / noise_multiplier",
            )

    @obligation("randomness", "PRIVACY P10: secret bits come from the caller and from nowhere else")
    def randomness(self) -> None:
        """The same bytes give the same pick."""
        scores = (0.0, 1.0, 2.0, 1.0)
        picks = [[self.mechanism.select(scores, 1.0, 1.0, _tape(seed)) for seed in range(64)] for _ in range(2)]
        holds(picks[0] == picks[1], "select() returned another candidate when it was given the same bytes again")
        holds(len(set(picks[0])) > 1, "select() returned the same candidate for 64 different sources of bytes")

    @obligation("refusal", "PRIVACY P0: picking a candidate releases no attention")
    def refusal(self) -> None:
        problem = AttentionProblem(batch=1, q_len=4, kv_len=4, q_heads=1, kv_heads=1, head_dim=8, clip_norm=1.0)
        reasons = self.mechanism.supports(PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence"), problem)
        good = isinstance(reasons, tuple) and all(isinstance(reason, str) and reason for reason in reasons)
        holds(good and bool(reasons), f"supports() must have a reason against a release of attention, not {reasons!r}")

    @obligation("bad_values", "errors name what was expected")
    def bad_values(self) -> None:
        select, calibrate = self.mechanism.select, self.mechanism.calibrate
        bad: list[tuple[str, Callable[[], object]]] = [
            ("select() without candidates", lambda: select((), 1.0, 1.0, os.urandom)),
            ("select() with a score that is NaN", lambda: select((0.0, math.nan), 1.0, 1.0, os.urandom)),
            ("select() with an infinite score", lambda: select((0.0, math.inf), 1.0, 1.0, os.urandom)),
            ("select() with the sensitivity 0", lambda: select((0.0, 1.0), 0.0, 1.0, os.urandom)),
            ("select() with a sensitivity that is NaN", lambda: select((0.0, 1.0), math.nan, 1.0, os.urandom)),
            ("select() with epsilon = 0", lambda: select((0.0, 1.0), 1.0, 0.0, os.urandom)),
            ("select() with an infinite epsilon", lambda: select((0.0, 1.0), 1.0, math.inf, os.urandom)),
            ("calibrate(0, 0)", lambda: calibrate(0.0, 0.0)),
            ("calibrate(nan, 0)", lambda: calibrate(math.nan, 0.0)),
            ("calibrate(inf, 0)", lambda: calibrate(math.inf, 0.0)),
            ("calibrate(1, 1.5)", lambda: calibrate(1.0, 1.5)),
            ("calibrate(1, -1e-9)", lambda: calibrate(1.0, -1e-9)),
        ]
        for what, call in bad:
            try:
                result = call()
            except (DPFAError, ValueError):
                continue
            raise Violated(f"{what} must raise an error, it returned {result!r}")


def _tape(seed: int) -> Callable[[int], bytes]:
    generator = np.random.default_rng(seed)
    return lambda count: bytes(generator.bytes(count))
