"""The least noise, the most steps or the largest sample for a target, and the least epsilon for what was released."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, overload

from dpfa_core.checks import fraction, one_of, positive, require
from dpfa_core.errors import PrivacyParameterError, UnsupportedEvent
from dpfa_core.events import EpsilonDelta, Event
from dpfa_core.registry import ACCOUNTANTS
from dpfa_core.spending import first_party_accountants, spending

TIGHTEST_FIRST = ("gdp", "pld", "prv")
"""Of those that can price the release, "auto" takes the first; all others come after them."""

SLOW = ("pld", "prv")
"""Seconds for a question: the search starts from what RDP finds."""

Parameter = Literal["noise_multiplier", "steps", "sampling_probability"]


@dataclass(frozen=True)
class _Axis:
    """Where a parameter is sought."""

    private: float
    """The end that costs least."""
    costly: float
    """The end that costs most."""
    start: float
    whole: bool = False

    def inside(self, value: float) -> float:
        low, high = sorted((self.private, self.costly))
        return min(high, max(low, float(math.floor(value)) if self.whole else value))


AXES = {
    "noise_multiplier": _Axis(2.0**30, 2.0**-30, 1.0),
    "steps": _Axis(1.0, 2.0**40, 16.0, whole=True),
    "sampling_probability": _Axis(2.0**-40, 1.0, 2.0**-6),
}

NEAR = 1e-2
"""How near to its own limit RDP brings the search of a slow accountant."""

MOST_POINTS = 300
"""Above what any search needs that halves its bracket at every third point."""


class _Unreachable(PrivacyParameterError):
    """Not even the private end of the axis keeps the target."""


def least_epsilon(
    events: Iterable[Event | tuple[Event, int]], delta: float
) -> tuple[float, dict[str, float], dict[str, str]]:
    """The least valid upper bound on epsilon over the installed first-party accountants.

    Guarantee: assumed (each accountant's bound has its own).
    Args: events, or pairs (event, count).
    Returns: (epsilon, {accountant: epsilon}, {accountant: why it has none}).
    Raises: PluginError without an accountant; UnsupportedEvent if none has a bound.
    """
    fraction("delta", delta)
    pairs = [(item, 1) if isinstance(item, Event) else item for item in events]
    spent = spending(pairs, delta)
    return spent.epsilon, dict(spent.by_accountant), dict(spent.reasons)


def calibrate_noise_multiplier(
    make_event: Callable[[float], Event],
    epsilon: float,
    delta: float,
    accountant: str = "auto",
    *,
    relative_tolerance: float = 1e-4,
) -> float:
    """A noise multiplier whose event costs at most `epsilon` at `delta`, and nearly all of it.

    Guarantee: as of ``calibrate``, which it calls.
    Args: `make_event` gives the whole release for a noise multiplier, cheaper as that grows;
    `accountant` "auto" (the tightest that can price it) or a name; `relative_tolerance` of epsilon.
    Raises: PrivacyParameterError if no noise multiplier reaches the target; UnsupportedEvent if no
    accountant has a bound; PluginError for an unknown accountant.
    """
    positive("epsilon", epsilon)
    fraction("delta", delta)
    target = EpsilonDelta(epsilon, delta)
    return calibrate(make_event, target, accountant=accountant, relative_tolerance=relative_tolerance)


@overload
def calibrate(
    event_of: Callable[[int], Event],
    target: EpsilonDelta,
    *,
    parameter: Literal["steps"],
    accountant: str = ...,
    relative_tolerance: float = ...,
) -> int: ...


@overload
def calibrate(
    event_of: Callable[[float], Event],
    target: EpsilonDelta,
    *,
    parameter: Literal["noise_multiplier", "sampling_probability"] = ...,
    accountant: str = ...,
    relative_tolerance: float = ...,
) -> float: ...


def calibrate(
    event_of: Callable[[Any], Event],
    target: EpsilonDelta,
    *,
    parameter: Parameter = "noise_multiplier",
    accountant: str = "auto",
    relative_tolerance: float = 1e-4,
) -> float:
    """The value of one parameter whose release costs at most the target, and nearly all of it.

    The least noise multiplier, the most steps or the largest sampling probability, to the tolerance.

    Guarantee: tested; the accountant itself was asked at the very result, so that a search, also over a
    cost that is not monotone, can waste noise but never privacy.
    Args: `event_of` gives the whole release for a value of `parameter`, an int for "steps"; `accountant`
    "auto" (the tightest that can price it) or a name; `relative_tolerance` of the target's epsilon.
    Returns: a sampling probability of 1 where sampling everybody is affordable.
    Raises: PrivacyParameterError if no value keeps the target, or no number of steps exceeds it;
    UnsupportedEvent if no accountant has a bound; PluginError for an unknown accountant.
    """
    require(isinstance(target, EpsilonDelta), "target must be an EpsilonDelta", target)
    positive("epsilon", target.epsilon)
    one_of("parameter", parameter, tuple(AXES))
    positive("relative_tolerance", relative_tolerance)
    names, axis = first_party_accountants(), AXES[parameter]
    best = min if axis.private > axis.costly else max

    def least(name: str, tolerance: float, start: float) -> float:
        return _furthest(_price(name, event_of, target.delta, axis), target, parameter, tolerance, start)

    def search(name: str) -> float:
        near = None
        if name in SLOW and "rdp" in names:
            try:
                # a value that keeps the target by RDP is enough, and close to what a slow accountant finds
                near = least("rdp", NEAR, axis.start)
            except (UnsupportedEvent, _Unreachable):
                near = None
        try:
            found = least(name, relative_tolerance, axis.start if near is None else near)
        except _Unreachable:
            if near is None or accountant != "auto":
                raise
            return near
        return found if near is None or accountant != "auto" else best(found, near)

    def answer(value: float) -> float:
        return int(value) if axis.whole else value

    if accountant != "auto":
        return answer(search(accountant))
    reasons = []
    for name in sorted(names, key=lambda name: (*TIGHTEST_FIRST, name).index(name)):
        try:
            return answer(search(name))
        except UnsupportedEvent as error:
            reasons.append(f"{name}: {error}")
    raise UnsupportedEvent("no installed accountant can price this release: " + " ".join(reasons))


def _price(name: str, event_of: Callable[[Any], Event], delta: float, axis: _Axis) -> Callable[[float], float]:
    def price(value: float) -> float:
        event = event_of(int(value) if axis.whole else value)
        return float(ACCOUNTANTS.create(name).compose(event).epsilon(delta))

    return price


def _furthest(
    price: Callable[[float], float], target: EpsilonDelta, parameter: Parameter, tolerance: float, start: float
) -> float:
    """A value whose price lies in [epsilon (1 - tolerance), epsilon], or the costliest that keeps epsilon.

    Points are (value, price); `cheap` keeps the target and `dear` does not.
    """
    axis, epsilon = AXES[parameter], target.epsilon
    enough = epsilon * (1.0 - tolerance)
    cheap: tuple[float, float] | None = None
    dear: tuple[float, float] | None = None
    value = axis.inside(start)
    asked = 0
    while cheap is None or (cheap[1] < enough and not _closed(axis, dear, cheap)):
        asked += 1
        if asked > MOST_POINTS:
            break
        try:
            cost = price(value)
        except UnsupportedEvent:
            if cheap is None and dear is None:
                raise
            # a bound exists elsewhere on the axis: here there is none
            cost = math.inf
        if cost <= epsilon:
            cheap = (value, cost)
            if value == axis.costly:
                return _all_affordable(value, target, parameter)
        else:
            dear = (value, cost)
            if value == axis.private:
                raise _Unreachable(_none_reaches(value, target, parameter))
        value = _next(axis, dear, cheap, epsilon * (1.0 - tolerance / 2.0), asked)
    if cheap is None:
        raise _Unreachable(_none_reaches(value, target, parameter))
    return cheap[0]


def _closed(axis: _Axis, dear: tuple[float, float] | None, cheap: tuple[float, float]) -> bool:
    if dear is None:
        return False
    gap = abs(dear[0] - cheap[0])
    return gap <= (1.0 if axis.whole else 1e-12 * max(dear[0], cheap[0]))


def _next(
    axis: _Axis, dear: tuple[float, float] | None, cheap: tuple[float, float] | None, aim: float, asked: int
) -> float:
    """Where to ask next: outwards until the target lies between two points, then between them."""
    if dear is not None and cheap is not None:
        # every third point halves the bracket, so that no curve can hold the search up
        value = _between(dear, cheap, aim if asked % 3 else None)
        if axis.whole:
            low, high = sorted((dear[0], cheap[0]))
            return min(high - 1.0, max(low + 1.0, float(round(value))))
        return value
    known = cheap or dear
    if known is None:
        return axis.start
    ratio = known[1] / aim
    step = min(0.98, max(0.25, ratio)) if known is cheap else max(1.02, min(4.0, ratio))
    moved = axis.inside(known[0] * (step if axis.private > axis.costly else 1.0 / step))
    if axis.whole and moved == known[0]:
        moved = axis.inside(moved + (1.0 if known is cheap else -1.0))
    return moved


def _between(dear: tuple[float, float], cheap: tuple[float, float], aim: float | None) -> float:
    """Where the straight line through both points, in logarithms, meets `aim`; else half way."""
    share = 0.5
    if aim is not None and cheap[1] > 0 and math.isfinite(dear[1]):
        share = math.log(dear[1] / aim) / math.log(dear[1] / cheap[1])
    return dear[0] * math.pow(cheap[0] / dear[0], min(0.99, max(0.01, share)))


def _all_affordable(value: float, target: EpsilonDelta, parameter: Parameter) -> float:
    if parameter == "steps":
        raise PrivacyParameterError(
            f"steps must be limited by the target, got epsilon={target.epsilon:.6g} at delta={target.delta:.3g}, which "
            f"even {int(value)} steps keep; choose the number of steps freely or lower the target."
        )
    return value


def _none_reaches(value: float, target: EpsilonDelta, parameter: Parameter) -> str:
    means, end = {
        "noise_multiplier": ("more noise", f"noise multiplier {value:.3g}"),
        "steps": ("fewer steps", "one step"),
        "sampling_probability": ("rarer sampling", f"sampling probability {value:.3g}"),
    }[parameter]
    return (
        f"epsilon must be one that {means} can reach, got {target.epsilon}: at {end} the release still costs more; "
        "raise epsilon or delta."
    )
