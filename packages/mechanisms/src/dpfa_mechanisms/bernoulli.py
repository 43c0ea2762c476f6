"""Coins and dice whose probabilities are exact rational numbers, from uniform random bytes.

No floating point takes part, so a law that is proved on paper is the law of the program. How many bytes are
drawn depends on the outcome: whoever can time a draw, or count its bytes, learns more than the outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from dpfa_core.checks import integer, require

RandomBits = Callable[[int], bytes]
"""As many independent uniform bytes as asked for, such as ``os.urandom``."""


def uniform_below(bound: int, random_bits: RandomBits) -> int:
    """A uniform integer in [0, bound).

    Guarantee: tested (chi-square).
    Raises: PrivacyParameterError for a bound below 1, or for a source that does not return the bytes asked for.
    """
    integer("bound", bound, least=1)
    bits = (bound - 1).bit_length()
    if bits == 0:
        return 0
    count = (bits + 7) // 8
    while True:
        drawn = random_bits(count)
        good = isinstance(drawn, bytes | bytearray) and len(drawn) == count
        require(good, f"random_bits({count}) must return {count} bytes", type(drawn).__name__)
        value = int.from_bytes(drawn, "little") >> (8 * count - bits)
        if value < bound:
            return value


def bernoulli(probability: Fraction, random_bits: RandomBits) -> bool:
    """True with `probability`, a number in [0, 1]."""
    require(0 <= probability <= 1, "probability must be in [0, 1]", probability)
    return uniform_below(probability.denominator, random_bits) < probability.numerator


def bernoulli_exp(exponent: Fraction, random_bits: RandomBits) -> bool:
    """True with probability exp(-exponent), for a rational exponent >= 0.

    Up to 1, coins of probability exponent / 1, exponent / 2, ... are thrown until one says no: with probability
    exp(-exponent) their number is odd. Beyond, exp(-exponent) is a product.

    Guarantee: tested (chi-square).
    Source: Canonne, Kamath & Steinke 2020, Algorithm 1.
    """
    require(exponent >= 0, "exponent must be >= 0", exponent)
    whole = exponent.numerator // exponent.denominator
    for _ in range(whole):
        if not _bernoulli_exp_below_one(Fraction(1), random_bits):
            return False
    return _bernoulli_exp_below_one(exponent - whole, random_bits)


def _bernoulli_exp_below_one(exponent: Fraction, random_bits: RandomBits) -> bool:
    throws = 1
    while bernoulli(exponent / throws, random_bits):
        throws += 1
    return throws % 2 == 1
