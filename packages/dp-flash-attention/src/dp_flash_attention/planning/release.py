"""One private attention call, or many, planned from shapes: sensitivity, noise, price, and what is left to see."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from dp_flash_attention.planning import cautions
from dp_flash_attention.planning.energy import energy_saved, noise_power
from dp_flash_attention.planning.memory import release_memory
from dp_flash_attention.planning.pricing import Say, nobody, priced_by_all
from dpfa_accounting.calibration import calibrate_noise_multiplier
from dpfa_attention.options import resolve
from dpfa_attention.sampler_end import check_end, cost_of_end, samplers
from dpfa_core.checks import fraction, integer, positive, require
from dpfa_core.contracts import Mechanism
from dpfa_core.errors import PluginError, PrivacyParameterError
from dpfa_core.events import Composed, EpsilonDelta, Event, NonPrivate, SelfComposed
from dpfa_core.registry import MECHANISMS
from dpfa_core.spec import AttentionProblem, NoisePlan, PrivacySpec, Sensitivity
from dpfa_mechanisms.explain import explain
from dpfa_mechanisms.noise_energy import draws, plan_multiplier
from dpfa_mechanisms.sensitivity import sensitivity

AGREEMENT = 1e-9
"""Two correct prices of one release differ by less than this, relative or absolute."""

ROUNDING = 1e-6
"""A plan's scales are float32, and its multiplier is computed back from them."""

LITTLE = 1.0 / 16.0
"""A sampler whose end costs more than this share of delta gives way to one that reaches further."""


