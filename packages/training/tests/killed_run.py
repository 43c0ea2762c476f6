"""A small training run in a process of its own, which may kill itself between any two of its effects."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfa_training
from dpfa_core.ledger import Ledger
from dpfa_training import engine_of, load_checkpoint, make_private, save_checkpoint
from dpfa_training.charges import Charges
from dpfa_training.engine import Engine
from dpfa_training.step_journal import StepJournal

DRAWS, RECORDS = 8, 30


def run(folder: str, workers: int, sampling: str, kill_at: int | None) -> None:
    """Train, or go on, to the end; SIGKILL at the effect number `kill_at`, if any."""
    place = Path(folder)
    torch.set_num_threads(1)
    if kill_at is not None:
        _kill_at(kill_at)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    data = TensorDataset(torch.randn(RECORDS, 6), torch.randint(0, 3, (RECORDS,)))
    ledger = Ledger.open(place / "ledger.db", unit="example", relation="add_or_remove", delta=1e-5)
    module, opt, loader = make_private(
        module=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=0.01),
        data_loader=DataLoader(
            data, batch_size=10, num_workers=workers, multiprocessing_context="fork" if workers else None
        ),
        noise_multiplier=1.0,
        max_grad_norm=0.5,
        max_physical_batch_size=4,
        ledger=ledger,
        seed=4,
        sampling=sampling,
    )
    engine, path = engine_of(module), place / "run.pt"
    if path.exists():
        load_checkpoint(path, engine, loader.sampler)
    else:
        save_checkpoint(path, engine, loader.sampler)
    while engine.steps < DRAWS:
        for count, (x, y) in enumerate(loader.draws(DRAWS - engine.steps)):
            nn.functional.cross_entropy(module(x), y).backward()
            opt.step()
            if count % 3 == 0:  # not after each batch: whole steps are lost, too
                save_checkpoint(path, engine, loader.sampler)
    torch.save({"weights": module.state_dict(), "secure": engine.keys.secure}, place / "end.pt")
    ledger.close()


def _kill_at(number: int) -> None:
    """Count what lies around every durable write and every noise; die at `number`."""
    count = itertools.count()

    def tick() -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            tick()
            found = inner(*args, **kwargs)
            tick()
            return found

        setattr(owner, name, counted)

    around(StepJournal, "write")
    around(Charges, "pay")
    around(Ledger, "record")
    around(Engine, "_noised")
    around(Engine, "_clip")
    around(torch, "save")
    around(Path, "replace")
    assert dpfa_training.checkpoint.torch is torch
