"""A private training step against the plain step and against other ways to make it private."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpfa_benchmarks.case import Contender, Step
from dpfa_benchmarks.cases import fastdp_step, one_by_one, opacus_step
from dpfa_benchmarks.cases.one_by_one import Gradients
from dpfa_benchmarks.workloads import Workload, model_of
from dpfa_core.ledger import Ledger
from dpfa_training import engine_of, make_private

Rows = int | str
"""Rows that ours takes at a time: 0 for all, or "auto"."""


class PrivateStep:
    """Timed: from a batch in memory to changed parameters (AdamW), the same rows for everybody.

    Ours includes its Poisson draw, ChaCha20 noise and one durable ledger entry for each step.

    Parameters: `model`, one of ``workloads.MODELS``; `batch`, 0 for the model's own; `physical_batch`, rows that
    ours takes at a time, 0 for all, "auto", or a list, whose first is "dpfa" and whose others are contenders
    beside it; `peer_path`, a checkout of fastDP; `toy`, the model at a size for tests.
    """

    name = "private_step"
    step = "one optimiser step on the whole batch"
    ours = "dpfa"
    tolerance = 1e-5
    peers: tuple[str, ...] = ("opacus", "transformers")
    defaults: Mapping[str, Any] = {
        "model": "vit",
        "batch": 0,
        "physical_batch": 0,
        "noise_multiplier": 1.0,
        "max_grad_norm": 0.5,
        "learning_rate": 1e-3,
        "one_by_one": True,
        "peer_path": "",
        "toy": False,
    }
    toy: Mapping[str, Any] = {"batch": 6, "toy": True}

    def settled(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {**parameters, "batch": parameters["batch"] or model_of(parameters["model"]).batch}

    def contenders(self, parameters: Mapping[str, Any]) -> tuple[Contender, ...]:
        parameters = self.settled(parameters)
        work = model_of(parameters["model"]).build(parameters["batch"], parameters["toy"])
        clip, noise, lr = (parameters[key] for key in ("max_grad_norm", "noise_multiplier", "learning_rate"))
        settings = {"noise_multiplier": noise, "max_grad_norm": clip, "lr": lr}
        exact: list[Gradients] = []

        def error(found: Gradients) -> float:
            if not exact:
                exact.append(one_by_one.truth(work, clip))
            return one_by_one.relative_error(found, exact[0])

        def ours(rows: Rows, name: str) -> Contender:
            return Contender(
                name=name,
                what="make_private: draw, forward, one backward, flat clip, ChaCha20 noise, ledger entry on disk"
                + in_parts(rows),
                build=lambda: build_ours(work, rows, **settings),
                private=True,
                ours=True,
                error=lambda: error(our_clipped_sum(work, rows, clip)),
            )

        def opacus(mode: opacus_step.Mode) -> Contender:
            return Contender(
                name=f"opacus_{mode}",
                what=f"Opacus, grad_sample_mode='{mode}', torch.normal noise, no draw, no ledger",
                build=lambda: opacus_step.build(work, mode, **settings),
                private=True,
                error=lambda: error(opacus_step.clipped_sum(work, mode, clip)),
                unavailable=opacus_step.unavailable(),
            )

        no_fastdp = fastdp_step.unavailable(parameters["peer_path"])
        asked = parameters["physical_batch"]
        first, *others = asked if isinstance(asked, list) else [asked]
        return (
            Contender(
                name="plain",
                what="the same step without privacy",
                build=lambda: build_plain(work, lr),
                private=False,
            ),
            ours(first, self.ours),
            *(ours(rows, f"{self.ours}_rows_{rows or 'all'}") for rows in others),
            Contender(
                name="one_by_one",
                what="autograd on one sample at a time, sums kept in place, torch.normal noise, no draw, no ledger",
                build=lambda: one_by_one.build(work, **settings),
                private=True,
                error=lambda: error(one_by_one.clipped_sum(work.model(), work, clip)),
                unavailable="" if parameters["one_by_one"] else "left out by one_by_one=false",
            ),
            *(opacus(mode) for mode in opacus_step.MODES),
            Contender(
                name="fastdp",
                what=f"fastDP {fastdp_step.version()}".strip()
                + ", clipping_mode='MixOpt', torch.normal noise, no draw, no ledger",
                build=lambda: fastdp_step.build(work, **settings),
                private=True,
                error=lambda: error(fastdp_step.clipped_sum(work, clip)),
                unavailable=no_fastdp,
            ),
        )


def in_parts(rows: Rows) -> str:
    if not rows:
        return ""
    return ", rows at a time chosen from memory" if rows == "auto" else f", {rows} rows at a time"


def build_plain(work: Workload, lr: float) -> Step:
    model = work.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def step() -> None:
        optimizer.zero_grad()
        work.loss(model).backward()
        optimizer.step()

    return step


def build_ours(work: Workload, rows: Rows, *, noise_multiplier: float, max_grad_norm: float, lr: float) -> Step:
    folder = tempfile.TemporaryDirectory(prefix="dpfa-bench-")
    path = Path(folder.name) / "ledger.db"
    ledger = Ledger.open(path, unit="example", relation="add_or_remove", delta=1e-5)
    _, one_step = _ours(work, rows, noise_multiplier, max_grad_norm, lr, ledger)

    def step() -> None:
        assert folder is not None  # noqa: S101  (the folder lives as long as the step)
        one_step()

    return step


def our_clipped_sum(work: Workload, rows: Rows, max_grad_norm: float) -> Gradients:
    """What one step of the very loop that is timed hands to the optimiser without noise, times the batch size."""
    ledger = Ledger.memory(unit="example", relation="add_or_remove")
    model, step = _ours(work, rows, 0.0, max_grad_norm, 0.0, ledger)
    step()
    return {name: p.grad * len(work.labels) for name, p in model.named_parameters() if p.grad is not None}


def _ours(
    work: Workload, rows: Rows, noise_multiplier: float, max_grad_norm: float, lr: float, ledger: Ledger
) -> tuple[nn.Module, Step]:
    model = work.model()
    # As many records as the batch: every Poisson draw is the whole batch, so all contenders do equal work.
    model, optimizer, loader = make_private(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=lr),
        data_loader=DataLoader(TensorDataset(work.inputs, work.labels), batch_size=len(work.labels)),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        max_physical_batch_size=rows or None,  # type: ignore[arg-type]
        ledger=ledger,
    )
    engine, draws = engine_of(model), loader.sampler
    model.train()

    def step() -> None:
        # What the private loader does, without its collation: the rows are in memory for everybody.
        for part in draws.batches(1):
            draws.reached(part)
            engine.announce(part)
            labels = taken(work.labels, part.indices)
            work.losses(model(taken(work.inputs, part.indices)), labels).mean().backward()
            optimizer.step()

    return model, step


def taken(rows: Tensor, indices: tuple[int, ...]) -> Tensor:
    return rows if len(indices) == len(rows) else rows[list(indices)]
