"""The same step by Opacus, with per-sample gradients kept ("hooks") or with two backwards ("ghost")."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpfa_benchmarks.case import Step
from dpfa_benchmarks.cases.one_by_one import Gradients
from dpfa_benchmarks.cases.workload import Workload

Mode = Literal["hooks", "ghost"]
MISSING = 'not installed: pip install -e "benchmarks[opacus]"'


def unavailable() -> str:
    """Why Opacus cannot run; empty if it can."""
    return "" if find_spec("opacus") else MISSING


def build(work: Workload, mode: Mode, *, noise_multiplier: float, max_grad_norm: float, lr: float) -> Step:
    """A step from the batch in memory to changed parameters."""
    model, optimizer, criterion = _private(work, mode, noise_multiplier, max_grad_norm, lr)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(work.inputs), work.labels).backward()
        optimizer.step()

    return step


def clipped_sum(work: Workload, mode: Mode, max_grad_norm: float) -> Gradients:
    """The clipped gradient sum as Opacus hands it to its noise."""
    model, optimizer, criterion = _private(work, mode, 0.0, max_grad_norm, 0.0)
    optimizer.zero_grad()
    criterion(model(work.inputs), work.labels).backward()
    if mode == "hooks":
        optimizer.clip_and_accumulate()
    else:
        optimizer.accumulate()
    inner = model._module
    return {_our_name(name): p.summed_grad.reshape(_our_shape(name, p)) for name, p in inner.named_parameters()}


def _private(work: Workload, mode: Mode, noise_multiplier: float, max_grad_norm: float, lr: float) -> tuple[Any, ...]:
    from opacus import PrivacyEngine

    model = with_position_table(work.model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    # As many records as the batch: every Poisson draw is the whole batch, so all contenders do equal work.
    loader = DataLoader(TensorDataset(work.inputs, work.labels), batch_size=len(work.labels))
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    made = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        grad_sample_mode=mode,
    )
    if mode == "hooks":
        return made[0], made[1], F.cross_entropy
    return made[0], made[1], made[2]


def with_position_table(model: nn.Module) -> nn.Module:
    """The same function with ``positions`` read from an Embedding.

    Opacus has no rule for a bare parameter beside sub-modules and would run the whole model through
    ``torch.func.vmap``; an Embedding is what its users write.
    """
    positions: Tensor = model.positions.detach()  # type: ignore[assignment, operator]
    del model.positions
    _, length, width = positions.shape
    model.position_table = nn.Embedding(length, width)
    model.position_table.weight.data.copy_(positions[0])

    def look_up(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = torch.arange(length, device=args[0].device).repeat(len(args[0]), 1)
        module.positions = module.position_table(rows)  # type: ignore[operator]

    model.register_forward_pre_hook(look_up)
    return model


def _our_name(name: str) -> str:
    return "positions" if name == "position_table.weight" else name


def _our_shape(name: str, parameter: Tensor) -> tuple[int, ...]:
    shape = tuple(parameter.shape)
    return (1, *shape) if name == "position_table.weight" else shape
