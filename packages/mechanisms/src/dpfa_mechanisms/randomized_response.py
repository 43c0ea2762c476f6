"""Randomised response: the own label, or with a stated probability one drawn uniformly from all classes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cached_property

from dpfa_core.checks import integer, positive, require
from dpfa_core.events import Event
from dpfa_core.events import RandomizedResponse as RandomizedResponseEvent
from dpfa_mechanisms.bernoulli import RandomBits, bernoulli, uniform_below

BITS = 53
"""The probability of a uniform answer is a multiple of 2**-BITS: a coin of so many fair bits has exactly that
probability, and the float in the event is that number and no neighbour of it."""

SLACK = 2.0**-40
"""Share of epsilon that is left to the rounding up of whoever prices the event."""

LARGEST_EPSILON = 100.0
"""Beyond it the probability is the smallest multiple anyway."""


@dataclass(frozen=True, kw_only=True)
class RandomizedResponse:
    """One answer for each label: uniform over the classes with probability p, else the label itself.

    | quantity | is |
    |---|---|
    | p | num_classes / (e**epsilon + num_classes - 1), rounded up to a multiple of 2**-53 |
    | worst ratio of two labels' probabilities of an answer | 1 + num_classes (1 - p) / p, at most e**epsilon |

    The record is whoever has one label. All labels of a data set are answered under one charge, because a record
    moves its own answer only; a record with several labels needs as many charges.

    Guarantee: tested (the law by enumeration, the ratio by 60-digit arithmetic). Pure epsilon.
    Args: num_classes >= 2, public; epsilon > 0 and finite.
    Raises: PrivacyParameterError, also for an epsilon so small that every answer would be uniform.
    Source: Warner 1965; Kairouz, Oh & Viswanath 2016 (the best of all mechanisms for large epsilon).
    """

    num_classes: int
    epsilon: float

    def __post_init__(self) -> None:
        integer("num_classes", self.num_classes, least=2)
        positive("epsilon", self.epsilon, remedy="Without privacy, hand out the labels themselves.")
        require(
            self.uniform_probability < 1,
            f"epsilon must be large enough for an answer to depend on its label, about {2.0 ** (1 - BITS):.0e}",
            self.epsilon,
        )

    @cached_property
    def uniform_probability(self) -> Fraction:
        """p, exactly; the coin has this probability and no other."""
        with localcontext() as context:
            context.prec = 60  # errors of 1e-59, far below SLACK
            asked = Decimal(min(self.epsilon, LARGEST_EPSILON)) * (1 - Decimal(SLACK))
            needed = self.num_classes / (Fraction(asked.exp()) + self.num_classes - 1)
        return Fraction(math.ceil(needed * 2**BITS), 2**BITS)

    @property
    def epsilon_spent(self) -> float:
        """Of the rounded p: the logarithm of the worst ratio, rounded up; at most the epsilon asked for."""
        p = self.uniform_probability
        with localcontext() as context:
            context.prec = 60
            ratio = 1 + self.num_classes * (1 - p) / p
            return math.nextafter(float((Decimal(ratio.numerator) / Decimal(ratio.denominator)).ln()), math.inf)

    @property
    def event(self) -> RandomizedResponseEvent:
        """The price of one answer for each record."""
        return RandomizedResponseEvent(float(self.uniform_probability), self.num_classes)

    def respond(
        self,
        labels: Sequence[int],
        *,
        record: Callable[[Event], object],
        random_bits: RandomBits = os.urandom,
    ) -> list[int]:
        """An answer for each label, charged once before the first coin is thrown.

        Coin and uniform answer are drawn for every label, whichever of them is used, so that how many bytes were
        drawn tells nothing about it.

        Args: `labels`, integers in [0, num_classes), one for each record; `record` charges the event durably, or
        raises; `random_bits(n)` returns n secret uniform bytes.
        Raises: PrivacyParameterError for a wrong label, before anything is charged or drawn (the text is for the
        labels' owner); whatever `record` raises.
        """
        self._check("labels", labels)
        record(self.event)
        p, answers = self.uniform_probability, []
        for label in labels:
            uniform = bernoulli(p, random_bits)
            other = uniform_below(self.num_classes, random_bits)
            answers.append(other if uniform else label)
        return answers

    def transition(self) -> list[list[float]]:
        """Row y, column z: the probability of the answer z of the label y."""
        other = float(self.uniform_probability / self.num_classes)
        own = float(1 - self.uniform_probability + self.uniform_probability / self.num_classes)
        classes = range(self.num_classes)
        return [[own if y == z else other for z in classes] for y in classes]

    def class_counts(self, answers: Sequence[int]) -> list[float]:
        """How many labels each class had, from the answers: unbiased, so that it may be negative; adds up to their
        number. Post-processing: it costs nothing.
        """
        self._check("answers", answers)
        p = self.uniform_probability
        seen = [0] * self.num_classes
        for answer in answers:
            seen[answer] += 1
        return [float((count - len(answers) * p / self.num_classes) / (1 - p)) for count in seen]

    def _check(self, name: str, labels: Sequence[int]) -> None:
        require(len(labels) > 0, f"{name} must hold at least one", "none")
        for label in labels:
            good = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < self.num_classes
            require(good, f"{name} must be integers from 0 to {self.num_classes - 1}", label)
