"""What a convolution by FFT may lose, and the deltas it must not be asked for (PRIVACY P8)."""

from __future__ import annotations

from dpfa_accounting.reduction import Releases
from dpfa_core.errors import UnsupportedEvent

ROUND_OFF = 2.0**-50
"""Mass that may be lost for each release that is convolved."""

LEAST_DELTA = 1e-9


def lost_mass(releases: Releases) -> float:
    """Upper bound of the mass that the convolution of `releases` misplaces."""
    return ROUND_OFF * sum(count for _, count in releases)


def delta_left(delta: float, releases: Releases, method: str) -> float:
    """The delta to ask an FFT for, so that what it lost cannot make epsilon too small.

    Raises: UnsupportedEvent where the loss would be more than a quarter of `delta`.
    """
    lost = lost_mass(releases)
    least = max(LEAST_DELTA, 4.0 * lost)
    if delta < least:
        count = sum(count for _, count in releases)
        raise UnsupportedEvent(
            f"{method} by FFT needs delta >= {least:.3g} for {count} releases, got {delta:.3g}; "
            "use gdp or rdp, or raise delta."
        )
    return delta - lost
