"""Discrete Gaussian noise of one release: integers, by rejection, from bits that belong to one number alone.

How many bits a number takes depends on its value, and so does the time. Whoever can measure how long a call takes
learns the sum of the attempts, which is a function of the noise and of no record.
"""

from __future__ import annotations

import decimal
import math
from fractions import Fraction

import torch
from torch import Tensor

from dpfa_core.contracts import CounterLayout, NoiseKey, Term
from dpfa_core.spec import AttentionProblem, NoisePlan
from dpfa_kernels_torch.noise.chacha import chacha20
from dpfa_kernels_torch.noise.keystream import keystream
from dpfa_kernels_torch.noise.layout import RELEASE_FIELDS, evaluate
from dpfa_kernels_torch.noise.normal import top53
from dpfa_kernels_torch.noise.philox import philox4x32
from dpfa_kernels_torch.noise.release_noise import noise_scale
from dpfa_kernels_torch.noise.words32 import from_uint32

CHUNK = 1 << 15
"""Numbers drawn at a time."""

LARGEST = 2.0**46
"""Scales in units of the grid stay below this, so that every integer here is exact in float64."""

DOUBT = 2.0**-48
"""Relative error of a computed probability for each unit of its exponent; ten times what float64 rounds."""

_BATCH_HEAD = (Term("batch", 0, 20, "H"), Term("head", 0, 12, "1"))
_RELEASE = (Term("release", 0, 32, "1"),)

# A block of sixteen words is one attempt of one number: two trials of eight words.
CHACHA_DISCRETE = CounterLayout(
    fields=(*RELEASE_FIELDS, ("attempt", 2**32)),
    words=(
        (Term("row", 0, 24, "D"), Term("column", 0, 11, "1")),
        _BATCH_HEAD,
        _RELEASE,
        (Term("attempt", 0, 32, "1"),),
    ),
    lane=(),
)

# Four calls make an attempt: `attempt` counts quarters.
PHILOX_DISCRETE = CounterLayout(
    fields=(*RELEASE_FIELDS, ("attempt", 2**21)),
    words=(
        (Term("column", 0, 11, "1"), Term("attempt", 0, 21, "2048")),
        (Term("row", 0, 24, "1"),),
        _BATCH_HEAD,
        _RELEASE,
    ),
    lane=(),
)


DISCRETE_LAYOUTS = {"chacha20": CHACHA_DISCRETE, "philox4x32-10": PHILOX_DISCRETE}
"""Generator to layout. The count that strides name beside ``H`` is ``D``, of columns."""


