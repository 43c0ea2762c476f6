"""The counter maps, as data: which counter and lane hold the noise of which coordinate.

A layout is not a description of the code, it is the code: ``evaluate`` is the only place where
coordinates become counters. The names in strides are counts: ``H`` of query heads, ``D16`` and ``D32`` of
groups of 16 or 32 columns, rounded up.

A lane counts noise values, not words. In a bm32 layout each pair of lanes (2m, 2m + 1) is one Box-Muller
pair and takes the words 2m, 2m + 1 of its block. In a bm64 layout a pair takes four words: those that
start at the lane rounded down to a multiple of four; the lane's last bit tells cosine from sine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from dpfa_core.checks import require
from dpfa_core.contracts import CounterLayout, Term
from dpfa_kernels_torch.noise.words32 import MASK

RELEASE_FIELDS = (
    ("batch", 2**20),
    ("head", 2**12),
    ("row", 2**24),
    ("column", 2**11),
    ("release", 2**32),
)

_RELEASE_LOW = (Term("release", 0, 32, "1"),)
_RELEASE_HIGH = (Term("release", 32, 32, "1"),)
_BATCH_HEAD = (Term("batch", 0, 20, "H"), Term("head", 0, 12, "1"))
_COLUMN_PARITY = Term("column", 0, 1, "1")

# One block serves the rows {r, r + 8} and, of 32 columns, the four pairs that one thread of an MMA
# accumulator holds; one (batch, head) is one run of block numbers.
CHACHA_RELEASE_BM32 = CounterLayout(
    fields=RELEASE_FIELDS,
    words=(
        (
            Term("row", 4, 20, "32*D32"),
            Term("row", 0, 3, "4*D32"),
            Term("column", 5, 6, "4"),
            Term("column", 1, 2, "1"),
        ),
        _BATCH_HEAD,
        _RELEASE_LOW,
        _RELEASE_HIGH,
    ),
    lane=(Term("column", 3, 2, "4"), Term("row", 3, 1, "2"), _COLUMN_PARITY),
)

# Twice the words for each pair: the same rows, and of 16 columns two pairs.
CHACHA_RELEASE_BM64 = CounterLayout(
    fields=RELEASE_FIELDS,
    words=(
        (
            Term("row", 4, 20, "32*D16"),
            Term("row", 0, 3, "4*D16"),
            Term("column", 4, 7, "4"),
            Term("column", 1, 2, "1"),
        ),
        _BATCH_HEAD,
        _RELEASE_LOW,
        _RELEASE_HIGH,
    ),
    lane=(Term("column", 3, 1, "8"), Term("row", 3, 1, "4"), _COLUMN_PARITY),
)

PHILOX_RELEASE_BM32 = CounterLayout(
    fields=RELEASE_FIELDS,
    words=(
        (Term("column", 1, 10, "1"),),
        (Term("row", 4, 20, "8"), Term("row", 0, 3, "1")),
        _BATCH_HEAD,
        _RELEASE_LOW,
    ),
    lane=(Term("row", 3, 1, "2"), _COLUMN_PARITY),
)

PHILOX_RELEASE_BM64 = CounterLayout(
    fields=RELEASE_FIELDS,
    words=((Term("column", 1, 10, "1"),), (Term("row", 0, 24, "1"),), _BATCH_HEAD, _RELEASE_LOW),
    lane=(_COLUMN_PARITY,),
)

_PARAMETER_AND_STEP = (
    (Term("parameter", 0, 32, "1"),),
    (Term("step", 0, 32, "1"),),
    (Term("step", 32, 31, "1"),),
)

CHACHA_TRAINING_BM64 = CounterLayout(
    fields=(("parameter", 2**32), ("step", 2**63), ("element", 2**35)),
    words=((Term("element", 3, 32, "1"),), *_PARAMETER_AND_STEP),
    lane=(Term("element", 1, 2, "4"), Term("element", 0, 1, "1")),
)

PHILOX_TRAINING_BM64 = CounterLayout(
    fields=(("parameter", 2**32), ("step", 2**63), ("element", 2**33)),
    words=((Term("element", 1, 32, "1"),), *_PARAMETER_AND_STEP),
    lane=(Term("element", 0, 1, "1"),),
)

LAYOUTS = {
    ("release", "chacha20", "bm32"): CHACHA_RELEASE_BM32,
    ("release", "chacha20", "bm64"): CHACHA_RELEASE_BM64,
    ("release", "philox4x32-10", "bm32"): PHILOX_RELEASE_BM32,
    ("release", "philox4x32-10", "bm64"): PHILOX_RELEASE_BM64,
    ("training", "chacha20", "bm64"): CHACHA_TRAINING_BM64,
    ("training", "philox4x32-10", "bm64"): PHILOX_TRAINING_BM64,
}
"""(purpose, generator, transform) to layout."""


def release_counts(heads: int, head_dim: int) -> dict[str, int]:
    """The counts that the strides of release layouts name."""
    return {"H": heads, "D16": -(-head_dim // 16), "D32": -(-head_dim // 32)}


def evaluate(
    layout: CounterLayout, coordinates: Mapping[str, Tensor], counts: Mapping[str, int]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The counter words and the lane of each coordinate.

    Guarantee: tested (injective by enumeration at odd sizes).
    Args:
        coordinates: an int64 tensor for each field of the layout; their shapes broadcast.
        counts: the integers that strides name.
    Returns: (four int64 tensors of 32-bit words, int64 lane), each only as large as its terms need.
    Raises: PrivacyParameterError where a coordinate reaches its bound or a word would wrap.
    """
    bounds = dict(layout.fields)
    for name, bound in layout.fields:
        values = coordinates[name]
        if values.numel():
            least, most = int(values.min()), int(values.max())
            require(
                least >= 0 and most < bound,
                f"the noise counter's {name} must be in [0, {bound})",
                least if least < 0 else most,
                "Use a new key, or split the work.",
            )
    words = tuple(_sum(terms, coordinates, bounds, counts) for terms in layout.words)
    for word in words:
        if word.numel():
            most = int(word.max())
            require(most <= MASK, "a counter word must stay below 2**32", most, "Split the work over calls.")
    return words, _sum(layout.lane, coordinates, bounds, counts)


def _sum(
    terms: tuple[Term, ...],
    coordinates: Mapping[str, Tensor],
    bounds: Mapping[str, int],
    counts: Mapping[str, int],
) -> Tensor:
    total = 0
    for term in terms:
        stride = math.prod(int(part) if part.isdigit() else counts[part] for part in term.stride.split("*"))
        bits = coordinates[term.field] >> term.low_bit
        if bounds[term.field] > 1 << (term.low_bit + term.bits):
            bits = bits & ((1 << term.bits) - 1)
        total = total + (bits if stride == 1 else bits * stride)
    return total
