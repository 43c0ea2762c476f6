"""From a promise to a plan: the mechanism calibrates, the sampler's end is charged, accounting prices it again."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from functools import lru_cache

from dpfa_accounting.calibration import calibrate_noise_multiplier
from dpfa_attention.head_budgets import HeadBudgets, head_budgets
from dpfa_attention.plan_checks import AGREEMENT, check_plan, check_range, check_structure
from dpfa_attention.sampler_end import check_end, cost_of_end, samplers
from dpfa_core.checks import positive, require
from dpfa_core.contracts import Mechanism
from dpfa_core.errors import DPFAError, PluginError, PrivacyParameterError, UnsupportedEvent
from dpfa_core.events import Composed, EpsilonDelta, Event, NonPrivate
from dpfa_core.plugin_names import parts
from dpfa_core.registry import MECHANISMS, Entry
from dpfa_core.spec import AttentionProblem, NoisePlan, Norm, PrivacySpec, Sensitivity
from dpfa_core.spending import first_party_accountants, spending, upper_bound
from dpfa_mechanisms.sensitivity import sensitivity

LITTLE = 1.0 / 16.0
"""A sampler that costs more than this share of delta gives way to one that reaches further."""


ROUNDS = 4
"""In which a calibration meets the rounding of an accountant; each takes off twice what was too much."""

MULTIPLIER = "noise_multiplier"
"""The parameter of a mechanism's name that takes the place of its calibration."""


@dataclass(frozen=True)
class PricedRelease:
    """All that is known of a release before a tensor is touched."""

    mechanism: str
    plan: NoisePlan
    event: Event
    """What the ledger is charged: the mechanism's own event and the end of the sampler."""
    epsilon: float
    """At the delta asked for, the end of the sampler included."""
    noise_multiplier: float
    noise_std: float
    sensitivity: Sensitivity | None
    head_epsilons: tuple[float, ...] = ()
    """What each head costs alone, where heads differ."""


@lru_cache(maxsize=1024)
def noiseless_release(entry: Entry, problem: AttentionProblem) -> PricedRelease:
    """Attention without noise, clipped in the mechanism's norm if at all: epsilon is infinite.

    Of a noise structure only what the clip needs is left.
    """
    mechanism, structure = _additive(entry), None
    norm: Norm = "l2" if problem.clip_norm is None else mechanism.norm
    if norm == "whitened_l2":
        nothing = Sensitivity(norm=norm, value=0.0, naive=0.0, item="none")
        structure = mechanism.plan(nothing, (1.0,), problem).structure
    plan = NoisePlan(
        mechanism="none", distribution="none", head_scale=(0.0,), norm=norm, structure=structure, transform="bm64"
    )
    check_structure(entry, plan, problem)
    return PricedRelease("none", plan, NonPrivate(), math.inf, 0.0, 0.0, None)


