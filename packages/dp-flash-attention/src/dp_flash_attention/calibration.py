"""Clip norm and noise multiplier for a training, found from the private data and paid from the same budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self, TypeVar

from dpfa_core.checks import fraction, integer, is_real, positive, require
from dpfa_core.errors import NotPrivateError, PrivacyParameterError
from dpfa_core.events import Composed, EpsilonDelta, Event, SelfComposed
from dpfa_core.ledger import Ledger

if TYPE_CHECKING:
    import torch

CANDIDATES = 64
"""Clip norms to choose from, in equal ratios over the public bounds."""

USUAL_SAMPLE = 2048
"""Records that are looked at, in expectation, where the caller does not say."""

ALONE, NEAR = 2, 0.01
"""Records whose norms are compared alone and in a batch, and the relative difference that rounding may make."""

MOST = 50.0
"""A selection is exact long before it costs this much."""

T = TypeVar("T")
PerSampleLoss = Callable[[Any, Any], Any]


class AdaptiveNoiseCalibrator:
    """Finds the clip norm as a private quantile of gradient norms, and the noise that the rest of the budget needs.

    ``calibrate`` looks at a Poisson sample of the records. Its answer is the upper end of a confidence interval:
    with at least that confidence, the share `quantile` of the sample's gradients, or more, stays whole. Then
    calibration and training together cost at most `target_epsilon`::

        calibrator = AdaptiveNoiseCalibrator(3.0, target_delta=1e-5).calibrate(model, loader, epochs=4)
        model, optimizer, loader = make_private(
            module=model, optimizer=optimizer, data_loader=loader, ledger=calibrator.ledger,
            noise_multiplier=calibrator.noise_multiplier, max_grad_norm=calibrator.clip_norm)

    Guarantee: tested. Unit "example", relation "add_or_remove". The calibration is on the ledger before a
    quantile is drawn; training beyond `epochs` on the same ledger is refused by its budget. An accuracy, not the
    privacy, rests on `confidence_interval`.

    Args:
        target_epsilon: of calibration and training together.
        confidence_interval: of the interval around the quantile, in (0, 1).
        target_delta: must be given; below 1 / the number of records.
        quantile: share of gradients that is to stay whole.
        calibration_share: of `target_epsilon`, spent on the quantile.
        bounds: public range of clip norms to choose from.
        ledger: where both are recorded; what it holds already is part of the target. By default one in memory
            with `target_epsilon` as its budget.
        accountant: of the noise multiplier; "auto" takes the tightest.

    Raises: PrivacyParameterError.
    Source: Smith 2011 (private quantiles); Balle, Barthe & Gaboardi 2018, Theorem 8 (Poisson sampling of pure DP).
    """

    def __init__(
        self,
        target_epsilon: float,
        confidence_interval: float = 0.95,
        *,
        target_delta: float | None = None,
        quantile: float = 0.5,
        calibration_share: float = 0.05,
        bounds: tuple[float, float] = (2.0**-10, 2.0**10),
        ledger: Ledger | None = None,
        accountant: str = "auto",
    ) -> None:
        positive("target_epsilon", target_epsilon)
        fraction("confidence_interval", confidence_interval, zero=False)
        require(
            target_delta is not None,
            "target_delta must be given",
            target_delta,
            "Choose one well below 1 / the number of records.",
        )
        fraction("target_delta", target_delta, zero=False)
        fraction("quantile", quantile, zero=False)
        fraction("calibration_share", calibration_share, zero=False)
        good = isinstance(bounds, tuple) and len(bounds) == 2 and all(map(is_real, bounds))
        require(good and 0 < bounds[0] < bounds[1] < math.inf, "bounds must be (low, high), 0 < low < high", bounds)
        if ledger is None:
            terms: dict[str, Any] = {"unit": "example", "relation": "add_or_remove"}
            ledger = Ledger.memory(**terms, delta=target_delta, budget=target_epsilon)
        require(ledger.unit in (None, "example"), 'the ledger must have unit="example"', ledger.unit)
        require(
            ledger.relation in (None, "add_or_remove"),
            'the ledger must have relation="add_or_remove"',
            ledger.relation,
        )
        self.target_epsilon, self.target_delta = float(target_epsilon), float(target_delta or 0.0)
        self.confidence_interval, self.quantile, self.bounds = confidence_interval, quantile, bounds
        self.calibration_share, self.ledger, self.accountant = calibration_share, ledger, accountant
        self._noise_multiplier: float | None = None
        self._interval: tuple[float, float] | None = None

    @property
    def noise_multiplier(self) -> float:
        """For ``make_private``: least noise with which calibration and training keep the target, rounded up."""
        return self._found("noise_multiplier", self._noise_multiplier)

    @property
    def clip_norm(self) -> float:
        """For ``make_private``'s ``max_grad_norm``: the upper end of ``interval``."""
        return self.interval[1]

    @property
    def interval(self) -> tuple[float, float]:
        """Holds the sample's true quantile with the given confidence; released, and paid for."""
        return self._found("interval", self._interval)

    def calibrate(
        self,
        model: torch.nn.Module,
        loader: torch.utils.data.DataLoader[Any],
        *,
        epochs: int = 1,
        per_sample_loss: PerSampleLoss | None = None,
        sample_size: int | None = None,
    ) -> Self:
        """Spend the calibration's share, and set ``noise_multiplier`` and ``clip_norm``.

        Args:
            model: untouched; as for ``make_private``.
            loader: the one that is trained with: its dataset, batch size and collation are used.
            epochs: of the training that follows, with Poisson sampling.
            per_sample_loss: (model, batch) to one loss for each row. By default the cross-entropy of
                ``model(inputs)`` for batches (inputs, class labels).
            sample_size: expected number of records to look at; by default 2048, or all.
        Raises: PrivacyParameterError, NotPrivateError, BudgetExhausted, LedgerError; before anything is released,
            if the target cannot be kept.
        """
        from dpfa_accounting.calibration import calibrate_noise_multiplier
        from dpfa_mechanisms.quantiles import private_quantile
        from dpfa_training import TrainingPlan
        from dpfa_training.sampling import Poisson, check_loader

        integer("epochs", epochs, least=1)
        population, batch_size = check_loader(loader)
        if sample_size is None:
            sample_size = min(population, USUAL_SAMPLE)
        integer("sample_size", sample_size, least=1)
        require(sample_size <= population, f"sample_size must be at most {population}, all records", sample_size)

        def training(noise_multiplier: float) -> Event:
            plan = TrainingPlan(
                noise_multiplier=noise_multiplier,
                max_grad_norm=1.0,
                population=population,
                expected_batch_size=batch_size,
            )
            return plan.total(epochs * plan.steps_per_epoch)

        sampler = Poisson(population, sample_size)
        epsilon, event = _selection(self.target_epsilon * self.calibration_share, sampler.sampling_probability)
        before = tuple(SelfComposed(earlier, count) for earlier, count in self.ledger.events())
        noise_multiplier = calibrate_noise_multiplier(
            lambda value: Composed((*before, event, training(value))),
            self.target_epsilon,
            self.target_delta,
            self.accountant,
        )

        def record(_: Event) -> str:
            # the selections' own events, without the sampling, would cost more
            return self.ledger.record(event, purpose="calibration", mechanism="exponential", backend="none")

        norms = list(_norms(model, loader, sampler, batch_size, per_sample_loss or _cross_entropy))
        found = private_quantile(
            norms,
            self.quantile,
            epsilon=epsilon,
            bounds=self.bounds,
            record=record,
            candidates=CANDIDATES,
            grid="geometric",
            confidence=self.confidence_interval,
            relation="add_or_remove",
        )
        self._interval, self._noise_multiplier = (found.low, found.high), noise_multiplier
        total = training(noise_multiplier)
        if isinstance(total, SelfComposed):
            self.ledger.foresee(total.event, total.count)
        return self

    @staticmethod
    def _found(name: str, value: T | None) -> T:
        if value is None:
            raise PrivacyParameterError(
                f"the calibrator must be calibrated first, got none of {name}; call calibrate(model, loader)."
            )
        return value


