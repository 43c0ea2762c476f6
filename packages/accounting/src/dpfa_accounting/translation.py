"""Our events as those of dp-accounting.

Its accountants hold one neighbouring relation each. A Gaussian on the whole data fits both, because our
noise multiplier is relative to the sensitivity of the relation in force; it is always passed as
add-or-remove, whose algebra does not double anything again.
"""

from __future__ import annotations

import dp_accounting

from dpfa_core.errors import UnsupportedEvent
from dpfa_core.events import Event, FixedSizeSampled, Gaussian, Laplace, PoissonSampled

ADD_OR_REMOVE = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
REPLACE = dp_accounting.NeighboringRelation.REPLACE_ONE


def dp_event(event: Event) -> tuple[dp_accounting.DpEvent, dp_accounting.NeighboringRelation]:
    """The same release in the words of dp-accounting, and the relation under which to price it.

    Raises: UnsupportedEvent for a release that dp-accounting does not know in our sense.
    """
    match event:
        case Gaussian(noise_multiplier):
            return dp_accounting.GaussianDpEvent(noise_multiplier), ADD_OR_REMOVE
        case Laplace(noise_multiplier):
            return dp_accounting.LaplaceDpEvent(noise_multiplier), ADD_OR_REMOVE
        case PoissonSampled(probability, inner, "add_or_remove"):
            return dp_accounting.PoissonSampledDpEvent(probability, dp_event(inner)[0]), ADD_OR_REMOVE
        case FixedSizeSampled(size, population, inner, "replace"):
            sampled = dp_accounting.SampledWithoutReplacementDpEvent(population, size, dp_event(inner)[0])
            return sampled, REPLACE
    raise UnsupportedEvent(f"dp-accounting has no event for {event!r}; compose events that it knows.")
