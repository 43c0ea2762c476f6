"""The same step by Opacus, in each of its ways to come by per-sample gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dpfa_benchmarks.case import Step
from dpfa_benchmarks.cases.for_peers import by_our_names, with_tables
from dpfa_benchmarks.cases.one_by_one import Gradients
from dpfa_benchmarks.workloads import Workload

Mode = Literal["ghost", "hooks", "functorch", "ew"]
MODES: tuple[Mode, ...] = ("ghost", "hooks", "functorch", "ew")
MISSING = 'not installed: pip install -e "benchmarks[opacus]"'


def unavailable() -> str:
    """Why Opacus cannot run; empty if it can."""
    return "" if find_spec("opacus") else MISSING


def build(work: Workload, mode: Mode, *, noise_multiplier: float, max_grad_norm: float, lr: float) -> Step:
    """A step from the batch in memory to changed parameters."""
    optimizer, backward = _private(work, mode, noise_multiplier, max_grad_norm, lr)

    def step() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    return step


def clipped_sum(work: Workload, mode: Mode, max_grad_norm: float) -> Gradients:
    """The clipped gradient sum as Opacus hands it to its noise."""
    names: dict[Tensor, str] = {}
    optimizer, backward = _private(work, mode, 0.0, max_grad_norm, 0.0, names)
    optimizer.zero_grad()
    backward()
    if mode == "ghost":
        optimizer.accumulate()
    else:
        optimizer.clip_and_accumulate()
    return by_our_names({name: parameter.summed_grad for parameter, name in names.items()})  # type: ignore[attr-defined]


class _Losses:
    """The workload's loss as a criterion whose reduction Opacus switches."""

    reduction = "mean"

    def __init__(self, work: Workload) -> None:
        self.work = work

    def __call__(self, output: Any, labels: Tensor) -> Tensor:
        losses = self.work.losses(output, labels)
        return losses if self.reduction == "none" else losses.mean()


def _private(
    work: Workload,
    mode: Mode,
    noise_multiplier: float,
    max_grad_norm: float,
    lr: float,
    names: dict[Tensor, str] | None = None,
) -> tuple[Any, Callable[[], None]]:
    """(optimiser, forward and backward); fills `names`."""
    from opacus import PrivacyEngine

    model = with_tables(work.model())
    if names is not None:
        names.update({parameter: name for name, parameter in model.named_parameters()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    # As many records as the batch: every Poisson draw is the whole batch, so all contenders do equal work.
    loader = DataLoader(TensorDataset(work.inputs, work.labels), batch_size=len(work.labels))
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    criterion = _Losses(work)
    made = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=optimizer,
        criterion=criterion,
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        grad_sample_mode=mode,
    )
    module, private_optimizer = made[0], made[1]
    loss = made[2] if mode == "ghost" else criterion
    return private_optimizer, lambda: loss(module(work.inputs), work.labels).backward()
