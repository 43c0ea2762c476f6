"""The least noise for a target, and the least epsilon for what was released."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from dpfa_core.checks import fraction, positive
from dpfa_core.errors import PrivacyParameterError, UnsupportedEvent
from dpfa_core.events import Event
from dpfa_core.registry import ACCOUNTANTS
from dpfa_core.spending import first_party_accountants, spending

TIGHTEST_FIRST = ("gdp", "pld", "prv")
"""Of those that can price the release, "auto" takes the first; all others come after them."""

SLOW = ("pld", "prv")
"""Seconds for a question: the search starts from what RDP finds."""

WIDEST = 2.0**30
"""Noise multipliers are sought between its inverse and it."""


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

    Guarantee: tested; the accountant itself was asked at the result, so a search can cost noise but never
    privacy.
    Args: `make_event` gives the whole release for a noise multiplier, cheaper as that grows;
    `accountant` "auto" (the tightest that can price it) or a name; `relative_tolerance` of epsilon.
    Raises: PrivacyParameterError if no noise multiplier reaches the target; UnsupportedEvent if no
    accountant has a bound; PluginError for an unknown accountant.
    """
    positive("epsilon", epsilon)
    fraction("delta", delta)
    positive("relative_tolerance", relative_tolerance)
    names = first_party_accountants()

    def search(name: str) -> tuple[float, float | None]:
        near = _near(make_event, epsilon, delta) if name in SLOW and "rdp" in names else None
        return _least(_price(name, make_event, delta), epsilon, relative_tolerance, near or 1.0), near

    if accountant != "auto":
        return search(accountant)[0]
    reasons = []
    for name in sorted(names, key=lambda name: (*TIGHTEST_FIRST, name).index(name)):
        try:
            found, near = search(name)
            return found if near is None else min(found, near)
        except UnsupportedEvent as error:
            reasons.append(f"{name}: {error}")
    raise UnsupportedEvent("no installed accountant can price this release: " + " ".join(reasons))


def _near(make_event: Callable[[float], Event], epsilon: float, delta: float) -> float | None:
    """A multiplier that keeps the target by RDP: enough, and close to what a slow accountant will find."""
    try:
        return _least(_price("rdp", make_event, delta), epsilon, 1e-2)
    except UnsupportedEvent:
        return None


def _price(name: str, make_event: Callable[[float], Event], delta: float) -> Callable[[float], float]:
    def price(noise_multiplier: float) -> float:
        return float(ACCOUNTANTS.create(name).compose(make_event(noise_multiplier)).epsilon(delta))

    return price


def _least(price: Callable[[float], float], epsilon: float, tolerance: float, start: float = 1.0) -> float:
    """A multiplier whose price lies in [epsilon (1 - tolerance), epsilon], or the least there is.

    Points are (multiplier, price); `cheap` keeps the target and `dear` does not.
    """
    cheap: tuple[float, float] | None = None
    dear: tuple[float, float] | None = None
    multiplier = start
    while cheap is None or (dear is None and cheap[1] < epsilon * (1.0 - tolerance)):
        if not 1.0 / WIDEST <= multiplier <= WIDEST:
            if cheap is not None:
                return cheap[0]
            raise PrivacyParameterError(
                f"epsilon must be one that more noise can reach, got {epsilon}: at noise multiplier "
                f"{dear[0] if dear else start:.3g} the release still costs more; raise epsilon or delta."
            )
        cost = price(multiplier)
        ratio = cost / epsilon
        if cost <= epsilon:
            cheap = (multiplier, cost)
            multiplier *= min(0.98, max(0.25, ratio))
        else:
            dear = (multiplier, cost)
            multiplier *= max(1.02, min(4.0, ratio))
    turn = 0
    while dear is not None and cheap[1] < epsilon * (1.0 - tolerance) and cheap[0] > dear[0] * (1.0 + 1e-12):
        # every third point halves the bracket, so that no curve can hold the search up
        turn += 1
        middle = _between(dear, cheap, epsilon * (1.0 - tolerance / 2.0) if turn % 3 else None)
        cost = price(middle)
        cheap, dear = ((middle, cost), dear) if cost <= epsilon else (cheap, (middle, cost))
    return cheap[0]


def _between(dear: tuple[float, float], cheap: tuple[float, float], aim: float | None) -> float:
    """Where the straight line through both points, in logarithms, meets `aim`; else half way."""
    share = 0.5
    if aim is not None and cheap[1] > 0 and math.isfinite(dear[1]):
        share = math.log(dear[1] / aim) / math.log(dear[1] / cheap[1])
    return dear[0] * math.pow(cheap[0] / dear[0], min(0.99, max(0.01, share)))
