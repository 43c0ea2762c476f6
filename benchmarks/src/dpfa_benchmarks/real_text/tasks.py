"""The two tasks: a private memory that is asked, and a head that is trained on released features."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_attention import Ledger, PrivateMemory, dp_flash_attn_func, randomize_labels, release_features
from dpfa_benchmarks.real_text.public_encoder import PublicEncoder
from dpfa_core.spending import upper_bound

EPSILONS = (1.0, 2.0, 4.0, 8.0, math.inf)
DELTA = 1e-6

QUERIES = 100
"""Of one call to the memory: together they cost epsilon."""

LOGIT_BOUND, SHARPNESS = 1.0, 8.0
"""Of the memory. Chosen on public texts: bounds from 1 to 6 and sharpness from 4 to 32 were tried."""


@dataclass(frozen=True)
class Split:
    """Word numbers and classes of one split; the test texts belong to whoever asks or uses the head."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int


def accuracies(encoder: PublicEncoder, split: Split, epsilon: float) -> Iterator[dict[str, Any]]:
    """One line for each task at this epsilon: its name, the share of right answers, the noise and what was charged."""
    yield {"task": "memory"} | ask_memory(encoder, split, epsilon)
    yield from train_heads(encoder, split, epsilon)


def ask_memory(encoder: PublicEncoder, split: Split, epsilon: float) -> dict[str, Any]:
    """Texts ask a memory of texts which class they are: the values are centred one-hot labels, the answer is a vote.

    Each call of QUERIES queries meets a memory of its own ledger, whose budget it spends: calls are repeated to see
    the accuracy more exactly, and would compose if one memory answered them.
    """
    unit = nn.functional.normalize
    keys, queries = unit(encoder.pool(split.train)), unit(encoder.pool(split.test))
    values = nn.functional.one_hot(split.train_labels, split.classes).float() - 1.0 / split.classes
    norm = math.sqrt(1.0 - 1.0 / split.classes)
    calls, right, found = len(queries) // QUERIES, 0, {}
    for asked, truth in zip(queries.split(QUERIES)[:calls], split.test_labels.split(QUERIES), strict=False):
        if math.isinf(epsilon):
            votes = _without_noise(asked, keys, values, norm)
            found = {"noise_std": 0.0, "epsilon_spent": math.inf, "epsilon_of_ten_calls": math.inf}
        else:
            ledger = Ledger.memory(unit="token", relation="replace", delta=DELTA, budget=epsilon)
            memory = PrivateMemory(
                key_dim=keys.shape[1],
                value_dim=split.classes,
                epsilon=epsilon,
                delta=DELTA,
                logit_bound=LOGIT_BOUND,
                clip_norm=norm,
                softmax_scale=SHARPNESS,
                ledger=ledger,
            )
            memory.append(keys, values)
            votes, stats = memory.answer(asked, return_privacy_stats=True)
            # every call costs the same, and pricing is slow
            found = found or {
                "noise_std": stats.noise_std,
                "epsilon_spent": ledger.spent(accountant="gdp"),
                "epsilon_of_ten_calls": upper_bound("gdp", tuple((e, 10) for e, _ in ledger.events()), 10 * DELTA),
            }
        right += int((votes.argmax(1) == truth).sum())
    return {"accuracy": right / (calls * QUERIES)} | found


def train_heads(encoder: PublicEncoder, split: Split, epsilon: float) -> Iterator[dict[str, Any]]:
    """Heads on released features: with labels as they are, and with half of epsilon for each of both.

    "features" tests the head on texts that stay with their owner; "features, sent" on test texts that are released at
    the same epsilon, each once.
    """
    test = clipped(encoder.pool(split.test))
    released = _released(encoder, split.train, epsilon, split.train_labels)
    means = _sums(released.features, split.train_labels, split.classes) / len(split.train)
    head = discriminant(means * split.classes, encoder.covariance)
    sent = _released(encoder, split.test, epsilon, None).features[:, 0]
    found = {"noise_std": released.stats.noise_std, "epsilon_spent": released.epsilon, "covers": released.covers}
    yield {"task": "features", "accuracy": _accuracy(head, test, split.test_labels)} | found
    yield {"task": "features, sent", "accuracy": _accuracy(head, sent, split.test_labels)} | found
    if math.isinf(epsilon):
        return
    half = math.nextafter(epsilon / 2.0, 0.0)
    ledger = _ledger()
    labels = randomize_labels(split.train_labels, num_classes=split.classes, epsilon=half, ledger=ledger)
    released = _released(encoder, split.train, half, labels, ledger)
    # sums over the answers are mixtures of the sums over the labels
    mixed = _sums(released.features, labels.answers, split.classes)
    sums = torch.linalg.solve(labels.transition.T, mixed)
    head = discriminant(sums / len(split.train) * split.classes, encoder.covariance)
    found = {"noise_std": released.stats.noise_std, "epsilon_spent": released.epsilon, "covers": released.covers}
    yield {"task": "features and labels", "accuracy": _accuracy(head, test, split.test_labels)} | found


def discriminant(means: Tensor, covariance: Tensor) -> nn.Linear:
    """Linear discriminant analysis: a head from the means of equally large classes [classes, columns].

    Noise averages out in a mean, and a covariance of public texts has none. A head trained by gradient descent on noisy
    features fits the noise's covariance instead and shrinks.
    """
    head = nn.Linear(means.shape[1], len(means), dtype=torch.float64)
    weight = torch.linalg.solve(covariance, means.T).T
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(-(weight * means).sum(1) / 2.0)
    return head


def clipped(features: Tensor) -> Tensor:
    """As the release clips them."""
    return features / features.norm(dim=1, keepdim=True).clamp_min(1.0)


def _sums(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """[classes, columns], float64."""
    return nn.functional.one_hot(labels, classes).double().T @ features[:, 0].double()


def _released(encoder: PublicEncoder, texts: Tensor, epsilon: float, labels: Any, ledger: Ledger | None = None) -> Any:
    attention = encoder.attention(epsilon, delta=DELTA, ledger=ledger or _ledger())
    return release_features(encoder, attention, texts, labels=labels, query=encoder.query, batch_size=1024)


def _ledger() -> Ledger:
    return Ledger.memory(unit="sequence", relation="replace", delta=DELTA)


def _without_noise(asked: Tensor, keys: Tensor, values: Tensor, norm: float) -> Tensor:
    wide = nn.functional.pad(values, (0, keys.shape[1] - values.shape[1]))
    rows = [x[None, :, None] for x in (asked, keys, wide)]
    terms: dict[str, Any] = {"clip_norm": norm, "logit_bound": LOGIT_BOUND, "softmax_scale": SHARPNESS}
    out = dp_flash_attn_func(*rows, epsilon=math.inf, delta=DELTA, ledger=_ledger(), **terms)
    assert isinstance(out, Tensor)  # noqa: S101  (no stats were asked for)
    return out[0, :, 0, : values.shape[1]]


@torch.no_grad()
def _accuracy(head: nn.Linear, features: Tensor, labels: Tensor) -> float:
    return float((head(features.double()).argmax(1) == labels).float().mean())
