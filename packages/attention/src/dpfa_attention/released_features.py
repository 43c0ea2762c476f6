"""Features of a whole data set in one release, for a head that trains on them as long as it likes (DP-Forward)."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dpfa_attention.module import DPFlashAttention
from dpfa_attention.randomized_labels import RandomizedLabels
from dpfa_attention.release_paths import check_release_paths
from dpfa_attention.stats import PrivacyStats
from dpfa_core.checks import integer, one_of, require
from dpfa_core.errors import LedgerError, NotPrivateError
from dpfa_core.events import Event
from dpfa_core.spending import spending


@dataclass(frozen=True, eq=False, kw_only=True)
class ReleasedFeatures:
    """What ``release_features`` hands out, and what of it is covered. Training on it costs nothing more."""

    features: Tensor
    """[n, rows, embed_dim], without a tape."""
    labels: Tensor | None
    """As they were given, or the answers of randomised response; [n]."""
    covers: Literal["nothing", "features only", "features and labels"]
    """Of each record; "nothing" where epsilon is infinite."""
    epsilon: float
    """Of what is covered, for one record: the features, and with them the labels if they are randomised."""
    delta: float
    stats: PrivacyStats
    """Of the release of the features alone."""
    statement: tuple[str, ...]
    """Sentences for a report: what is promised, and what is not."""


@torch.no_grad()
def release_features(
    encoder: nn.Module,
    attention: DPFlashAttention,
    records: Tensor,
    *,
    labels: Tensor | RandomizedLabels | None = None,
    query: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    batch_size: int = 256,
) -> ReleasedFeatures:
    """Embeddings of all `records` by a frozen, public encoder and one private attention: one release, one charge.

    The encoder's own outputs stay inside, without noise, a batch after the other; then `attention` releases all
    records in one call. A head trains on what comes back for as many epochs as it needs, and its weights may leave:
    that is post-processing. A second call on the same records is a second release.

    | labels | what is promised |
    |---|---|
    | None, or a tensor as it is | features only: labels are NOT covered, nor is what a trained head tells about them |
    | ``randomize_labels`` on the ledger of `attention` | features and labels, composed |

    Before a record is touched, made-up ones go through encoder and attention: a path around the release, or an
    encoder whose rows meet, is refused.

    Guarantee: tested (as ``dp_flash_attn_func`` for unit="sequence"; ``check_release_paths``; spending over epochs).
    Args:
        encoder: records to hidden states [n, length, embed_dim], row by row, in eval() mode; nn.Identity().eval() for
            hidden states that are there. It is public: not fitted on these records.
        attention: setting "release", unit "sequence". Its projections are public, too.
        records: [n, ...], one row for each record; n and the shape are public.
        labels: [n].
        query: [rows, embed_dim], public, the same for all records: the attention pools each record to so many rows.
            The noise grows with the root of rows * heads. None: a record's own rows, as many as it is long.
        key_padding_mask: [n, length], public; True hides.
        batch_size: records that the encoder takes at a time; no part of the promise.
    Raises: NotPrivateError for a path around the release, or rows that meet; LedgerError for labels of another ledger;
        BudgetExhausted; PrivacyParameterError.
    Source: Du et al. 2023 (DP-Forward); PRIVACY P9.
    """
    _check_attention(attention)
    good = isinstance(records, Tensor) and records.dim() > 0 and len(records) > 0
    require(good, "records must be a tensor [n, ...] with n > 0", _shape(records))
    training = [name or "(top)" for name, module in encoder.named_modules() if module.training]
    require(not training, "encoder must be in eval() mode, as what is frozen is", training, "Call encoder.eval().")
    good = query is None or (query.dim() == 2 and query.shape[1] == attention.embed_dim)
    require(good, f"query must be [rows, {attention.embed_dim}]", _shape(query))
    integer("batch_size", batch_size, least=1)
    given = labels.answers if isinstance(labels, RandomizedLabels) else labels
    good = given is None or (isinstance(given, Tensor) and given.shape == records.shape[:1])
    require(good, f"labels must hold one for each of {len(records)} records", _shape(given))
    if isinstance(labels, RandomizedLabels):
        _check_same_ledger(labels, attention)
    model = _Model(encoder, attention, query)
    _check_paths(model, records, key_padding_mask)

    calls = attention._calls.periods[-1]
    before = len(calls)
    hidden = torch.cat([encoder(part) for part in records.split(batch_size)])
    features, stats = model.attend(hidden, key_padding_mask)
    epsilon, covers = stats.epsilon_spent, "nothing" if math.isinf(stats.epsilon_spent) else "features only"
    if isinstance(labels, RandomizedLabels):
        lines = {*calls[before:], labels.event_id}
        epsilon = spending(_events(attention, lines), stats.delta).epsilon
        covers = "nothing" if math.isinf(epsilon) else "features and labels"
    return ReleasedFeatures(
        features=features,
        labels=given,
        covers=covers,  # type: ignore[arg-type]
        epsilon=epsilon,
        delta=stats.delta,
        stats=stats,
        statement=_statement(len(features), stats, labels, epsilon),
    )


class _Model(nn.Module):
    """Encoder and release in one, as its paths are checked."""

    def __init__(self, encoder: nn.Module, attention: DPFlashAttention, query: Tensor | None) -> None:
        super().__init__()
        self.encoder, self.attention, self.query = encoder, attention, query

    def forward(self, records: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        return self.attend(self.encoder(records), key_padding_mask)[0]

    def attend(self, hidden: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, PrivacyStats]:
        rows = hidden if self.query is None else self.query.to(hidden).expand(len(hidden), -1, -1)
        if not self.attention.batch_first:
            hidden, rows = hidden.transpose(0, 1), rows.transpose(0, 1)
        out, stats = self.attention(rows, hidden, hidden, key_padding_mask, return_privacy_stats=True)
        return out if self.attention.batch_first else out.transpose(0, 1), stats


def _check_attention(attention: DPFlashAttention) -> None:
    require(isinstance(attention, DPFlashAttention), "attention must be a DPFlashAttention", type(attention).__name__)
    one_of("attention.setting", attention.setting, ("release",))
    one_of("attention.unit", attention.unit, ("sequence",), "A record is a row, and an encoder mixes its tokens.")


def _check_same_ledger(labels: RandomizedLabels, attention: DPFlashAttention) -> None:
    if not _events(attention, {labels.event_id}):
        raise LedgerError(
            f"labels must be charged to the ledger of the attention, got the line {labels.event_id} that it does not "
            "have; features and labels of one record compose: give one ledger to both."
        )


def _events(attention: DPFlashAttention, lines: Collection[str]) -> list[tuple[Event, int]]:
    return [(line.event, line.count) for line in attention._calls.ledger.releases() if line.id in lines]


def _check_paths(model: _Model, records: Tensor, key_padding_mask: Tensor | None) -> None:
    made_up = torch.stack((torch.zeros_like(records[0]), torch.ones_like(records[0])))
    mask = None if key_padding_mask is None else torch.zeros_like(key_padding_mask[:1]).expand(2, -1)
    alone, beside = (model.encoder(made_up[places]) for places in ([0, 0], [0, 1]))
    if not torch.allclose(alone[0], beside[0], equal_nan=True, rtol=1e-4, atol=1e-6):
        raise NotPrivateError(
            "encoder must map each record by itself, got one whose output for a record changes with another record of "
            "its batch; one record would then reach several rows of a release. Use one without such a layer."
        )
    asked = model.attention._asked()
    if math.isinf(asked["epsilon"]) and "head_epsilons" not in asked:
        return  # without noise there is no release, and nothing is promised
    found = check_release_paths(model, made_up, key_padding_mask=mask)
    if not found:
        raise NotPrivateError(f"features must leave through the release only, got: {found} Keep those values inside.")


def _statement(
    n: int, stats: PrivacyStats, labels: Tensor | RandomizedLabels | None, epsilon: float
) -> tuple[str, ...]:
    at = f"at delta={stats.delta:.6g}"
    features = f"features of {n} records, one release: epsilon={stats.epsilon_spent:.6g} {at} for one sequence."
    if isinstance(labels, RandomizedLabels):
        about_labels = (
            f"labels by randomised response, epsilon={labels.epsilon_spent:.6g}; features and label of one record "
            f"together: epsilon={epsilon:.6g} {at}."
        )
    else:
        given = "none were given" if labels is None else "they are handed out as they are"
        about_labels = f"labels are NOT covered: {given}, and a head that is trained on labels tells about them."
    lines = (
        features if math.isfinite(stats.epsilon_spent) else "features leave without noise: NOT covered.",
        f"relation: {stats.relation}.",
        about_labels,
        "encoder, attention weights and query are public: it is assumed that they were not fitted on these records.",
        "the number of records, their length and masks are public.",
        "training a head on this costs nothing more; another release of the same records does.",
    )
    if stats.secure_noise:
        return lines
    return (*lines, "NOT secure: the noise comes from a seed, and who knows it can subtract it.")


def _shape(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
