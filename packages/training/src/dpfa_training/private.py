"""``make_private``: the user's module, optimiser and loader, made private together."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from dpfa_accounting.calibration import calibrate_noise_multiplier
from dpfa_core.checks import fraction, integer, one_of, positive, require
from dpfa_core.errors import LedgerError, NotPrivateError, PrivacyParameterError
from dpfa_core.ledger import Ledger
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_training.adaptive_clipping import QuantileClipping
from dpfa_training.engine import Engine
from dpfa_training.guard import engine_of_parameter
from dpfa_training.plan import Reduction, Sampling, TrainingPlan, TrainingUnit
from dpfa_training.sampling import Draws, MemoryProbe, PrivateLoader, Users, check_loader

Clips = str | Mapping[str, float] | QuantileClipping
PhysicalBatchSize = int | Literal["auto"] | None


def make_private(
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader[Any],
    noise_multiplier: float,
    max_grad_norm: float,
    sampling: Sampling = "poisson",
    clipping: Clips = "flat",
    reduction: Reduction = "mean",
    max_physical_batch_size: PhysicalBatchSize = None,
    ledger: Ledger | None = None,
    seed: int | None = None,
    max_batch: int | None = None,
    unit: TrainingUnit = "example",
    user_ids: Sequence[Hashable] | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Train `module` by DP-SGD in the loop you have: iterate, forward, ``loss.backward()``, step.

    Guarantee: tested. Unit "example" or "user"; relation "add_or_remove", or "replace" with fixed-size sampling;
    see ``engine_of(module).get_epsilon``.

    Args:
        module: any torch model with its samples in dimension 0 of its first input, used in place. Modules that use
            a parameter in a way no rule knows run once for each sample, which the logger "dpfa_training" announces.
        optimizer: any torch optimiser over exactly the trainable parameters.
        data_loader: a plain DataLoader over a map-style dataset; its batch size becomes the expected batch size,
            in units, and its order is replaced. Workers, collation and pinning stay; ``drop_last`` is without
            effect, since no batch is a short rest.
        noise_multiplier: std of the noise on the sum of clipped gradients / the sensitivity of that sum, which
            is `max_grad_norm`, and twice that for "fixed_size"; 0 is training without privacy, recorded as such.
        max_grad_norm: clip threshold of one unit's whole gradient, l2.
        sampling: "poisson"; "fixed_size" (as many as the batch size, without replacement); "balls_in_bins"
            (each epoch every unit falls into one batch; an epoch is charged as a whole before its first step);
            "truncated_poisson" (at most `max_batch`); "none" keeps the loader as it is and needs
            ``noise_multiplier=0``.
        clipping: "flat" (one norm); "per_layer" or "per_head" (C / sqrt(groups) for each); "automatic" (C / (norm +
            0.01)); {parameter or prefix: threshold}, whose squares add up to at most C squared; or a
            ``QuantileClipping``, whose threshold begins at C. The event is the same for all.
        reduction: "mean" or "sum": how your loss joins the rows of a batch.
        max_physical_batch_size: rows held in memory at once; call backward and step for each part as usual.
            "auto" serves the first draws in small parts, measures what they keep in memory and, on a CPU, how long
            they take, and chooses; draws and noise stay the same, sums may be rounded in another order.
        ledger: where each step is recorded before it is taken; by default one in memory.
        seed: makes noise and sampling reproducible, and *not secure*; None draws keys from the system.
        max_batch: largest draw under "truncated_poisson", in units.
        unit: "example", one record; "user", all records of one user, whose gradients are summed before the clip.
        user_ids: for "user": the user of each record, in the order of the dataset.

    Returns: (the same module, the same optimiser, the loader to iterate over).
    Raises: PrivacyParameterError, NotPrivateError (what cannot be covered, by name), LedgerError.
    Source: Abadi et al. 2016.
    """
    _check_kinds(module, optimizer, ledger)
    users, population, batch_size = _units(data_loader, unit, user_ids)
    plan = TrainingPlan(
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        population=population,
        expected_batch_size=batch_size,
        sampling=sampling,
        clipping=clipping,  # type: ignore[arg-type]
        reduction=reduction,
        max_batch=max_batch,
        unit=unit,
    )
    return attach(module, optimizer, data_loader, plan, max_physical_batch_size, ledger, seed, None, users)


