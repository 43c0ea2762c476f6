"""Labels of a data set: one charge, priced by accounting, before an answer exists; losses and counts without bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpfa_attention import randomize_labels
from dpfa_attention.randomized_labels import RandomizedLabels
from dpfa_core.errors import BudgetExhausted, LedgerError, PrivacyParameterError
from dpfa_core.events import RandomizedResponse as RandomizedResponseEvent
from dpfa_core.ledger import Ledger
from dpfa_core.spending import spending, upper_bound
from dpfa_mechanisms import randomized_response
from dpfa_mechanisms.bernoulli import bernoulli

LABELS = torch.tensor([0, 1, 1, 2, 0, 1])


def ledger(budget: float | None = 3.0, unit: Any = "sequence") -> Ledger:
    return Ledger.memory(unit=unit, relation="replace", delta=1e-5, budget=budget)


@pytest.mark.parametrize("classes", [2, 3, 50])
@pytest.mark.parametrize("epsilon", [0.01, 1.0, 2.5, 8.0, 40.0])
def test_accounting_prices_the_answers_at_what_the_mechanism_says_and_not_above_what_was_asked(
    classes: int, epsilon: float
) -> None:
    kept = ledger(None)
    made = randomize_labels(torch.zeros(5, dtype=torch.int64), num_classes=classes, epsilon=epsilon, ledger=kept)
    priced = upper_bound("rdp", tuple(kept.events()), 0.0)
    assert priced <= epsilon
    assert priced == pytest.approx(made.epsilon_spent, rel=1e-12)
    assert made.epsilon_spent == pytest.approx(min(epsilon, 53 * 0.6931471805599453), rel=0.12)


def test_one_charge_covers_a_data_set_and_is_written_before_an_answer_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, lines = ledger(), []

    def coin(*given: Any) -> bool:
        lines.append(len(list(kept.releases())))
        return bernoulli(*given)

    monkeypatch.setattr(randomized_response, "bernoulli", coin)
    made = randomize_labels(LABELS, num_classes=3, epsilon=2.0, ledger=kept)
    (line,) = kept.releases()
    assert lines == [1] * len(LABELS)
    assert (line.id, line.count, line.mechanism) == (made.event_id, 1, "randomized_response")
    assert line.event == made.response.event
    assert made.answers.shape == LABELS.shape
    assert made.answers.dtype == torch.int64


def test_features_and_labels_of_the_same_records_compose() -> None:
    kept = ledger()
    randomize_labels(LABELS, num_classes=3, epsilon=1.0, ledger=kept)
    randomize_labels(LABELS, num_classes=3, epsilon=1.0, ledger=kept)
    assert spending(kept.events(), 0.0).epsilon == pytest.approx(2.0, rel=1e-9)
    with pytest.raises(BudgetExhausted):
        randomize_labels(LABELS, num_classes=3, epsilon=1.5, ledger=kept)
    assert sum(count for _, count in kept.events()) == 2


def test_answers_are_the_labels_with_the_probability_that_is_stated() -> None:
    """From the operating system's bits: a share of 20000, six standard deviations (1e-9)."""
    made = randomize_labels(torch.ones(20000, dtype=torch.int64), num_classes=3, epsilon=1.0, ledger=ledger())
    own = made.transition[1, 1].item()
    share = (made.answers == 1).double().mean().item()
    assert share == pytest.approx(own, abs=6 * (own * (1 - own) / 20000) ** 0.5)
    assert abs(share - 1.0) > 0.1


def answered(answers: torch.Tensor, epsilon: float = 1.0) -> RandomizedLabels:
    response = randomized_response.RandomizedResponse(num_classes=3, epsilon=epsilon)
    return RandomizedLabels(answers=answers, response=response, event_id="")


def test_the_loss_is_least_at_the_law_of_the_labels_and_the_plain_one_is_not() -> None:
    made = answered(LABELS)
    labels = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    answers = labels @ made.transition
    each, logits = torch.arange(3), torch.zeros(3, dtype=torch.float64)
    for name in ("corrected", "plain"):
        logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-15)

        def closure(logits: Any = logits, optimizer: Any = optimizer, name: str = name) -> torch.Tensor:
            optimizer.zero_grad()
            rows = logits.expand(3, 3)
            loss_of = made.cross_entropy if name == "corrected" else torch.nn.functional.cross_entropy
            loss = (answers * loss_of(rows, each, reduction="none")).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found = logits.detach().softmax(0)
        target = labels if name == "corrected" else answers
        assert torch.allclose(found, target, atol=1e-5), name
    assert (answers - labels).abs().max() > 0.1


def test_the_loss_is_the_log_probability_of_an_answer_and_finite_for_any_logits() -> None:
    made = answered(LABELS)
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_hand = -(logits.softmax(1) @ made.transition).log()[torch.arange(6), LABELS]
    for reduction, value in (("none", by_hand), ("sum", by_hand.sum()), ("mean", by_hand.mean())):
        assert torch.allclose(made.cross_entropy(logits, LABELS, reduction=reduction), value)  # type: ignore[arg-type]
    far = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = made.cross_entropy(far, torch.tensor([1]))
    loss.backward()
    assert torch.isfinite(loss)
    assert far.grad is not None
    assert torch.isfinite(far.grad).all()


def test_counts_add_up_to_the_records() -> None:
    counts = answered(LABELS).class_counts()
    assert counts.sum().item() == pytest.approx(6)
    assert counts[1] > 3 > 2 > counts[2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), "labels must be integers from 0 to 2, got 3."),
        (torch.tensor([0, -1]), "labels must be integers from 0 to 2, got -1."),
        (torch.tensor([0.0]), r"labels must be a tensor [n] of integers, got 'torch.float32 [1]'."),
        (torch.tensor([True]), r"labels must be a tensor [n] of integers, got 'torch.bool [1]'."),
        (torch.zeros(2, 2, dtype=torch.int64), r"labels must be a tensor [n] of integers, got 'torch.int64 [2, 2]'."),
        (torch.zeros(0, dtype=torch.int64), "labels must hold at least one, got 'none'."),
        ([0, 1], "labels must be a tensor [n] of integers, got 'list'."),
    ],
)
def test_wrong_labels_are_refused_and_nothing_is_charged(labels: Any, message: str) -> None:
    kept = ledger()
    with pytest.raises(PrivacyParameterError) as refusal:
        randomize_labels(labels, num_classes=3, epsilon=1.0, ledger=kept)
    assert str(refusal.value) == message
    assert list(kept.events()) == []


def test_a_ledger_of_users_or_none_is_refused() -> None:
    for wrong, kept in ((ledger(unit="user"), "unit='user'"), (None, "NoneType")):
        with pytest.raises(LedgerError, match=f"one label each, got {kept}"):
            randomize_labels(LABELS, num_classes=3, epsilon=1.0, ledger=wrong)  # type: ignore[arg-type]


def test_logits_of_other_classes_are_refused() -> None:
    with pytest.raises(PrivacyParameterError, match=r"logits must be \[n, 3\] and answers \[n\]"):
        answered(LABELS).cross_entropy(torch.zeros(6, 4), LABELS)


def test_the_event_is_that_of_accounting() -> None:
    kept = ledger()
    randomize_labels(LABELS, num_classes=3, epsilon=1.0, ledger=kept)
    ((event, _),) = kept.events()
    assert isinstance(event, RandomizedResponseEvent)
