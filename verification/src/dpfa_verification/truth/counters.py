"""Counter maps: the published formulas, and the evaluation of a layout that a backend exports."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dpfa_core.contracts import CounterLayout, Term

Integers = NDArray[np.int64]
Counters = tuple[list[Integers], Integers]
"""Four counter words and the lane."""


def strides(heads: int, columns: int) -> dict[str, int]:
    """What the names in a stride stand for: H heads, D<k> groups of k columns."""
    return {"H": heads} | {f"D{k}": math.ceil(columns / k) for k in (2, 4, 8, 16, 32, 64)}


def stride(term: Term, names: Mapping[str, int]) -> int:
    """The number a stride multiplies; an unknown name raises ``KeyError``."""
    return math.prod(int(part) if re.fullmatch(r"\d+", part) else names[part] for part in term.stride.split("*"))


def evaluate(layout: CounterLayout, coordinates: Mapping[str, Integers], names: Mapping[str, int]) -> Counters:
    """The counter words and the lane of each coordinate."""

    def total(terms: tuple[Term, ...]) -> Integers:
        shape = np.broadcast_shapes(*(np.shape(values) for values in coordinates.values()))
        result = np.zeros(shape, dtype=np.int64)
        for term in terms:
            bits = (coordinates[term.field] >> term.low_bit) & ((1 << term.bits) - 1)
            result = result + bits * stride(term, names)
        return result

    return [total(terms) for terms in layout.words], total(layout.lane)


def largest_words(layout: CounterLayout, names: Mapping[str, int]) -> list[int]:
    """An upper bound of each counter word while every field stays below its bound."""
    bounds = dict(layout.fields)

    def most(term: Term) -> int:
        return min((bounds[term.field] - 1) >> term.low_bit, (1 << term.bits) - 1) * stride(term, names)

    return [sum(most(term) for term in terms) for terms in layout.words]


def release_bm32(generator: str, at: Mapping[str, Integers], heads: int, columns: int) -> Counters:
    """The published map of a bm32 release."""
    r, c, stream = at["row"], at["column"], at["batch"] * heads + at["head"]
    low, high = at["release"] & 0xFFFFFFFF, at["release"] >> 32
    octet = (r >> 4) * 8 + (r & 7)
    if generator == "philox4x32-10":
        return [c >> 1, octet, stream, low], 2 * ((r >> 3) & 1) + (c & 1)
    block = octet * 4 * math.ceil(columns / 32) + (c >> 5) * 4 + ((c >> 1) & 3)
    return [block, stream, low, high], 4 * ((c >> 3) & 3) + 2 * ((r >> 3) & 1) + (c & 1)


def training_chacha(at: Mapping[str, Integers]) -> Counters:
    """The published map of training noise under ChaCha20."""
    e, step = at["element"], at["step"]
    words = [e >> 3, at["parameter"], step & 0xFFFFFFFF, step >> 32]
    return [word + 0 * e for word in words], 4 * ((e >> 1) & 3) + (e & 1)
