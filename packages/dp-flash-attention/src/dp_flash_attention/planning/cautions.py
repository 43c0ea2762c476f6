"""What a plan should be told before it is followed: plain sentences, none of which changes a number."""

from __future__ import annotations

import math

LARGE_EPSILON = 10.0


def of_the_promise(epsilon: float, delta: float, records: int, whose: str) -> list[str]:
    """An epsilon or a delta that promises little; `whose` names the records, "training records"."""
    found = []
    if epsilon > LARGE_EPSILON:
        found.append(
            f"Epsilon is above {LARGE_EPSILON:g}: one record may make an outcome more than e^{LARGE_EPSILON:g} "
            "(22,000) times as likely, so the number alone protects hardly anybody."
        )
    if delta > 1.0 / records:
        found.append(
            f"Delta is above 1 / {records} {whose}: publishing one of them outright would keep this promise; "
            "choose a delta far below."
        )
    return found


def of_an_update(signal_to_noise: float | None, noise_multiplier: float, parameters: int | None) -> list[str]:
    """A batch whose averaged gradient drowns in its noise."""
    if signal_to_noise is None or parameters is None or signal_to_noise >= 1.0:
        return []
    batch = math.ceil(noise_multiplier * math.sqrt(parameters))
    return [
        "The batch is small for this model: the noise in an averaged gradient is longer than the clip norm, hence "
        f"than any averaged gradient; both are as long at a batch of {batch}, or with fewer trained parameters."
    ]


def of_a_release(signal_to_noise: float | None) -> list[str]:
    """An output that cannot be read in single elements."""
    if signal_to_noise is None or signal_to_noise >= 1.0:
        return []
    return [
        "The noise is louder than the signal: an element of a clipped row is smaller than the noise on it; only "
        "what averages over many elements can be read. A token unit, fewer released rows or a larger epsilon help."
    ]
