"""Handwriting models of the ten digits: pen strokes as control points, written down by hand, fitted to no data.

A point is "x,y" in percent of the paper, y pointing down. A stroke is a smooth (Catmull-Rom) curve through its points;
"/" lifts the pen. A corner is made by lifting the pen and going on at the same point.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Stroke = tuple[tuple[float, float], ...]

_STYLES: dict[int, tuple[str, ...]] = {
    0: (
        "50,0 27,15 17,50 27,85 50,100 73,85 83,50 73,15 50,0",
        "58,3 40,6 29,37 31,77 46,99 63,90 72,54 66,16 50,0",
        "36,5 66,6 88,30 90,64 71,92 41,97 16,78 8,44 23,13",
        "62,5 30,12 12,50 25,90 55,98 85,75 85,30 60,2",
    ),
    1: (
        "50,0 50,33 50,66 50,100",
        "30,22 42,14 52,0 / 52,0 52,33 52,66 52,100",
        "28,25 42,14 52,0 / 52,0 52,50 52,100 / 25,100 50,100 78,100",
        "15,38 38,20 60,0 / 60,0 58,50 56,100",
        "62,0 55,33 46,66 38,100",
    ),
    2: (
        "15,25 25,6 50,0 78,10 80,35 60,60 35,80 12,100 / 12,100 50,98 90,100",
        "15,15 40,0 75,8 78,35 55,65 25,92 / 25,92 10,90 12,76 30,78 55,95 90,95",
        "10,8 45,2 82,6 / 82,6 55,45 12,96 / 12,96 50,98 92,96",
        "20,30 20,8 50,0 72,14 68,40 50,68 20,97 / 20,97 45,90 65,100 95,88",
    ),
    3: (
        "15,14 45,0 78,12 72,36 40,47 / 40,47 75,54 85,76 60,97 30,98 10,86",
        "12,4 45,3 82,4 / 82,4 62,25 45,42 / 45,42 75,50 84,74 60,97 28,98 10,88",
        "20,8 50,0 75,10 72,30 50,42 44,46 50,50 75,60 82,80 62,97 35,100 15,90",
    ),
    4: (
        "35,0 22,30 12,60 / 12,60 50,60 92,58 / 70,25 68,60 66,100",
        "70,0 40,32 10,66 / 10,66 50,66 95,66 / 70,0 70,50 70,100",
        "18,2 15,28 20,48 45,52 78,46 / 80,0 78,33 76,66 74,100",
        "50,0 30,35 8,72 / 8,72 45,70 92,68 / 58,42 56,70 54,100",
    ),
    5: (
        "85,2 55,2 25,3 / 25,3 22,22 20,43 / 20,43 50,36 80,48 84,76 60,97 32,98 12,88",
        "80,4 45,3 25,18 32,40 62,54 80,74 62,96 35,100 12,90",
        "30,5 27,25 25,46 / 25,46 55,40 78,55 76,82 50,99 18,94 / 30,5 60,6 95,0",
    ),
    6: (
        "70,0 42,18 22,48 20,78 42,99 70,93 80,72 62,54 38,58 22,74",
        "35,0 22,30 18,62 25,92 52,100 80,86 76,62 50,54 22,66",
        "62,0 45,30 32,60 34,88 52,100 70,88 68,68 50,62 35,72",
        "82,10 55,0 28,20 17,55 25,88 52,100 78,86 74,60 48,50 22,64",
    ),
    7: (
        "12,4 50,3 85,4 / 85,4 62,48 42,100",
        "12,6 50,3 85,4 / 85,4 65,45 45,100 / 35,50 60,48 88,46",
        "12,22 14,12 15,3 / 15,3 50,6 85,3 / 85,3 66,35 55,68 50,100",
        "10,16 35,3 62,10 88,2 / 88,2 68,35 50,65 40,100",
        "10,10 40,4 80,5 / 80,5 66,40 56,70 50,100 / 32,56 58,54 86,54",
    ),
    8: (
        "75,10 50,0 25,14 30,34 52,48 78,66 76,90 50,100 24,90 22,68 50,48 72,32 74,10",
        "50,48 31,41 23,24 31,7 50,0 69,7 77,24 69,41 50,48 / 50,48 73,56 83,74 73,92 50,100 27,92 17,74 27,56 50,48",
        "52,44 38,38 32,22 38,6 52,0 66,6 72,22 66,38 52,44 / 48,44 65,52 72,72 65,92 48,100 31,92 24,72 31,52 48,44",
        "70,5 40,2 28,18 45,42 62,66 62,92 42,100 30,85 40,62 60,40 76,18 70,5",
    ),
    9: (
        "74,18 60,3 40,1 22,11 16,30 25,48 45,56 65,50 76,33 / 76,12 76,40 72,70 66,100",
        "78,26 69,8 48,0 27,8 18,26 27,44 48,52 69,44 78,26 / 78,20 80,50 72,84 48,99 20,92",
        "78,12 50,0 22,16 25,42 52,50 76,34 80,10 / 80,10 68,50 52,100",
        "72,8 42,2 22,24 36,46 62,40 75,14 / 75,14 74,55 62,88 40,100 24,90",
    ),
}


def _strokes(style: str) -> tuple[Stroke, ...]:
    points = ([point.split(",") for point in stroke.split()] for stroke in style.split("/"))
    return tuple(tuple((int(x) / 100, int(y) / 100) for x, y in stroke) for stroke in points)


STROKES: dict[int, tuple[tuple[Stroke, ...], ...]] = {
    digit: tuple(map(_strokes, styles)) for digit, styles in _STYLES.items()
}
"""The strokes of each writing style of each digit."""


def curve_matrix(strokes: tuple[Stroke, ...], samples: int) -> npt.NDArray[np.float64]:
    """The matrix that maps the strokes' control points to `samples` points along the curves.

    Guarantee: tested. Every row sums to 1, so the drawing moves, turns and scales with its control points.

    Args:
        strokes: strokes of at least two points each.
        samples: points to place along all strokes together, in proportion to their lengths.

    Returns:
        Array (samples, control points of all strokes).
    """
    lengths = [sum(math.dist(a, b) for a, b in pairwise(stroke)) for stroke in strokes]
    ends = np.round(np.cumsum([0.0, *lengths]) / sum(lengths) * samples).astype(int)
    matrix = np.zeros((samples, sum(map(len, strokes))))
    first = 0
    for stroke, start, stop in zip(strokes, ends[:-1], ends[1:], strict=True):
        last = len(stroke) - 1
        for row, t in zip(range(start, stop), np.linspace(0.0, last, stop - start), strict=True):
            i = min(int(t), last - 1)
            u = t - i
            weights = (
                0.5 * (-u + 2 * u**2 - u**3),
                0.5 * (2 - 5 * u**2 + 3 * u**3),
                0.5 * (u + 4 * u**2 - 3 * u**3),
                0.5 * (-(u**2) + u**3),
            )
            for offset, weight in zip((-1, 0, 1, 2), weights, strict=True):
                matrix[row, first + min(max(i + offset, 0), last)] += weight
        first += len(stroke)
    return matrix
