"""A data set's features in one release: no way around it, one charge whatever is trained, and labels spoken of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpfa_attention import DPFlashAttention, ReleasedFeatures, check_release_paths, randomize_labels, release_features
from dpfa_attention.released_features import _Model
from dpfa_core.errors import BudgetExhausted, LedgerError, NotPrivateError, PrivacyParameterError
from dpfa_core.ledger import Ledger
from dpfa_core.spending import spending

E, WORDS, LENGTH, N = 8, 12, 5, 600


class Encoder(nn.Module):
    """Word vectors that meet within a record; `more(self, x)` is what a wrong one does besides."""

    def __init__(self, more: Any = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.words = nn.Embedding(WORDS, E, _weight=torch.randn(WORDS, E, generator=generator))
        self.more = more or (lambda self, x: x)

    def forward(self, ids: Tensor) -> Any:
        x = self.words(ids)
        return self.more(self, x + x.mean(1, keepdim=True))


class AroundTheRelease(DPFlashAttention):
    """The usual transformer block: it carries its input past the noise."""

    def forward(self, query: Tensor, key: Any = None, *inputs: Any, **options: Any) -> Any:
        released, stats = super().forward(query, key, *inputs, **options)
        return released + key.mean(1, keepdim=True), stats


def keeps(self: Any, x: Tensor) -> Tensor:
    self.last = x
    return x


def reads(self: Any, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def mixes(self: Any, x: Tensor) -> Tensor:
    return x - x.mean(0)


def attention(kind: type[DPFlashAttention] = DPFlashAttention, budget: float | None = None, **options: Any) -> Any:
    ledger = Ledger.memory(unit="sequence", relation="replace", delta=1e-5, budget=budget)
    given: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-5, "ledger": ledger}
    torch.manual_seed(3)
    return kind(E, 1, **given | options).eval()


QUERY = torch.randn(1, E, generator=torch.Generator().manual_seed(1))


def records(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids whose half of the vocabulary is the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (N,), generator=generator)
    ids = torch.randint(0, WORDS // 2, (N, LENGTH), generator=generator) + WORDS // 2 * labels[:, None]
    return ids, labels


def released(encoder: nn.Module | None = None, made: Any = None, **options: Any) -> tuple[ReleasedFeatures, Any]:
    made = made or attention()
    given: dict[str, Any] = {"query": QUERY, "labels": records()[1]} | options
    return release_features((encoder or Encoder()).eval(), made, records()[0], **given), made


def test_every_path_to_the_outside_passes_the_release_and_one_that_does_not_is_found() -> None:
    """What ``release_features`` runs, and the same model with a residual around the attention."""
    ids, _ = records()
    for kind, sound in ((DPFlashAttention, True), (AroundTheRelease, False)):
        made = attention(kind)
        paths = check_release_paths(_Model(Encoder().eval(), made, QUERY), ids[:2])
        assert bool(paths) is sound
        if sound:
            assert set(paths.releases) == {"attention"}
        assert list(made._calls.ledger.events()) == []


@pytest.mark.parametrize(
    ("encoder", "kind", "message"),
    [
        (None, AroundTheRelease, "through the release only, got: 1 paths avoid a release"),
        (keeps, DPFlashAttention, "attribute encoder.last"),
        (reads, DPFlashAttention, "python value in encoder"),
        (mixes, DPFlashAttention, "map each record by itself"),
    ],
)
def test_a_way_around_the_release_is_refused_before_a_record_is_touched(
    encoder: Any, kind: type[DPFlashAttention], message: str
) -> None:
    seen: list[int] = []
    inner = Encoder(encoder)
    inner.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    made = attention(kind)
    with pytest.raises(NotPrivateError, match=message):
        released(inner, made)
    assert set(seen) == {2}  # made-up ones
    assert list(made._calls.ledger.events()) == []


def test_a_head_trains_on_one_release_for_many_epochs_and_learns() -> None:
    found, made = released()
    ledger = made._calls.ledger
    spent = ledger.spent()
    head = nn.Linear(E, 2)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    assert found.labels is not None
    for _ in range(60):
        for rows in torch.arange(N).split(200):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(found.features[rows, 0]), found.labels[rows]).backward()
            optimizer.step()
    assert sum(count for _, count in ledger.events()) == 1
    assert ledger.spent() == spent
    assert spent <= 8.0
    assert float(made.get_privacy_spent()) <= 8.0
    # at the owner's, without noise
    ids, labels = records(seed=9)
    exact = attention(epsilon=float("inf"), clip_norm=1.0)
    clean = exact(QUERY.expand(N, 1, E), Encoder()(ids), Encoder()(ids))
    accuracy = (head(clean[:, 0]).argmax(1) == labels).float().mean().item()
    assert accuracy > 0.65  # half of them by chance: 7 standard deviations
    released(made=made)
    assert sum(count for _, count in ledger.events()) == 2  # a second release is charged


def test_features_are_the_attention_of_the_encoders_rows_and_noise_of_the_stated_size() -> None:
    ids, _ = records()
    exact, _ = released(made=attention(epsilon=float("inf"), clip_norm=1.0), batch_size=7)
    hidden = Encoder()(ids)
    by_hand = attention(epsilon=float("inf"), clip_norm=1.0)(QUERY.expand(N, 1, E), hidden, hidden)
    assert torch.allclose(exact.features, by_hand, atol=1e-6)
    found, made = released()
    added = (found.features - exact.features).double().flatten(0, 1)
    noise = torch.linalg.solve(made.out_proj.weight.double(), added.T)
    # chi square of 4800 normals: five standard deviations
    ratio = noise.square().mean().item() / found.stats.noise_std**2
    assert ratio == pytest.approx(1.0, abs=5 * (2 / noise.numel()) ** 0.5)
    assert not found.features.requires_grad
    assert found.features.shape == (N, 1, E)


def test_one_public_query_pools_a_record_and_takes_less_noise_than_its_own_rows() -> None:
    pooled, _ = released()
    whole, _ = released(query=None)
    assert whole.features.shape == (N, LENGTH, E)
    assert whole.stats.noise_std / pooled.stats.noise_std == pytest.approx(LENGTH**0.5, rel=1e-3)


@pytest.mark.parametrize(("labels", "words"), [(None, "none were given"), ("as they are", "handed out as they are")])
def test_labels_are_stated_as_not_covered(labels: Any, words: str) -> None:
    found, _ = released(labels=records()[1] if labels else None)
    assert found.covers == "features only"
    (line,) = [line for line in found.statement if "labels" in line and "NOT covered" in line]
    assert words in line
    assert found.epsilon == found.stats.epsilon_spent <= 8.0
    assert (found.labels is None) == (labels is None)


def test_randomised_labels_are_covered_and_composed_with_the_features() -> None:
    made = attention()
    ledger = made._calls.ledger
    labels = randomize_labels(records()[1], num_classes=2, epsilon=1.0, ledger=ledger)
    found, _ = released(made=made, labels=labels)
    assert found.covers == "features and labels"
    assert found.labels is labels.answers
    assert not [line for line in found.statement if "NOT covered" in line]
    assert found.epsilon == spending(ledger.events(), 1e-5).epsilon
    assert found.stats.epsilon_spent + 0.5 < found.epsilon <= 9.0 * (1 + 1e-9)
    # the next data set's statement is about its own two lines
    again = released(made=made, labels=labels)[0]
    assert again.epsilon == pytest.approx(found.epsilon, rel=1e-6)
    assert ledger.spent() > found.epsilon + 1


def test_labels_of_another_ledger_are_refused() -> None:
    other = Ledger.memory(unit="sequence", relation="replace", delta=1e-5)
    labels = randomize_labels(records()[1], num_classes=2, epsilon=1.0, ledger=other)
    made = attention()
    with pytest.raises(LedgerError, match="give one ledger to both"):
        released(made=made, labels=labels)
    assert list(made._calls.ledger.events()) == []


def test_without_noise_nothing_is_covered_and_a_seed_is_told() -> None:
    exact, _ = released(made=attention(epsilon=float("inf")))
    assert exact.covers == "nothing"
    assert exact.statement[0] == "features leave without noise: NOT covered."
    seeded, _ = released(made=attention(seed=3))
    assert [line for line in seeded.statement if line.startswith("NOT secure")]
    assert not [line for line in released()[0].statement if line.startswith("NOT secure")]


def test_head_budgets_promise_something_and_are_checked() -> None:
    made = attention(AroundTheRelease, epsilon=None, head_epsilons=[2.0])
    with pytest.raises(NotPrivateError, match="avoid a release"):
        released(made=made)


def test_a_release_that_the_budget_does_not_allow_is_not_computed(watched: Any) -> None:
    made = attention(budget=3.0)
    with pytest.raises(BudgetExhausted):
        released(made=made)
    assert watched.calls == 0


def test_padding_is_hidden_by_a_public_mask_and_time_may_come_first() -> None:
    ids, _ = records()
    mask = torch.zeros(N, LENGTH, dtype=torch.bool)
    mask[:, 3:] = True
    made = [attention(epsilon=float("inf")), attention(epsilon=float("inf"), batch_first=False)]
    outs = [released(made=one, key_padding_mask=mask)[0].features for one in made]
    assert torch.equal(*outs)
    shorter = release_features(nn.Identity().eval(), made[0], Encoder()(ids)[:, :3], query=QUERY)
    whole = release_features(nn.Identity().eval(), made[0], Encoder()(ids), query=QUERY, key_padding_mask=mask)
    assert torch.allclose(shorter.features, whole.features, atol=1e-6)
    assert bool(released(made=attention(), key_padding_mask=mask)[0].features.isfinite().all())


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        ({"unit": "token", "logit_bound": 1.0}, {}, "attention.unit must be one of 'sequence', got 'token'"),
        ({"setting": "training"}, {}, "attention.setting must be one of 'release', got 'training'"),
        ({}, {"query": torch.zeros(1, E + 1)}, r"query must be \[rows, 8\]"),
        ({}, {"labels": torch.zeros(3)}, "labels must hold one for each of 600 records"),
        ({}, {"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
    ],
)
def test_what_cannot_be_served_is_refused(made: Any, options: Any, message: str) -> None:
    with pytest.raises(PrivacyParameterError, match=message):
        released(made=attention(**made), **options)


def test_an_encoder_that_trains_and_records_that_are_none_are_refused() -> None:
    with pytest.raises(PrivacyParameterError, match=r"must be in eval\(\) mode"):
        release_features(Encoder(), attention(), records()[0])
    with pytest.raises(PrivacyParameterError, match=r"records must be a tensor \[n, ...\] with n > 0"):
        release_features(Encoder().eval(), attention(), records()[0][:0])