@lru_cache(maxsize=1024)
def priced_release(
    entry: Entry,
    accountant: str | None,
    spec: PrivacySpec,
    problem: AttentionProblem,
    lifetime_delta: float,
    head_epsilons: tuple[float, ...] | None = None,
    allow_infinite_heads: bool = False,
) -> PricedRelease:
    """The noise that keeps `spec`, and what it costs.

    The noise sampler ends somewhere, which costs a delta of its own: it is taken off the promised delta
    before the mechanism calibrates, and is part of the event, so that many calls add it up.

    Guarantee: tested (price by an accountant that did not choose the noise; cost of the end: see ``sampler_end``).
    Args: `entry` of the mechanism, whose name may fix the noise, "gaussian(noise_multiplier=4.0)": then epsilon is
    what that costs, and `spec` the most that it may cost; `accountant` to calibrate by, None for the mechanism's closed
    form; `lifetime_delta` at which the ledger adds up; `head_epsilons`, see ``head_budgets``.
    Raises: PrivacyParameterError with the mechanism's reasons, or if delta cannot pay the sampler's end;
    PluginError if accounting prices the release above the promise; UnsupportedEvent if it cannot price it.
    """
    mechanism, heads, fixed = _additive(entry), None, _fixed(entry)
    if head_epsilons is not None:
        heads = head_budgets(
            mechanism,
            head_epsilons,
            # where the noise is given, only the ratios matter, and any total gives them
            spec.epsilon if fixed is None else 1.0,
            spec.delta,
            heads=problem.q_heads,
            allow_infinite=allow_infinite_heads,
        )
        # what the list costs in all, or what the heads that have noise may cost; given noise costs what it costs
        most = heads.epsilon if fixed is None else min(spec.epsilon, sys.float_info.max)
        spec = dataclasses.replace(spec, epsilon=most)
    reasons = tuple(mechanism.supports(spec, problem))
    if reasons:
        raise PrivacyParameterError(f"mechanism {entry.name!r} cannot keep this promise: {' '.join(reasons)}")
    bound = sensitivity(spec, problem, mechanism.norm)

    # With the whole delta the noise is the least, and the sampler's end costs the most.
    least = mechanism.calibrate(spec.epsilon, spec.delta) if fixed is None else fixed
    first = _planned(entry, mechanism, bound, least, problem, heads)
    check_structure(entry, first, problem)
    for plan in samplers(first, problem):
        cost = cost_of_end(plan, problem, bound, noise_multiplier=least, delta=spec.delta)
        if cost <= LITTLE * spec.delta:
            break
    given = None if fixed is not None else spec.epsilon
    check_end(cost, spec.delta, noise_multiplier=least, dtype=problem.dtype, epsilon=given)
    left = math.nextafter(spec.delta - cost, 0.0)

    def event_of(multiplier: float) -> Event:
        return mechanism.event(multiplier) if heads is None else heads.event(mechanism, multiplier)

    noise_multiplier = least
    if fixed is None:
        noise_multiplier = max(least, mechanism.calibrate(spec.epsilon, left))
        if accountant is not None:
            by_name = calibrate_noise_multiplier(event_of, spec.epsilon, left, accountant)
            noise_multiplier = max(noise_multiplier, by_name)
        if heads is not None:
            noise_multiplier = max(noise_multiplier, heads.least(mechanism, left))
    event = event_of(noise_multiplier)
    if fixed is None:
        found = confirmed(entry, accountant, event, spec, left)
        for _ in range(ROUNDS):
            if found <= spec.epsilon:
                break
            # accounting rounds up: a hair more noise, and a budget of epsilon holds this very call
            noise_multiplier *= 1.0 + 2.0 * (found / spec.epsilon - 1.0)
            event = event_of(noise_multiplier)
            found = confirmed(entry, accountant, event, spec, left)
        epsilon = min(found, spec.epsilon)
    else:
        epsilon = _price_of_fixed(fixed, accountant, event, spec, left)

    plan = dataclasses.replace(
        _planned(entry, mechanism, bound, noise_multiplier, problem, heads), transform=plan.transform
    )
    check_structure(entry, plan, problem)
    check_plan(entry, plan, noise_multiplier, bound, spec, problem)
    check_range(plan, problem)
    lifetime = max(spec.delta, lifetime_delta)
    end = EpsilonDelta(0.0, cost_of_end(plan, problem, bound, noise_multiplier=noise_multiplier, delta=lifetime))
    scale = max(plan.head_scale) * max(plan.row_scale)
    covered = heads is None or heads.complete
    return PricedRelease(
        entry.name,
        plan,
        Composed((event, end)) if covered else NonPrivate(),
        epsilon if covered else math.inf,
        noise_multiplier if covered else 0.0,
        scale * math.sqrt(2.0) if plan.distribution == "laplace" else scale,
        bound,
        () if heads is None else heads.epsilons(noise_multiplier, left),
    )


