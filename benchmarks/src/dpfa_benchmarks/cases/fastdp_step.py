"""The same step by fastDP (book-keeping, ``clipping_mode="MixOpt"``), imported from a checkout of it."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpfa_benchmarks.case import Step, sentence
from dpfa_benchmarks.cases.for_peers import by_our_names, with_tables
from dpfa_benchmarks.cases.one_by_one import Gradients
from dpfa_benchmarks.workloads import Workload

MISSING = "no checkout given: --peer-path DIR"


def unavailable(peer_path: str) -> str:
    """Why fastDP cannot run; empty if it can."""
    if not peer_path:
        return MISSING
    folder = Path(peer_path).resolve()
    if not (folder / "fastDP").is_dir():
        return f"no folder fastDP in {peer_path}"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import fastDP  # noqa: F401
    except Exception as error:
        return f"cannot be imported: {sentence(error)}"
    return ""


def version() -> str:
    """Of the checkout that ``unavailable`` found; empty without one."""
    return str(getattr(sys.modules.get("fastDP"), "__version__", ""))


def build(work: Workload, *, noise_multiplier: float, max_grad_norm: float, lr: float) -> Step:
    """A step from the batch in memory to changed parameters."""
    _, optimizer, backward = _private(work, noise_multiplier, max_grad_norm, lr)

    def step() -> None:
        backward()
        optimizer.step()

    return step


def clipped_sum(work: Workload, max_grad_norm: float) -> Gradients:
    """The clipped gradient sum before it is divided by the batch size.

    Raises: ValueError naming the parameters that it left without one.
    """
    model, _, backward = _private(work, 0.0, max_grad_norm, 0.0)
    backward()
    parameters = dict(model.named_parameters())
    left_out = [name for name, parameter in parameters.items() if not hasattr(parameter, "private_grad")]
    if left_out:
        raise ValueError(f"no private gradient for {', '.join(left_out)}.")
    return by_our_names({name: parameter.private_grad for name, parameter in parameters.items()})  # type: ignore[attr-defined]


def _private(
    work: Workload, noise_multiplier: float, max_grad_norm: float, lr: float
) -> tuple[nn.Module, Any, Callable[[], None]]:
    from fastDP import PrivacyEngine

    model = with_tables(work.model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    with contextlib.redirect_stdout(io.StringIO()):
        engine = PrivacyEngine(
            model,
            batch_size=len(work.labels),
            sample_size=len(work.labels),
            epochs=1,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            clipping_fn="Abadi",
            clipping_mode="MixOpt",
            clipping_style="all-layer",
            loss_reduction="mean",
        )
        engine.attach(optimizer)
    return model, optimizer, lambda: work.loss(model).backward()