@dataclass(frozen=True, kw_only=True)
class ReleaseQuestion:
    """One of epsilon (of a call), total_epsilon (of all calls) and noise_multiplier; the others are None."""

    problem: AttentionProblem
    delta: float
    unit: str
    relation: str = "replace"
    queries: str | None = None
    epsilon: float | None = None
    total_epsilon: float | None = None
    noise_multiplier: float | None = None
    mechanism: str = "gaussian"
    noise_structure: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    calls: int = 1
    seconds_per_call: float | None = None
    """Measured by whoever asks; nothing here guesses a speed."""

    def __post_init__(self) -> None:
        fraction("delta", self.delta, zero=False)
        integer("calls", self.calls, least=1)
        targets = ("epsilon", "total_epsilon", "noise_multiplier")
        for name in (*targets, "seconds_per_call"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        given = [name for name in targets if getattr(self, name) is not None]
        if len(given) != 1:
            raise PrivacyParameterError(
                "one of epsilon (of one call), total_epsilon (of all calls) and noise_multiplier must be given, got "
                f"{' and '.join(given) or 'none of them'}; what is left out is solved for."
            )

    @property
    def spec(self) -> PrivacySpec:
        """The promise; where epsilon is what is asked, any finite one stands for it."""
        return PrivacySpec(
            epsilon=self.epsilon or self.total_epsilon or 1.0,
            delta=self.delta,
            unit=self.unit,  # type: ignore[arg-type]
            relation=self.relation,  # type: ignore[arg-type]
            queries=self.queries,  # type: ignore[arg-type]
        )


def choose(mechanism: str, noise_structure: str | None) -> tuple[str, str | None]:
    """The mechanism's own name and the accountant an alias asks for; a structure is a mechanism of its own.

    Raises: PrivacyParameterError for a structure of noise that is not Gaussian.
    """
    if mechanism == "structured_noise":
        return noise_structure or "low_rank", None
    name, accountant = resolve(mechanism)
    if noise_structure is None:
        return name, accountant
    require(
        name in ("gaussian", noise_structure),
        f"noise_structure={noise_structure!r} shapes Gaussian noise and clips in l2, so mechanism must be 'gaussian'",
        mechanism,
        "Leave out one of them.",
    )
    return noise_structure, accountant


class ReleasePlanner:
    """A mechanism at work on one problem: noise from a promise, a price from noise."""

    def __init__(self, question: ReleaseQuestion) -> None:
        self.question, self.problem = question, question.problem
        name, self.accountant = choose(question.mechanism, question.noise_structure)
        self.mechanism: Mechanism = MECHANISMS.create(name, **question.parameters)
        kind = getattr(self.mechanism, "kind", "one that finishes tensors (add_noise)")
        if kind != "additive":
            raise PluginError(
                f"mechanism {name!r} must add planned noise (kind 'additive') to be planned, got {kind!r}; choose "
                "another one."
            )
        spec = question.spec
        reasons = tuple(self.mechanism.supports(spec, self.problem))
        if reasons:
            raise PrivacyParameterError(f"mechanism {name!r} cannot do this: {' '.join(reasons)}")
        self.bound: Sensitivity = sensitivity(spec, self.problem, self.mechanism.norm)

    def plan(self, noise_multiplier: float) -> NoisePlan:
        """What a backend would be told, with the sampler that a call would choose."""
        return self._sampled(noise_multiplier)[0]

    def end(self, noise_multiplier: float) -> float:
        """The delta that the end of the noise sampler costs in each call; 0 where nobody knows it yet."""
        return self._sampled(noise_multiplier)[1]

    def _sampled(self, noise_multiplier: float) -> tuple[NoisePlan, float]:
        first = self.mechanism.plan(self.bound, (noise_multiplier,), self.problem)
        if not _end_is_known(first):
            return first, 0.0
        delta = self.question.delta
        for plan in samplers(first, self.problem):
            cost = cost_of_end(plan, self.problem, self.bound, noise_multiplier=noise_multiplier, delta=delta)
            if cost <= LITTLE * delta:
                break
        return plan, cost

    def event(self, noise_multiplier: float) -> Event:
        """The price of one call, with the end of its sampler; NonPrivate where delta cannot pay that."""
        own, end = self.mechanism.event(noise_multiplier), self.end(noise_multiplier)
        if end >= self.question.delta:
            return NonPrivate()
        return Composed((own, EpsilonDelta(0.0, end))) if end else own

    def noise_multiplier(self, say: Say = nobody) -> float:
        """The one given, or the least that keeps the epsilon given.

        Raises: PrivacyParameterError if delta cannot pay the end of the sampler.
        """
        question = self.question
        if question.noise_multiplier is not None:
            self._delta_left(question.noise_multiplier)
            return question.noise_multiplier
        say("noise multiplier")
        if question.total_epsilon is not None:
            return calibrate_noise_multiplier(
                lambda z: SelfComposed(self.event(z), question.calls),
                question.total_epsilon,
                question.delta,
                self.accountant or "auto",
            )
        assert question.epsilon is not None  # noqa: S101  (one of the three is given)
        least = self.mechanism.calibrate(question.epsilon, question.delta)
        left = self._delta_left(least)
        found = max(least, self.mechanism.calibrate(question.epsilon, left))
        if self.accountant is None:
            return found
        by_name = calibrate_noise_multiplier(self.mechanism.event, question.epsilon, left, self.accountant)
        return max(found, by_name)

    def _delta_left(self, noise_multiplier: float) -> float:
        """What the end of the sampler leaves of delta for the noise itself."""
        cost, delta = self.end(noise_multiplier), self.question.delta
        epsilon = self.question.epsilon
        check_end(cost, delta, noise_multiplier=noise_multiplier, dtype=self.problem.dtype, epsilon=epsilon)
        return math.nextafter(delta - cost, 0.0) if cost else delta


def _end_is_known(plan: NoisePlan) -> bool:
    return plan.distribution in ("gaussian", "laplace", "discrete_gaussian")


def _check_plan(plan: NoisePlan, spec: PrivacySpec, problem: AttentionProblem, noise_multiplier: float) -> None:
    """Its event says `noise_multiplier`; its scales, rows and structure have to say so, too."""
    if plan.distribution == "custom":
        return
    found = plan_multiplier(plan, spec, problem)
    if found < noise_multiplier * (1.0 - ROUNDING):
        raise PluginError(
            f"mechanism {plan.mechanism!r} must plan noise of multiplier {noise_multiplier:.9g} or more, as it says, "
            f"got {found:.9g} in its scales; correct the plugin."
        )


def _as_promised(epsilons: dict[str, float], promised: float | None) -> dict[str, float]:
    """The mechanism has calibrated for `promised`: a price that differs from it by round-off says the same."""
    if promised is None:
        return epsilons
    same = promised * (1.0 + AGREEMENT) + AGREEMENT
    return {name: promised if promised < value <= same else value for name, value in epsilons.items()}


def plan_release(question: ReleaseQuestion, say: Say = nobody) -> tuple[ReleasePlanner, dict[str, Any]]:
    """The planner, and all that is told of the release as JSON.

    Raises: PrivacyParameterError with the mechanism's reasons; PluginError if accounting prices the release
    above what the mechanism calibrated; UnsupportedEvent if nobody can price it.
    """
    planner = ReleasePlanner(question)
    problem, bound = planner.problem, planner.bound
    noise_multiplier = planner.noise_multiplier(say)
    plan, end = planner.plan(noise_multiplier), planner.end(noise_multiplier)
    _check_plan(plan, question.spec, problem, noise_multiplier)
    event = planner.event(noise_multiplier)
    one = priced_by_all(event, 1, question.delta, say)
    total = one if question.calls == 1 else priced_by_all(event, question.calls, question.delta, say)
    epsilons = _as_promised(dict(one.by_accountant), question.epsilon)
    epsilon = min(epsilons.values())
    if question.epsilon is not None and epsilon > question.epsilon:
        raise PluginError(
            f"mechanism {plan.mechanism!r} must cost at most epsilon={question.epsilon} at "
            f"delta={question.delta:g}, got {epsilon:.9g} by accounting; check both with `dpfa verify`."
        )

    power = noise_power(plan, problem)
    saved = energy_saved(plan, question.spec, problem, bound, noise_multiplier)
    random_numbers = draws(plan, problem)
    clip_norm = problem.clip_norm or 0.0
    ratio = clip_norm / math.sqrt(problem.head_dim * power) if power else None
    records = problem.batch * (problem.kv_len if question.unit == "token" else 1)
    warnings = cautions.of_the_promise(
        total.epsilon,
        question.delta,
        records,
        "tokens of a call" if question.unit == "token" else "sequences of a call",
    ) + cautions.of_a_release(ratio)
    return planner, {
        "solved_for": "epsilon" if question.noise_multiplier is not None else "noise_multiplier",
        "mechanism": plan.mechanism,
        "distribution": plan.distribution,
        "structure": plan.structure.to_json() if plan.structure else None,
        "noise_multiplier": noise_multiplier,
        "noise_scale": max(plan.head_scale) * max(plan.row_scale),
        "noise_std": None if power is None else math.sqrt(power),
        "sensitivity": bound.value,
        "sensitivity_naive": bound.naive,
        "saved_by_sensitivity_percent": max(0.0, 100.0 * (1.0 - bound.value / bound.naive)) if bound.naive else 0.0,
        "saved_noise_energy_percent": None if saved is None else 100.0 * saved,
        "theorem": bound.item,
        "explanation": list(explain(question.spec, problem, planner.mechanism.norm).sentences),
        "norm": bound.norm,
        "epsilon": epsilon,
        "target_epsilon": question.epsilon,
        "delta": question.delta,
        "epsilons": epsilons,
        "no_bound": dict(one.reasons),
        "remarks": [f"{name}: {remark}" for name, remark in one.remarks],
        "sampler_end_delta": end if _end_is_known(plan) else None,
        "calls": question.calls,
        "target_total_epsilon": question.total_epsilon,
        "total_epsilon": total.epsilon,
        "total_epsilons": dict(total.by_accountant),
        "total_no_bound": dict(total.reasons),
        "unit": question.unit,
        "relation": question.relation,
        "queries": question.queries,
        "signal_to_noise": ratio,
        "noise_draws": random_numbers,
        "memory_bytes": release_memory(problem, random_numbers),
        "seconds": question.calls * question.seconds_per_call if question.seconds_per_call else "not measured",
        "warnings": warnings,
    }