def _planned(
    entry: Entry,
    mechanism: Mechanism,
    bound: Sensitivity,
    noise_multiplier: float,
    problem: AttentionProblem,
    heads: HeadBudgets | None,
) -> NoisePlan:
    if heads is None:
        return mechanism.plan(bound, (noise_multiplier,), problem)
    multipliers = heads.multipliers(noise_multiplier)
    # a mechanism plans noise; the heads that are to have none lose it afterwards
    plan = mechanism.plan(bound, tuple(part or max(multipliers) for part in multipliers), problem)
    if len(plan.head_scale) != len(multipliers):
        raise PluginError(
            f"mechanism {entry.name!r} of {entry.origin} must plan a scale for each of {len(multipliers)} heads, got "
            f"{len(plan.head_scale)}; nothing was released. Correct the plugin."
        )
    if heads.complete:
        return plan
    scales = tuple(scale if part else 0.0 for scale, part in zip(plan.head_scale, multipliers, strict=True))
    return dataclasses.replace(plan, head_scale=scales, noiseless_heads=True)


def _fixed(entry: Entry) -> float | None:
    """The noise multiplier that the mechanism's name gives, if it gives one."""
    given = dict(parts(entry.name)[1]).get(MULTIPLIER)
    if given is None:
        return None
    positive(MULTIPLIER, given, remedy="A release without noise has epsilon=inf.")
    return float(given)


def _price_of_fixed(
    noise_multiplier: float, accountant: str | None, event: Event, spec: PrivacySpec, delta: float
) -> float:
    if accountant is None:
        cost = spending(((event, 1),), delta).epsilon
    else:
        cost = upper_bound(accountant, ((event, 1),), delta)
    require(
        cost <= spec.epsilon,
        f"{MULTIPLIER}={noise_multiplier:.6g} must cost at most epsilon={spec.epsilon:.6g} at delta={spec.delta:.6g}",
        f"a cost of {cost:.6g}",
        "Raise it or epsilon.",
    )
    return cost


def _additive(entry: Entry) -> Mechanism:
    bare, given = parts(entry.name)
    mechanism: Mechanism = MECHANISMS.create(bare, **{name: value for name, value in given if name != MULTIPLIER})
    kind = getattr(mechanism, "kind", "one that finishes tensors (add_noise)")
    if kind != "additive":
        raise PluginError(
            f"mechanism {entry.name!r} of {entry.origin} must add planned noise (kind 'additive') to release "
            f"attention, got {kind!r}; choose another one."
        )
    return mechanism


def price(entry: Entry, accountant: str | None, event: Event, spec: PrivacySpec, delta: float) -> float:
    """Epsilon of `event` at `delta` by the first accountant that confirms the promise, which it does not exceed."""
    return min(confirmed(entry, accountant, event, spec, delta), spec.epsilon)


def confirmed(entry: Entry, accountant: str | None, event: Event, spec: PrivacySpec, delta: float) -> float:
    """What the first accountant says that confirms the promise, up to its rounding."""
    promised = spec.epsilon * (1.0 + AGREEMENT) + AGREEMENT
    above: list[str] = []
    reasons: list[str] = []
    for name in (accountant,) if accountant else first_party_accountants():
        try:
            found = upper_bound(name, ((event, 1),), delta)
        except DPFAError as error:
            reasons.append(f"{name}: {error}")
            continue
        if found <= promised:
            return found
        above.append(f"{name} {found:.9g}")
    if above:
        raise PluginError(
            f"mechanism {entry.name!r} of {entry.origin} must cost at most epsilon={spec.epsilon} at "
            f"delta={delta:.6g}, got {', '.join(above)} for {event}; nothing was released. One of them is wrong: "
            "check both with `dpfa verify`."
        )
    raise UnsupportedEvent(
        f"no installed accountant can price {event!r} of mechanism {entry.name!r} at {delta=:.6g}; nothing was "
        f"released. Install dpfa-accounting or choose another mechanism. {' '.join(reasons)}"
    )