def _selection(epsilon: float, probability: float) -> tuple[float, Event]:
    """Epsilon of a selection on a Poisson sample, and the event of both: it costs (about) `epsilon`, rounded up."""
    epsilon = min(epsilon, MOST)
    inside = math.log1p(math.expm1(epsilon) / probability)
    outside = math.log1p(probability * math.expm1(inside)) * (1.0 + 2.0**-40)
    return inside, EpsilonDelta(outside, 0.0)


def _norms(
    model: torch.nn.Module,
    loader: torch.utils.data.DataLoader[Any],
    sampler: Any,
    batch_size: int,
    losses: PerSampleLoss,
) -> Iterator[float]:
    """Of the gradients of the records in one secret Poisson sample; private."""
    from dpfa_kernels_torch.noise.keys import KeySource
    from dpfa_training import clipped_gradients

    def norms(rows: list[int]) -> list[float]:
        batch = loader.collate_fn([loader.dataset[row] for row in rows])
        _, found = clipped_gradients(model, losses, batch, max_grad_norm=math.inf)
        return list(found.tolist())

    # fresh keys: a sample that a seed ties to the training's draws would not be independent of them
    chosen = sampler.units(KeySource(), 0).tolist()
    modes = [(layer, layer.training) for layer in model.modules()]
    try:
        model.eval()  # without dropout a record alone and in a batch must give the same
        for start in range(0, len(chosen), batch_size):
            rows = chosen[start : start + batch_size]
            found = norms(rows)
            if start == 0:
                _check_alone(found[:ALONE], [norms([row])[0] for row in rows[:ALONE]])
            yield from found
    finally:
        for layer, mode in modes:
            layer.training = mode


def _check_alone(together: list[float], alone: list[float]) -> None:
    """One record must not move the norm of another, which the quantile's sensitivity counts on."""
    for one, other in zip(together, alone, strict=True):
        if abs(one - other) > NEAR * max(one, other):
            raise NotPrivateError(
                f"the gradient norm of a record must not depend on others, got {one:.6g} in a batch and {other:.6g} "
                "alone; make every row's loss depend on that row only."
            )


def _cross_entropy(model: Any, batch: Any) -> Any:
    import torch

    inputs: Any
    labels: Any
    inputs, labels = batch if isinstance(batch, list | tuple) and len(batch) == 2 else (None, None)
    classes = isinstance(labels, torch.Tensor) and labels.dim() == 1 and not labels.is_floating_point()
    if not classes:
        raise PrivacyParameterError(
            f"batches must be (inputs, class labels) for the default loss, got {type(batch).__name__}; pass "
            "per_sample_loss, a function of (model, batch) that returns one loss for each row."
        )
    return torch.nn.functional.cross_entropy(model(inputs), labels, reduction="none")