def make_private_with_epsilon(
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader[Any],
    target_epsilon: float,
    target_delta: float,
    epochs: int,
    max_grad_norm: float,
    clipping: Clips = "flat",
    reduction: Reduction = "mean",
    max_physical_batch_size: PhysicalBatchSize = None,
    ledger: Ledger | None = None,
    seed: int | None = None,
    sampling: Sampling = "poisson",
    max_batch: int | None = None,
    unit: TrainingUnit = "example",
    user_ids: Sequence[Hashable] | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """``make_private`` with the least noise for (`target_epsilon`, `target_delta`) after `epochs` epochs.

    Calibrated for the event that runs, at as many steps as run: an epoch is ``len(loader)`` steps. A step
    beyond the last planned one, or beyond the ledger's budget, raises ``BudgetExhausted`` before the
    parameters change.
    """
    integer("epochs", epochs, least=1)
    _check_kinds(module, optimizer, ledger)
    users, population, batch_size = _units(data_loader, unit, user_ids)
    plan = plan_for_target(
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        steps=epochs * -(-population // batch_size),
        max_grad_norm=max_grad_norm,
        population=population,
        expected_batch_size=batch_size,
        clipping=clipping,
        reduction=reduction,
        sampling=sampling,
        max_batch=max_batch,
        unit=unit,
    )
    steps = epochs * plan.steps_per_epoch
    if ledger is None:
        ledger = Ledger.memory(unit=unit, relation=plan.relation, delta=target_delta, budget=target_epsilon)
    ledger.foresee(plan.event(), plan.charges(steps))
    return attach(module, optimizer, data_loader, plan, max_physical_batch_size, ledger, seed, steps, users)


def plan_for_target(
    *,
    target_epsilon: float,
    target_delta: float,
    steps: int,
    max_grad_norm: float,
    population: int,
    expected_batch_size: int,
    clipping: Clips = "flat",
    reduction: Reduction = "mean",
    sampling: Sampling = "poisson",
    max_batch: int | None = None,
    unit: TrainingUnit = "example",
) -> TrainingPlan:
    """The plan with the least noise multiplier, rounded up, for a target after `steps` steps."""
    positive("target_epsilon", target_epsilon, remedy="For training without privacy use noise_multiplier=0.")
    fraction("target_delta", target_delta, zero=False)
    draft = TrainingPlan(
        noise_multiplier=1.0,
        max_grad_norm=max_grad_norm,
        population=population,
        expected_batch_size=expected_batch_size,
        sampling=sampling,
        reduction=reduction,
        max_batch=max_batch,
        unit=unit,
    )
    noise_multiplier = calibrate_noise_multiplier(
        lambda value: dataclasses.replace(draft, noise_multiplier=value).total(steps), target_epsilon, target_delta
    )
    # the event is the same for every clipping
    return dataclasses.replace(draft, noise_multiplier=noise_multiplier, clipping=clipping)  # type: ignore[arg-type]


def attach(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader[Any],
    plan: TrainingPlan,
    max_physical_batch_size: PhysicalBatchSize,
    ledger: Ledger | None,
    seed: int | None,
    planned_steps: int | None,
    users: Users | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Build the engine of `plan` and the loader that feeds it."""
    if isinstance(max_physical_batch_size, str):
        one_of("max_physical_batch_size", max_physical_batch_size, ("auto",), "Or give a number of rows.")
    elif max_physical_batch_size is not None:
        integer("max_physical_batch_size", max_physical_batch_size, least=1)
    if ledger is None:
        ledger = Ledger.memory(unit=plan.unit, relation=plan.relation)
    if ledger.unit not in (None, plan.unit):
        raise LedgerError(
            f'training needs a ledger with unit="{plan.unit}", got {ledger.unit!r}; open one for this training.'
        )
    _one_process()
    keys = KeySource(seed, generator="chacha20")
    engine = Engine(
        module=module, optimizer=optimizer, plan=plan, keys=keys, ledger=ledger, planned_steps=planned_steps
    )
    if plan.sampling == "none":
        return module, optimizer, data_loader
    rows = max_physical_batch_size
    # on other devices a clock would stop before the work does
    on_cpu = all(parameter.device.type == "cpu" for parameter in module.parameters())
    limit = MemoryProbe(module, timed=on_cpu) if isinstance(rows, str) else rows
    engine.draws = Draws(plan.sampler(), keys, limit, users)
    return module, optimizer, PrivateLoader(data_loader, engine.draws, engine)


def _check_kinds(module: Any, optimizer: Any, ledger: Any) -> None:
    require(isinstance(module, nn.Module), "module must be a torch Module", type(module).__name__)
    require(
        isinstance(optimizer, torch.optim.Optimizer), "optimizer must be a torch Optimizer", type(optimizer).__name__
    )
    known = ledger is None or isinstance(ledger, Ledger)
    require(known, "ledger must be a Ledger or None", type(ledger).__name__, "Use Ledger.open(path, ...).")


def _one_process() -> None:
    """Several processes would each draw a batch, a noise and a price of their own."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise NotPrivateError(
            f"private training runs in one process in this version, got a group of {distributed.get_world_size()}: "
            "norms belong to one rank's people and noise must be added once for all; start it without torchrun."
        )


def _units(
    loader: DataLoader[Any], unit: TrainingUnit, user_ids: Sequence[Hashable] | None
) -> tuple[Users | None, int, int]:
    """(grouping of the records, number of units, units in a batch)."""
    one_of("unit", unit, ("example", "user"))
    require(
        (user_ids is not None) == (unit == "user"),
        'user_ids must be given for unit="user" and for nothing else',
        f"unit={unit!r} with{'out' if user_ids is None else ''} user_ids",
        "Name the user of each record.",
    )
    if user_ids is None:
        records, size = check_loader(loader)
        return None, records, size
    check_loader(loader, batch_of="users", units=sys.maxsize)
    users = Users(user_ids, len(loader.dataset))  # type: ignore[arg-type]
    check_loader(loader, batch_of="users", units=len(users))
    return users, len(users), loader.batch_size or 0


def engine_of(module: nn.Module) -> Engine:
    """The engine that ``make_private`` attached to `module`.

    Raises: PrivacyParameterError if there is none.
    """
    for parameter in module.parameters():
        engine = engine_of_parameter(parameter)
        if isinstance(engine, Engine):
            return engine
    raise PrivacyParameterError(
        f"expected a module that make_private has returned, got a plain {type(module).__name__}; "
        "call make_private first."
    )
