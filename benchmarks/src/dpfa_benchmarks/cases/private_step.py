"""A private training step of the main job against the plain step and against other ways to make it private."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpfa_benchmarks.case import Contender, Step
from dpfa_benchmarks.cases import one_by_one, opacus_step
from dpfa_benchmarks.cases.one_by_one import Gradients
from dpfa_benchmarks.cases.workload import Workload, workload
from dpfa_core.ledger import Ledger
from dpfa_training import engine_of, make_private


class PrivateStep:
    """Timed: from a batch in memory to changed parameters (AdamW), the same rows for everybody.

    Ours includes its Poisson draw, ChaCha20 noise and one durable ledger entry for each step.
    """

    name = "private_step"
    step = "one optimiser step on the whole batch"
    ours = "dpfa"
    tolerance = 1e-5
    peers: tuple[str, ...] = ("opacus",)
    defaults: Mapping[str, Any] = {
        "model": "vit",
        "batch": 500,
        "noise_multiplier": 1.0,
        "max_grad_norm": 0.5,
        "learning_rate": 1e-3,
        "one_by_one": True,
    }
    toy: Mapping[str, Any] = {"batch": 6}

    def contenders(self, parameters: Mapping[str, Any]) -> tuple[Contender, ...]:
        work = workload(parameters["model"], parameters["batch"])
        clip, noise, lr = (parameters[key] for key in ("max_grad_norm", "noise_multiplier", "learning_rate"))
        settings = {"noise_multiplier": noise, "max_grad_norm": clip, "lr": lr}
        exact: list[Gradients] = []

        def error(found: Gradients) -> float:
            if not exact:
                exact.append(one_by_one.truth(work, clip))
            return one_by_one.relative_error(found, exact[0])

        opacus = opacus_step.unavailable()
        one = "" if parameters["one_by_one"] else "left out by one_by_one=false"
        return (
            Contender(
                name="plain",
                what="the same step without privacy",
                build=lambda: build_plain(work, lr),
                private=False,
            ),
            Contender(
                name="dpfa",
                what="make_private: draw, forward, one backward, flat clip, ChaCha20 noise, ledger entry on disk",
                build=lambda: build_ours(work, **settings),
                private=True,
                error=lambda: error(our_clipped_sum(work, clip)),
            ),
            Contender(
                name="opacus_ghost",
                what="Opacus, grad_sample_mode='ghost', torch.normal noise, no draw, no ledger",
                build=lambda: opacus_step.build(work, "ghost", **settings),
                private=True,
                error=lambda: error(opacus_step.clipped_sum(work, "ghost", clip)),
                unavailable=opacus,
            ),
            Contender(
                name="opacus_hooks",
                what="Opacus, grad_sample_mode='hooks', torch.normal noise, no draw, no ledger",
                build=lambda: opacus_step.build(work, "hooks", **settings),
                private=True,
                error=lambda: error(opacus_step.clipped_sum(work, "hooks", clip)),
                unavailable=opacus,
            ),
            Contender(
                name="one_by_one",
                what="autograd on one sample at a time, torch.randn noise, no draw, no ledger",
                build=lambda: build_one_by_one(work, **settings),
                private=True,
                error=lambda: error(one_by_one.clipped_sum(work.model(), work, clip)),
                unavailable=one,
            ),
        )


def build_plain(work: Workload, lr: float) -> Step:
    model = work.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def step() -> None:
        optimizer.zero_grad()
        work.loss(model).backward()
        optimizer.step()

    return step


def build_ours(work: Workload, *, noise_multiplier: float, max_grad_norm: float, lr: float) -> Step:
    folder = tempfile.TemporaryDirectory(prefix="dpfa-bench-")
    path = Path(folder.name) / "ledger.db"
    ledger = Ledger.open(path, unit="example", relation="add_or_remove", delta=1e-5)
    _, one_step = _ours(work, noise_multiplier, max_grad_norm, lr, ledger)

    def step() -> None:
        assert folder is not None  # noqa: S101  (the folder lives as long as the step)
        one_step()

    return step


def our_clipped_sum(work: Workload, max_grad_norm: float) -> Gradients:
    """What one step of the very loop that is timed hands to the optimiser without noise, times the batch size."""
    ledger = Ledger.memory(unit="example", relation="add_or_remove")
    model, step = _ours(work, 0.0, max_grad_norm, 0.0, ledger)
    step()
    return {name: p.grad * len(work.labels) for name, p in model.named_parameters() if p.grad is not None}


def _ours(
    work: Workload, noise_multiplier: float, max_grad_norm: float, lr: float, ledger: Ledger
) -> tuple[nn.Module, Step]:
    model = work.model()
    # As many records as the batch: every Poisson draw is the whole batch, so all contenders do equal work.
    model, optimizer, loader = make_private(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=lr),
        data_loader=DataLoader(TensorDataset(work.inputs, work.labels), batch_size=len(work.labels)),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        ledger=ledger,
    )
    engine = engine_of(model)
    model.train()

    def step() -> None:
        (batch,) = loader.sampler.draw()
        engine.announce(batch)
        F.cross_entropy(model(work.inputs), work.labels).backward()
        optimizer.step()

    return model, step


def build_one_by_one(work: Workload, *, noise_multiplier: float, max_grad_norm: float, lr: float) -> Step:
    model = work.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def step() -> None:
        sums = one_by_one.clipped_sum(model, work, max_grad_norm)
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * (noise_multiplier * max_grad_norm)
            parameter.grad = (sums[name] + noise) / len(work.labels)
        optimizer.step()

    return step
