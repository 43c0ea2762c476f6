"""What a mechanism must keep: enough noise, an honest price, and a refusal where it has no bound."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from mpmath import mpf

from dpfa_core.contracts import Mechanism, SelectionMechanism
from dpfa_core.errors import DPFAError
from dpfa_core.events import DiscreteGaussian, Event
from dpfa_core.spec import AttentionProblem, Claim, NoisePlan, PrivacySpec, Sensitivity
from dpfa_mechanisms.sensitivity import sensitivity
from dpfa_verification.conformance.level import Level
from dpfa_verification.conformance.obligation import Undecided, Violated, holds, obligation
from dpfa_verification.conformance.report import Finding
from dpfa_verification.conformance.structure import complete
from dpfa_verification.truth import grids, moves, profiles
from dpfa_verification.truth.neighbours import farthest

SHAPE: dict[str, Any] = {"batch": 2, "q_len": 6, "kv_len": 6, "q_heads": 4, "kv_heads": 2, "head_dim": 32}
ONE_HEAD: dict[str, Any] = {"batch": 1, "q_len": 5, "kv_len": 5, "q_heads": 1, "kv_heads": 1, "head_dim": 32}
SENSITIVITIES = (1.0, 0.1, 37.0)
BOUNDED: dict[str, Any] = {"clip_norm": 1.0, "logit_bound": 0.5}

SEQUENCE = PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence")
TOKEN = PrivacySpec(epsilon=1.0, delta=1e-5, unit="token", queries="private")

SPECS = (
    SEQUENCE,
    PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence", relation="add_or_remove"),
    TOKEN,
    PrivacySpec(epsilon=1.0, delta=1e-5, unit="token", queries="public"),
)

MASK = bytes([0b10110100, 0b01101110, 0b11110111, 0b00011111, 0b11010101])
UNEVEN: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"causal": True, "window": (2, 0)},
    {"window": (1, 2)},
    {"q_len": 3, "causal": True},
    {"q_len": 8, "causal": True},
    {"batch": 3, "causal": True, "lengths": ((6, 6), (2, 5), (4, 3))},
    {"mask": MASK},
    {"mask": MASK, "causal": True},
)
"""Problems whose rows see different numbers of keys."""

WIDEST = 20_000.0
"""Noise of more grid steps than this is priced like noise on the reals."""

REFUSED: tuple[tuple[str, PrivacySpec, AttentionProblem], ...] = (
    ("the token unit with an output clip", TOKEN, AttentionProblem(**SHAPE, **BOUNDED, clip="output")),
    ("the token unit without a logit bound", TOKEN, AttentionProblem(**SHAPE, clip_norm=1.0)),
    ("a release without a clip norm", SEQUENCE, AttentionProblem(**SHAPE)),
    ("the token unit without a clip norm", TOKEN, AttentionProblem(**SHAPE, logit_bound=0.5)),
    (
        "an infinite epsilon",
        PrivacySpec(epsilon=math.inf, delta=1e-5, unit="sequence"),
        AttentionProblem(**SHAPE, **BOUNDED),
    ),
    (
        "the unit of training",
        PrivacySpec(epsilon=1.0, delta=1e-5, unit="example"),
        AttentionProblem(**SHAPE, **BOUNDED),
    ),
)


class MechanismExamination:
    """The obligations of an additive mechanism.

    What is checked is the scale that ``plan`` writes down for a backend, against formulas of this package.
    """

    def __init__(self, mechanism: Mechanism, level: Level) -> None:
        self.mechanism, self.level = mechanism, level

    def grid(self) -> Iterator[tuple[float, float]]:
        epsilons = np.geomspace(0.05, 12.0, self.level.grid)
        deltas = np.geomspace(1e-9, 1e-2, self.level.grid)
        return itertools.product(epsilons.tolist(), deltas.tolist())

    def tokens_only(self) -> bool:
        """Noise that is shaped by single rows, so that it belongs to the sensitivity of a token and to no other."""
        ordinary = AttentionProblem(**SHAPE, **BOUNDED)
        return bool(self.mechanism.supports(SEQUENCE, ordinary)) and not self.mechanism.supports(TOKEN, ordinary)

    def released(self, multipliers: tuple[float, ...], value: float, **fields: Any) -> tuple[NoisePlan, float]:
        """A plan, and how far a record moves what is released.

        The move is `value`, or where plans belong to tokens, a token's in a release with the clip norm `value`.
        """
        problem = AttentionProblem(**SHAPE | BOUNDED | {"dtype": "bfloat16"} | fields)
        if self.tokens_only():
            problem = dataclasses.replace(problem, clip_norm=value)
            bound = sensitivity(TOKEN, problem, self.mechanism.norm)
        else:
            bound = Sensitivity(norm=self.mechanism.norm, value=value, naive=value, item="given")
        return self.mechanism.plan(bound, multipliers, problem), bound.value

    def plan(self, multipliers: tuple[float, ...], value: float = 1.0, **fields: Any) -> NoisePlan:
        return self.released(multipliers, value, **fields)[0]

    @property
    def power(self) -> int:
        """The moves of several rows add up as they are in l1, squared in l2."""
        return 1 if self.mechanism.norm == "l1" else 2

    @obligation("contract", "the plugin contract")
    def contract(self) -> None:
        claims = self.mechanism.claims()
        good = isinstance(claims, tuple) and claims and all(isinstance(claim, Claim) for claim in claims)
        holds(bool(good), f"claims() must be a tuple of claims, not empty; it is {claims!r}")
        holds(
            self.mechanism.norm in ("l1", "l2", "whitened_l2"),
            f"norm must be l1, l2 or whitened_l2; it is {self.mechanism.norm!r}",
        )
        for value, dtype in itertools.product(SENSITIVITIES, ("float32", "bfloat16", "float16")):
            plan = self.plan((2.0,), value, dtype=dtype)
            holds(isinstance(plan, NoisePlan), f"plan() must return a NoisePlan, not {plan!r}")
            holds(plan.mechanism == self.mechanism.name, f"the plan names the mechanism {plan.mechanism!r}")
            holds(plan.norm == self.mechanism.norm, f"the plan clips in {plan.norm!r}")
            holds(plan.distribution != "none", "the plan has no noise")
            holds(
                dtype != "float32" or plan.transform == "bm64",
                "a float32 release needs transform='bm64': it shows where a 32-bit sampler ends",
            )

    @obligation("shape", "PRIVACY P5: what a backend needs to make the noise is in the plan")
    def shape(self) -> None:
        """Lengths of the scales, parameters of the structure, grid: complete and within their ranges."""
        for fields in UNEVEN:
            plan = self.plan((2.0,), **fields)
            problem = AttentionProblem(**SHAPE | BOUNDED | fields)
            holds(
                len(plan.head_scale) in (1, problem.q_heads) and len(plan.row_scale) in (1, problem.kv_len + 1),
                f"a plan for {problem.q_heads} heads and {problem.kv_len} keys has {len(plan.head_scale)} scales "
                f"of heads and {len(plan.row_scale)} of rows",
            )
            complete(plan, problem.head_dim)

    @obligation("calibration", "Balle & Wang 2018, Theorem 8, with 60 digits; Laplace in closed form")
    def calibration(self) -> None:
        """delta at the noise really planned is at most the delta asked for."""
        for epsilon, delta in self.grid():
            multiplier = self.mechanism.calibrate(epsilon, delta)
            for value in SENSITIVITIES:
                found = self.true_profile(*self.released((multiplier,), value))(epsilon)
                holds(
                    found <= delta,
                    f"calibrate({epsilon:.6g}, {delta:.6g}) = {multiplier:.9g} and plan() for sensitivity {value:g} "
                    f"leave delta = {float(found):.6g} at epsilon = {epsilon:.6g}",
                )

    @obligation("event", "the event's own profile, with 60 digits")
    def event(self) -> None:
        """The price written down is not below the true one, at any epsilon."""
        for multiplier in (0.11, 0.5, 1.0, 3.7, 40.0):
            event = self.mechanism.event(multiplier)
            holds(isinstance(event, Event), f"event() must return an event, not {event!r}")
            plan, value = self.released((multiplier,), 1.0)
            if isinstance(event, DiscreteGaussian) and plan.distribution == "discrete_gaussian":
                self._concentrated(event, plan, value)
                continue
            if not isinstance(event, profiles.EXACT):
                raise Undecided(f"no formula for the event {event!r}")
            truth = self.true_profile(plan, value)
            for epsilon in np.geomspace(0.01, 30.0, 4 * self.level.grid).tolist():
                claimed, true = profiles.at_least(event, epsilon), truth(epsilon)
                holds(
                    claimed is not None and claimed >= true * (1 - mpf(10) ** -12),
                    f"event({multiplier:g}) = {event!r} has delta {float(claimed or 0):.6g} at epsilon "
                    f"{epsilon:.4g}, where the planned noise has {float(true):.6g}",
                )

    @staticmethod
    def _concentrated(event: DiscreteGaussian, plan: NoisePlan, value: float) -> None:
        """The event stands for a divergence of order * rho; one number that takes the whole move reaches it."""
        steps, scale = math.ceil(value / plan.grid), min(plan.head_scale) / plan.grid
        found = grids.divergence(2.0, steps, scale) if scale <= WIDEST else (steps / scale) ** 2
        holds(
            found <= event.noise_multiplier**-2 * (1 + 1e-9),
            f"{event!r} stands for a Renyi divergence of {event.noise_multiplier**-2:.9g} of order 2; one number "
            f"moved by {value:g} has {found:.9g} on the grid {plan.grid:g} with the scale {min(plan.head_scale):.9g}",
        )

    @obligation("moves", "PRIVACY P3, P5: the largest sum over rows of (move / scale)**2, key by key")
    def moves(self) -> None:
        """No record moves the rows further, each in units of its own noise, than the noise multipliers say."""
        each = (1.0, 2.0, 4.0, 0.7)
        looked = False
        for spec, fields, clip_norm in itertools.product(SPECS, UNEVEN, (1.0, 0.01)):
            problem = AttentionProblem(**SHAPE | BOUNDED | {"clip_norm": clip_norm, "logit_bound": 1.0} | fields)
            if self.mechanism.supports(spec, problem):
                continue
            looked = True
            bound = sensitivity(spec, problem, self.mechanism.norm)
            for multipliers in ((2.0,), each):
                plan = self.mechanism.plan(bound, multipliers, problem)
                if plan.distribution == "custom" or (plan.distribution == "laplace") != (self.power == 1):
                    raise Undecided(f"no formula for {plan.distribution!r} noise in the norm {plan.norm!r}")
                found = moves.spent(spec, problem, plan, self.power) * moves.stretch(plan) ** self.power
                allowed = sum(multiplier**-self.power for multiplier in multipliers)
                holds(
                    found <= allowed,
                    f"noise multipliers {multipliers} allow a sum of (move / scale)**{self.power} of {allowed:.9g}, "
                    f"the worst record reaches {found:.9g} for {spec} and {problem} with {plan}",
                )
        if not looked:
            raise Undecided("supports() refuses all releases that this suite has bounds for")

    @obligation("heads", "PRIVACY P6: the releases of the heads compose")
    def heads(self) -> None:
        """One multiplier for each head: together they cost no more than their events say."""
        multipliers = (1.0, 2.0, 4.0, 0.7)
        for value in SENSITIVITIES:
            plan, moved = self.released(multipliers, value)
            holds(
                len(plan.head_scale) == len(multipliers),
                f"a plan for {len(multipliers)} multipliers must have as many scales, not {len(plan.head_scale)}",
            )
            least = self.least_row_scale(plan)
            ratios = [scale * least / (moved * moves.stretch(plan)) for scale in plan.head_scale]
            power = self.power
            spent = sum((1 / (len(ratios) * r) if power == 1 else 1 / (len(ratios) * r * r)) for r in ratios)
            allowed = sum(multiplier**-power for multiplier in multipliers)
            holds(
                spent <= allowed * (1 + 1e-9),
                f"multipliers {multipliers} are planned as {plan.head_scale}: sum of (sensitivity / scale)"
                f"**{power} is {spent:.6g}, the events allow {allowed:.6g}",
            )

    @obligation("monotone", "a stronger promise never takes less noise")
    def monotone(self) -> None:
        epsilons = np.geomspace(0.05, 12.0, 10 * self.level.grid).tolist()
        deltas = np.geomspace(1e-12, 0.1, 10 * self.level.grid).tolist()
        for delta in (1e-9, 1e-5):
            self._falls([(epsilon, delta) for epsilon in epsilons])
        for epsilon in (0.3, 3.0):
            self._falls([(epsilon, delta) for delta in deltas])

    def _falls(self, promises: list[tuple[float, float]]) -> None:
        multipliers = [self.mechanism.calibrate(*promise) for promise in promises]
        for (first, next_), (more, less) in zip(
            itertools.pairwise(promises), itertools.pairwise(multipliers), strict=True
        ):
            holds(
                0 < less <= more < math.inf,
                f"calibrate{first} = {more:.9g}, but for the weaker promise calibrate{next_} = {less:.9g}",
            )

    @obligation("refusal", "PRIVACY P1 to P3")
    def refusal(self) -> None:
        """supports() has a reason where no bound holds, and none for some ordinary release."""
        for what, spec, problem in REFUSED:
            reasons = self.mechanism.supports(spec, problem)
            good = isinstance(reasons, tuple) and all(isinstance(reason, str) and reason for reason in reasons)
            holds(good, f"supports() must return a tuple of sentences, not {reasons!r}")
            holds(bool(reasons), f"supports() has no reason against {what}")
        ordinary = [
            self.mechanism.supports(spec, AttentionProblem(**SHAPE, **BOUNDED, dtype=dtype, causal=causal))
            for spec in (SEQUENCE, TOKEN)
            for dtype in ("float32", "bfloat16")
            for causal in (False, True)
        ]
        holds(() in ordinary, f"supports() refuses every ordinary release, among others for: {ordinary[0]!r}")

    @obligation("bad_values", "errors name what was expected")
    def bad_values(self) -> None:
        bad: list[tuple[str, Callable[[], object]]] = [
            (
                f"calibrate({epsilon}, {delta})",
                lambda epsilon=epsilon, delta=delta: self.mechanism.calibrate(epsilon, delta),
            )
            for epsilon, delta in (
                (0.0, 1e-5),
                (-1.0, 1e-5),
                (math.nan, 1e-5),
                (1.0, -1e-9),
                (1.0, 1.5),
                (1.0, math.nan),
            )
        ]
        bad.append(("plan() with two multipliers for four heads", lambda: self.plan((1.0, 1.0))))
        bad.append(("plan() with a noise multiplier of 0", lambda: self.plan((0.0,))))
        bad.append(("plan() with a sensitivity in another norm", self._other_norm))
        for what, call in bad:
            try:
                result = call()
            except (DPFAError, ValueError):
                continue
            raise Violated(f"{what} must raise an error, it returned {result!r}")

    def _other_norm(self) -> NoisePlan:
        norm = "l2" if self.mechanism.norm == "l1" else "l1"
        item = "P3.token.private" if self.tokens_only() else "given"
        bound = Sensitivity(norm=norm, value=1.0, naive=1.0, item=item)  # type: ignore[arg-type]
        return self.mechanism.plan(bound, (1.0,), AttentionProblem(**SHAPE, **BOUNDED))

    @obligation("sensitivity", "PRIVACY P3: the bound that plans are scaled by, against extremal neighbours")
    def sensitivity(self) -> None:
        norm = self.mechanism.norm
        # a ball of the whitened norm is a Euclidean one in other coordinates
        plain = "l2" if norm == "whitened_l2" else norm
        for spec, shape, bound, causal in itertools.product(
            SPECS, (ONE_HEAD, SHAPE, SHAPE | {"q_len": 3}), (0.3, 1.0, 2.0), (False, True)
        ):
            problem = AttentionProblem(**shape, clip_norm=1.5, logit_bound=bound, causal=causal)
            if self.mechanism.supports(spec, problem):
                continue
            value, reached = sensitivity(spec, problem, norm).value, farthest(spec, problem, plain)
            holds(
                reached <= value,
                f"two neighbours lie {reached:.9g} apart in {norm}, the sensitivity is {value:.9g} for {spec} "
                f"and {problem}",
            )

    def true_profile(self, plan: NoisePlan, value: float) -> Callable[[float], mpf]:
        """Delta as a function of epsilon for the planned noise when one record moves the output by `value`.

        On a grid the whole move goes into one number, and rounding adds to it what it can.
        """
        if plan.distribution not in ("gaussian", "laplace", "discrete_gaussian"):
            raise Undecided(f"no formula for {plan.distribution!r} noise")
        least = mpf(min(plan.head_scale)) * mpf(self.least_row_scale(plan))
        ratio = least / mpf(value) / mpf(moves.stretch(plan))
        if plan.distribution == "discrete_gaussian":
            holds(plan.grid > 0 and self.mechanism.norm != "l1", f"discrete noise on the grid {plan.grid!r}")
            steps, scale = math.ceil(value / plan.grid), float(least) / plan.grid
            if scale <= WIDEST:
                return lambda epsilon: mpf(grids.discrete_gaussian(epsilon, steps, scale))
            return lambda epsilon: profiles.gaussian(epsilon, 1 / ratio)
        if plan.distribution == "gaussian":
            if self.mechanism.norm == "l1":
                raise Undecided("Gaussian noise against an l1 sensitivity has no formula here")
            return lambda epsilon: profiles.gaussian(epsilon, 1 / ratio)
        if self.mechanism.norm != "l1":
            raise Violated("Laplace noise needs an l1 sensitivity: an l2 one says nothing about the sum of moves")
        return lambda epsilon: profiles.laplace(epsilon, ratio)

    @staticmethod
    def least_row_scale(plan: NoisePlan) -> float:
        """The weakest row; rows that see no key are outside."""
        return min(plan.row_scale[1:] or plan.row_scale)


def stated_claims(mechanism: Mechanism | SelectionMechanism, checked: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """The claims of the mechanism itself that no check of this suite bears the name of."""
    names = {claim.obligation for claim, _, _ in checked}
    return tuple(
        (claim, "assumed", "stated by the plugin, not checked by this suite")
        for claim in mechanism.claims()
        if isinstance(claim, Claim) and claim.obligation not in names
    )