def discrete_noise(problem: AttentionProblem, plan: NoisePlan, key: NoiseKey) -> Tensor:
    """Independent integers k with probability proportional to exp(-k**2 / (2 s**2)), s = scale / grid.

    The law is exact within 32 s and but for 2**-127: accepting is decided by 53 bits where these decide, and
    by 128 bits and decimal arithmetic where they do not.

    Guarantee: tested (chi-square, exact decisions, one number's bits are not another's).
    Args: key: of purpose "release"; the noise lies on its device.
    Returns: float64 [B, S, H, D], to be multiplied by the grid.
    Source: PRIVACY P4, P10.
    """
    device = key.words.device
    B, S, H, D = problem.batch, problem.q_len, problem.q_heads, problem.head_dim
    scale = noise_scale(problem, plan).to(device).expand(B, S, H).transpose(1, 2).reshape(-1) / plan.grid
    noise = torch.zeros(B * H * S * D, dtype=torch.float64, device=device)
    for first in range(0, len(noise), CHUNK):
        number = torch.arange(first, min(first + CHUNK, len(noise)), device=device)
        row = number // D
        stream = row // S
        left = {"batch": stream // H, "head": stream % H, "row": row % S, "column": number % D}
        widths = scale[row]
        attempt = 0
        while len(number):
            words = attempt_words(key, left, attempt, {"H": H, "D": D})
            values, taken = torch.zeros_like(widths), widths == 0
            for half in (words[:, :8], words[:, 8:]):
                found, good = trial(half, widths)
                values = torch.where(good & ~taken, found, values)
                taken = taken | good
            noise[number[taken]] = values[taken]
            number, widths = number[~taken], widths[~taken]
            left = {name: values[~taken] for name, values in left.items()}
            attempt += 1
    return noise.reshape(B, H, S, D).transpose(1, 2)


def attempt_words(key: NoiseKey, left: dict[str, Tensor], attempt: int, counts: dict[str, int]) -> Tensor:
    """Sixteen words for each number: int64 [n, 16]."""
    release = key.release.view(torch.int64)

    def counter(layout: CounterLayout, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        fields = {**left, "release": release, "attempt": torch.tensor([number], device=release.device)}
        first, second, third, fourth = evaluate(layout, fields, counts)[0]
        return first, second, third, fourth

    layout = DISCRETE_LAYOUTS[key.generator]
    if key.generator == "philox4x32-10":
        words = from_uint32(key.words)
        return torch.cat([philox4x32(counter(layout, 4 * attempt + i), words) for i in range(4)], dim=-1)
    place = counter(layout, attempt)
    if attempt == 0 and release.device.type == "cpu":
        return _consecutive(key, *place)
    return chacha20(from_uint32(key.words), place)


def _consecutive(key: NoiseKey, block: Tensor, stream: Tensor, release: Tensor, attempt: Tensor) -> Tensor:
    """What ``chacha20`` gives where the numbers of a stream have consecutive blocks, faster."""
    secret = key.words.numpy().astype("<u4").tobytes()
    names, sizes = torch.unique_consecutive(stream, return_counts=True)
    runs, start = [], 0
    for name, size in zip(names.tolist(), sizes.tolist(), strict=True):
        runs.append(keystream(secret, int(block[start]), size, (name, int(release), int(attempt))))
        start += size
    return from_uint32(torch.cat(runs)).reshape(-1, 16)


def trial(words: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A proposal for each number, and whether it is taken.

    With t = floor(s) + 1 the proposal is u + t v with a random sign, u uniform below t and v geometric with ratio
    1/2. It is taken with probability ``exp(1/2 - log 2) 2**v exp(-k**2 / (2 s**2))``, which is at most 1 because
    t v > s v, and leaves the ratios that the law asks for. Zero with a minus sign is not taken.

    Args: words: int64 [n, 8], 32-bit words; scale: float64 [n], s.
    Returns: (float64 [n], bool [n]).
    """
    below = torch.floor(scale)  # t - 1
    width = torch.frexp(below).exponent.to(torch.int64)
    uniform = ((words[:, 1] << 20) | (words[:, 0] >> 12)) >> (52 - width)
    low_bit = words[:, 2] & -words[:, 2]
    geometric = (torch.frexp(low_bit.double()).exponent - 1).clamp(min=0).double()
    size = uniform + (below + 1.0) * geometric
    negative = (words[:, 5] & 1) == 1
    offered = (uniform <= below) & (low_bit != 0) & ~(negative & (size == 0))

    squared = torch.where(scale > 0, size / scale, 0.0).square() / 2.0
    probability = torch.exp(0.5 + (geometric - 1.0) * math.log(2.0) - squared)
    coin = top53(words[:, 3], words[:, 4]).double() * 2.0**-53
    doubt = DOUBT * probability * (squared + 32.0) + 2.0**-52
    taken = offered & (coin < probability)
    for place in torch.nonzero(offered & ((coin - probability).abs() <= doubt)).flatten().tolist():
        taken[place] = _exactly_taken(
            words[place].tolist(), int(size[place]), int(geometric[place]), float(scale[place])
        )
    return torch.where(negative, -size, size), taken


def _exactly_taken(words: list[int], size: int, geometric: int, scale: float) -> bool:
    coin = (words[4] << 96) | (words[3] << 64) | (words[6] << 32) | words[7]
    ratio = Fraction(size) ** 2 / (2 * Fraction(scale) ** 2)
    with decimal.localcontext(decimal.Context(prec=120)):
        exponent = decimal.Decimal("0.5") + (geometric - 1) * decimal.Decimal(2).ln()
        exponent -= decimal.Decimal(ratio.numerator) / decimal.Decimal(ratio.denominator)
        return decimal.Decimal(coin) < exponent.exp() * 2**128
