"""Error bounds of float64 sums.

Norms are computed in float64 from inputs of 24 bits or fewer: products are exact, and what sums of n terms
lose in any order is at most n unit roundoffs of the sum of absolute terms. Every slack below is twice that,
which covers the rounding of the bound itself.
"""

from __future__ import annotations

from torch import Tensor

UNIT = 2.0**-53


def summed_bound(norm: Tensor, terms: int, spread: Tensor) -> Tensor:
    """Upper bound of a squared norm, where `norm` is that of a sum of `terms` computed vectors.

    Args:
        norm: the computed norm of the computed sum.
        spread: the sum of the terms' norms, which no cancellation makes small.
    """
    return (norm * (1 + 1e-9) + 2 * terms * UNIT * spread).square()
