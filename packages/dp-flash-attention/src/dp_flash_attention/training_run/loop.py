"""The private training loop of ``dpfa train``: steps, checkpoints, a polite stop."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_flash_attention.models import Recipe
from dp_flash_attention.training_run.averaging import Average
from dp_flash_attention.training_run.interrupt import polite_interrupt
from dp_flash_attention.training_run.run_folder import CHECKPOINT, RunFolder
from dpfa_core.ledger import Ledger
from dpfa_training import TrainingPlan, load_checkpoint, save_checkpoint
from dpfa_training.private import attach, engine_of

SECONDS_BETWEEN_CHECKPOINTS = 5.0
LARGEST_PHYSICAL_BATCH = 512
"""Rows held in memory at once; a larger draw is taken in parts."""

StepDone = Callable[[int], None]
"""Called after each step with the number of steps taken so far."""


def train_privately(
    module: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    plan: TrainingPlan,
    recipe: Recipe,
    steps: int,
    ledger: Ledger,
    folder: RunFolder,
    seed: int | None,
    step_done: StepDone,
) -> None:
    """Train `module` in place; on a stop the last whole step is in the checkpoint, all steps in the ledger.

    Args:
        inputs, labels: (n, ...) and (n,) int64; row i is record i.
        recipe: optimiser and averaging; nothing in it changes what is promised.
        steps: planned steps in all; those in the ledger are not taken again.

    Raises: KeyboardInterrupt after the step during which it was asked; BudgetExhausted; NotPrivateError.
    """
    optimizer = recipe.make_optimizer(p for p in module.parameters() if p.requires_grad)
    rows = DataLoader(TensorDataset(inputs, labels), batch_size=plan.expected_batch_size)
    module.train()
    _, _, loader = attach(module, optimizer, rows, plan, LARGEST_PHYSICAL_BATCH, ledger, seed, steps)
    engine, average = engine_of(module), Average(module, recipe.average_decay)
    if (folder / CHECKPOINT).is_file():
        extra = load_checkpoint(folder / CHECKPOINT, engine, loader.sampler)
        average.load(extra["average"])
        step_done(engine.steps)
    # steps that the ledger knows and the checkpoint does not are redone as they were, or given up, never charged twice
    remaining = steps - engine.charges.made
    if remaining > engine.charges.prepaid:
        ledger.foresee(plan.event(), remaining - engine.charges.prepaid)

    def save() -> None:
        state = {"average": average.state()}
        save_checkpoint(folder / CHECKPOINT, engine, loader.sampler, state)

    saved_at = time.monotonic()
    with polite_interrupt() as interrupt:
        before = engine.steps
        for x, y in loader.draws(max(0, remaining)):
            # Sum over rows of cross-entropies: each row's loss is a function of that row alone.
            F.cross_entropy(module(x), y, reduction=plan.reduction).backward()
            optimizer.step()
            if engine.steps == before:
                continue  # a part of a draw
            before = engine.steps
            average.update(module)
            step_done(engine.steps)
            if interrupt.asked:
                save()
                raise KeyboardInterrupt
            if time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS:
                save()
                saved_at = time.monotonic()
        save()
    engine.detach()
    average.store(module)
    module.eval()
