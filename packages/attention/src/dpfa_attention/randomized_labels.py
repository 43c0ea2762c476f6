"""Labels that may leave: randomised response, charged before an answer exists."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dpfa_core.checks import one_of, require
from dpfa_core.errors import LedgerError
from dpfa_core.events import Event
from dpfa_core.ledger import Ledger
from dpfa_mechanisms.randomized_response import RandomizedResponse


@dataclass(frozen=True, eq=False, kw_only=True)
class RandomizedLabels:
    """The answers of ``randomize_labels`` and what undoes their bias; all of it may leave, and using it costs nothing.

    Guarantee: tested (post-processing of the answers).
    """

    answers: Tensor
    """int64, one for each label, in their order."""
    response: RandomizedResponse
    """The mechanism: `num_classes`, the exact probability of a uniform answer."""
    event_id: str
    """The line of the ledger that the answers were charged to."""

    @property
    def epsilon_spent(self) -> float:
        """Of all answers together, for one record; at most the epsilon asked for. Delta is 0."""
        return self.response.epsilon_spent

    @property
    def transition(self) -> Tensor:
        """[classes, classes], float64; row y, column z: the probability of the answer z of the label y."""
        return torch.tensor(self.response.transition(), dtype=torch.float64)

    def class_counts(self) -> Tensor:
        """[classes], float64: how many labels each class had, unbiased, perhaps negative."""
        return torch.tensor(self.response.class_counts(self.answers.tolist()), dtype=torch.float64)

    def cross_entropy(
        self, logits: Tensor, answers: Tensor, *, reduction: Literal["mean", "sum", "none"] = "mean"
    ) -> Tensor:
        """The loss to train on answers in the place of labels: its least value is at the law of the labels.

        Minus the logarithm of the probability of the answer: softmax(logits) times `transition`. On answers, the
        plain cross-entropy would have its least value at the law of the answers.

        Args: logits [n, classes], of labels; answers [n], rows of `answers`.
        Raises: PrivacyParameterError for other shapes.
        Source: Patrini et al. 2017, Theorem 2 (forward correction).
        """
        one_of("reduction", reduction, ("mean", "sum", "none"))
        good = logits.dim() == 2 and logits.shape[1] == self.response.num_classes and answers.shape == logits.shape[:1]
        wanted = f"logits must be [n, {self.response.num_classes}] and answers [n]"
        require(good, wanted, (list(logits.shape), list(answers.shape)))
        p = self.response.uniform_probability
        own = logits.log_softmax(-1).gather(1, answers[:, None])[:, 0] + math.log(1 - p)
        uniform = own.new_full((), math.log(p / self.response.num_classes))
        losses = -torch.logaddexp(own, uniform)
        return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def randomize_labels(labels: Tensor, *, num_classes: int, epsilon: float, ledger: Ledger) -> RandomizedLabels:
    """One answer for each label by randomised response, with bits from the operating system.

    The record is whoever has one label, of whatever unit the ledger is kept for: one charge covers all labels,
    however many there are. Their number and the classes are public. Where features of the same records are
    released, too, charge both to one ledger: they compose.

    Guarantee: tested (the law, the price by a package that did not choose it, the order of charge and draw).
    Args: labels [n], any integer dtype, from 0 to num_classes - 1, one for each record; epsilon > 0 and finite;
        `ledger` of these records. With relation "add_or_remove" an absent record's answer is uniform, in its place.
    Raises: PrivacyParameterError for a wrong label (the text is for their owner) or epsilon, before anything is
        charged; LedgerError for unit="user", whose records may have several labels; BudgetExhausted.
    Source: see ``dpfa_mechanisms.randomized_response``.
    """
    response = RandomizedResponse(num_classes=num_classes, epsilon=epsilon)
    good = isinstance(labels, Tensor) and labels.dim() == 1 and labels.dtype in _INTEGERS
    found = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    require(good, "labels must be a tensor [n] of integers", found)
    if not isinstance(ledger, Ledger) or ledger.unit == "user":
        kept = f"unit={ledger.unit!r}" if isinstance(ledger, Ledger) else type(ledger).__name__
        raise LedgerError(
            f"labels need a ledger whose records have one label each, got {kept}; open one for another unit, or charge "
            "a user's labels one data set at a time."
        )
    ids: list[str] = []

    def record(event: Event) -> None:
        purpose = f"labels of {num_classes} classes"
        ids.append(ledger.record(event, purpose=purpose, mechanism="randomized_response", backend="none"))

    answers = response.respond(labels.tolist(), record=record)
    made = torch.tensor(answers, dtype=torch.int64, device=labels.device)
    return RandomizedLabels(answers=made, response=response, event_id=ids[0])


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
