"""``make_private``: the user's module, optimiser and loader, made private together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dpfa_accounting.calibration import calibrate_noise_multiplier
from dpfa_core.checks import fraction, integer, one_of, positive
from dpfa_core.errors import LedgerError, PrivacyParameterError
from dpfa_core.events import Gaussian, PoissonSampled, SelfComposed
from dpfa_core.ledger import Ledger
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_training.engine import Engine
from dpfa_training.guard import engine_of_parameter
from dpfa_training.plan import Reduction, Sampling, TrainingPlan
from dpfa_training.sampling import PoissonLoader, PoissonSampler, check_loader


def make_private(
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader[Any],
    noise_multiplier: float,
    max_grad_norm: float,
    sampling: Sampling = "poisson",
    clipping: str = "flat",
    reduction: Reduction = "mean",
    max_physical_batch_size: int | None = None,
    ledger: Ledger | None = None,
    seed: int | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Train `module` by DP-SGD in the loop you have: iterate, forward, ``loss.backward()``, step.

    Guarantee: tested. Unit "example", relation "add_or_remove"; see ``engine_of(module).get_epsilon``.

    Args:
        module: layers with a rule (Linear, Embedding, LayerNorm, Conv2d patches) and bare parameters of
            shape (1, ...); samples in dimension 0. It is used in place.
        optimizer: any torch optimiser over exactly the trainable parameters.
        data_loader: a plain DataLoader; its batch size becomes the expected batch size, its order is
            replaced by Poisson sampling.
        noise_multiplier: std of the noise on the sum of clipped gradients / `max_grad_norm`; 0 is training
            without privacy, recorded as such.
        max_grad_norm: clip threshold of one example's whole gradient, l2.
        sampling: "poisson"; "none" keeps the loader as it is and needs ``noise_multiplier=0``.
        reduction: "mean" or "sum": how your loss joins the rows of a batch.
        max_physical_batch_size: rows held in memory at once; call backward and step for each part as usual.
        ledger: where each step is recorded before it is taken; by default one in memory.
        seed: makes noise and sampling reproducible, and *not secure*; None draws keys from the system.

    Returns: (the same module, the same optimiser, the loader to iterate over).
    Raises: PrivacyParameterError, NotPrivateError (what cannot be covered, by name), LedgerError.
    Source: Abadi et al. 2016.
    """
    records, batch_size = check_loader(data_loader)
    plan = TrainingPlan(
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        population=records,
        expected_batch_size=batch_size,
        sampling=sampling,
        clipping=clipping,  # type: ignore[arg-type]
        reduction=reduction,
    )
    return attach(module, optimizer, data_loader, plan, max_physical_batch_size, ledger, seed, None)


def make_private_with_epsilon(
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader[Any],
    target_epsilon: float,
    target_delta: float,
    epochs: int,
    max_grad_norm: float,
    clipping: str = "flat",
    reduction: Reduction = "mean",
    max_physical_batch_size: int | None = None,
    ledger: Ledger | None = None,
    seed: int | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """``make_private`` with the least noise for (`target_epsilon`, `target_delta`) after `epochs` epochs.

    An epoch is ``len(loader)`` steps. A step beyond the last planned one, or beyond the ledger's budget,
    raises ``BudgetExhausted`` before the parameters change.
    """
    integer("epochs", epochs, least=1)
    records, batch_size = check_loader(data_loader)
    steps = epochs * -(-records // batch_size)
    plan = plan_for_target(
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        steps=steps,
        max_grad_norm=max_grad_norm,
        population=records,
        expected_batch_size=batch_size,
        clipping=clipping,
        reduction=reduction,
    )
    if ledger is None:
        ledger = Ledger.memory(unit="example", relation=plan.relation, delta=target_delta, budget=target_epsilon)
    ledger.foresee(plan.event(), steps)
    return attach(module, optimizer, data_loader, plan, max_physical_batch_size, ledger, seed, steps)


def plan_for_target(
    *,
    target_epsilon: float,
    target_delta: float,
    steps: int,
    max_grad_norm: float,
    population: int,
    expected_batch_size: int,
    clipping: str = "flat",
    reduction: Reduction = "mean",
) -> TrainingPlan:
    """The plan with the least noise multiplier, rounded up, for a target after `steps` steps."""
    positive("target_epsilon", target_epsilon, remedy="For training without privacy use noise_multiplier=0.")
    fraction("target_delta", target_delta, zero=False)
    one_of("clipping", clipping, ("flat",))
    draft = TrainingPlan(
        noise_multiplier=1.0,
        max_grad_norm=max_grad_norm,
        population=population,
        expected_batch_size=expected_batch_size,
        reduction=reduction,
    )
    noise_multiplier = calibrate_noise_multiplier(
        lambda value: SelfComposed(PoissonSampled(draft.sampling_probability, Gaussian(value), draft.relation), steps),
        target_epsilon,
        target_delta,
    )
    return TrainingPlan(
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        population=population,
        expected_batch_size=expected_batch_size,
        reduction=reduction,
    )


def attach(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader[Any],
    plan: TrainingPlan,
    max_physical_batch_size: int | None,
    ledger: Ledger | None,
    seed: int | None,
    planned_steps: int | None,
) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Build the engine of `plan` and the loader that feeds it."""
    if ledger is None:
        ledger = Ledger.memory(unit="example", relation=plan.relation)
    if ledger.unit not in (None, "example"):
        raise LedgerError(
            f'training needs a ledger with unit="example", got {ledger.unit!r}; open one for this training.'
        )
    keys = KeySource(seed, generator="chacha20")
    engine = Engine(
        module=module, optimizer=optimizer, plan=plan, keys=keys, ledger=ledger, planned_steps=planned_steps
    )
    if plan.sampling == "none":
        return module, optimizer, data_loader
    sampler = PoissonSampler(plan, keys, max_physical_batch_size)
    return module, optimizer, PoissonLoader(data_loader, sampler, engine.announce)


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
