"""Events in the form in which accountants price them: equal ones first, then such as cost at least as much."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dpfa_accounting import black_box, truncation
from dpfa_core.events import (
    BallsInBins,
    Composed,
    DiscreteGaussian,
    EpsilonDelta,
    Event,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    RandomizedResponse,
    SelfComposed,
    TruncatedPoisson,
)

Releases = tuple[tuple[Event, int], ...]
"""Different events with their counts, in an order that does not depend on how they came."""

Sampled = PoissonSampled | TruncatedPoisson | FixedSizeSampled | BallsInBins


class Coarser(NamedTuple):
    """Releases that cost at least as much as the event they stand for, with `slack` added to delta."""

    releases: tuple[tuple[Event, int], ...]
    slack: float
    remark: str


def leaves(event: Event, count: int = 1) -> Iterator[tuple[Event, int]]:
    """The releases that `event` stands for: nothing in them is a composition of several."""
    match event:
        case Composed(events):
            for part in events:
                yield from leaves(part, count)
        case SelfComposed(part, times):
            yield from leaves(part, count * times)
        case PoissonSampled() | TruncatedPoisson() | FixedSizeSampled() | BallsInBins():
            # what one sample answers together is one release of it
            joint = _joint(event.event)
            if joint == NonPrivate():
                yield joint, count
            elif joint != Composed(()):
                yield dataclasses.replace(event, event=joint), count
        case _:
            yield event, count


def equal(event: Event, count: int = 1) -> Iterator[tuple[Event, int]]:
    """The same release without what makes no difference, such as a sample of everybody."""
    match event:
        case PoissonSampled(first, PoissonSampled(second, inner, lower), upper) if lower == upper:
            # whoever is drawn twice independently is drawn with the product
            both = min(first, second, math.nextafter(first * second, 1.0))
            yield from equal(PoissonSampled(both, inner, upper), count)
        case PoissonSampled(1, inner):
            yield from _all(leaves(inner, count))
        case FixedSizeSampled(size, population, inner, "replace") if size == population:
            yield from _all(leaves(inner, count))
        case BallsInBins(1, rounds, inner):
            yield from _all(leaves(inner, count * rounds))
        case TruncatedPoisson() if truncation.overflow(event) == 0:
            yield from equal(truncation.plain(event), count)
        case RandomizedResponse(1) | EpsilonDelta(0, 0):
            pass
        case _:
            yield event, count


def coarser(event: Event) -> Coarser | None:
    """A bound by a theorem about releases of its kind, for an accountant that has nothing better."""
    match event:
        case EpsilonDelta(epsilon, delta) if epsilon > 0 and delta > 0:
            # such a release can be had from a pure one that fails with probability delta
            # (Kairouz, Oh & Viswanath 2015, Theorem 3.1)
            return Coarser(
                ((EpsilonDelta(epsilon, 0.0), 1),), delta, "EpsilonDelta is priced as a pure release and its delta."
            )
        case BallsInBins(_, rounds, inner):
            return Coarser(
                tuple(leaves(inner, rounds)),
                0.0,
                f"{described(event)} is priced without amplification, by joint convexity: one release for each round.",
            )
        case PoissonSampled(event=inner) | FixedSizeSampled(relation="replace", event=inner):
            known = black_box.amplified(event, leaves(inner))
            if known is not None:
                return Coarser(
                    ((known, 1),),
                    0.0,
                    f"{described(event)} is priced by the general amplification theorem, from epsilon and delta alone.",
                )
            if not isinstance(inner, Gaussian | Laplace):
                # given who was drawn, neighbours differ in one record or in none (joint convexity)
                return Coarser(
                    tuple(leaves(inner)),
                    0.0,
                    f"{described(event)} is priced without amplification.",
                )
    return None


def nested(event: Event) -> str:
    """Why a sample inside another one has no price; empty if there is none."""
    if isinstance(event, Sampled):
        for part, _ in leaves(event.event):
            if isinstance(part, Sampled):
                return f"a sample inside another one has no proved price, got {described(event)}"
    return ""


def merged(releases: Iterable[tuple[Event, int]]) -> Releases:
    """The same releases with all Gaussians on the whole data as one, exactly: mu**2 adds up."""
    rest: Counter[Event] = Counter()
    gaussians: list[tuple[float, int]] = []
    for release, times in releases:
        for event, count in equal(release, times):
            if isinstance(event, Gaussian):
                gaussians.append((event.noise_multiplier, count))
            else:
                rest[event] += count
    if gaussians:
        rest[_together(gaussians)] += 1
    return ordered(rest)


def ordered(counts: Counter[Event]) -> Releases:
    return tuple(sorted(counts.items(), key=lambda item: json.dumps(item[0].to_json(), sort_keys=True)))


def described(event: Event) -> str:
    """The kinds of the event and of what is inside it."""
    inner = f" around {type(event.event).__name__}" if isinstance(event, Sampled) else ""
    return type(event).__name__ + inner


def linear(event: Event) -> bool:
    """Whether its Renyi divergence is order / (2 noise_multiplier**2)."""
    return isinstance(event, Gaussian | DiscreteGaussian)


def _all(releases: Iterable[tuple[Event, int]]) -> Iterator[tuple[Event, int]]:
    for event, count in releases:
        yield from equal(event, count)


def _joint(event: Event) -> Event:
    """What is released of one sample, in a form that does not depend on its order."""
    parts: Counter[Event] = Counter()
    for part, count in leaves(event):
        parts[part] += count
    if NonPrivate() in parts:
        return NonPrivate()
    gaussians = [(part.noise_multiplier, count) for part, count in parts.items() if isinstance(part, Gaussian)]
    rest: Counter[Event] = Counter({part: count for part, count in parts.items() if not isinstance(part, Gaussian)})
    if gaussians:
        rest[_together(gaussians)] += 1
    together = tuple(part if count == 1 else SelfComposed(part, count) for part, count in ordered(rest))
    return together[0] if len(together) == 1 else Composed(together)


def _together(gaussians: list[tuple[float, int]]) -> Gaussian:
    if [count for _, count in gaussians] == [1]:
        return Gaussian(gaussians[0][0])
    # relative to the least noise, so that no square leaves the range; rounded down: less noise than there is
    least = min(multiplier for multiplier, _ in gaussians)
    total = math.fsum(count * (least / multiplier) ** 2 for multiplier, count in gaussians)
    return Gaussian(max(5e-324, least * ((1.0 - 2.0**-50) / math.sqrt(total))))
