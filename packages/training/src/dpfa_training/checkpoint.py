"""A training run on disk: weights, optimiser, sampler position and noise counter, written as one file.

The ledger is a file of its own and is the authority on what was spent: where it knows of more steps than
the checkpoint, those steps are redone under a fresh key and charged again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from dpfa_core.errors import NotPrivateError, PrivacyParameterError
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_training.engine import Engine
from dpfa_training.sampling import PoissonSampler

FORMAT = 1


def save_checkpoint(
    path: str | os.PathLike[str],
    engine: Engine,
    sampler: PoissonSampler,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write the run after its last whole step, atomically (a crash leaves the file before).

    Keys are never written. `extra` holds tensors, numbers and strings of the caller's.
    Raises: NotPrivateError in the middle of a draw.
    """
    if engine.in_draw:
        raise NotPrivateError("a checkpoint must be taken between steps, got one inside a draw; step first.")
    optimizer = engine.optimizer()
    state = {
        "format": FORMAT,
        "plan": fingerprint(engine),
        "module": engine.recording.module.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "steps": engine.steps,
        "position": sampler.position,
        "extra": extra or {},
    }
    target = Path(path)
    draft = target.with_suffix(target.suffix + ".part")
    with draft.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(target)


def load_checkpoint(path: str | os.PathLike[str], engine: Engine, sampler: PoissonSampler) -> dict[str, Any]:
    """Restore a run into a freshly attached engine with the same plan; returns `extra`.

    With a seed, and a ledger that agrees on the number of steps, noise and sampling go on where they
    stopped, so the run equals one without interruption. Otherwise the keys are fresh from the system.

    Raises: PrivacyParameterError if the file is missing, damaged or of another plan or model.
    """
    try:
        state = torch.load(Path(path), weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise PrivacyParameterError(
            f"expected a checkpoint at {os.fspath(path)!r}, got {type(error).__name__}; "
            "start the run again, its ledger is kept."
        ) from error
    if state.get("format") != FORMAT or state.get("plan") != fingerprint(engine):
        raise PrivacyParameterError(
            f"the checkpoint {os.fspath(path)!r} must belong to the same plan and parameters, got another; "
            "resume with the settings the run was started with."
        )
    engine.recording.module.load_state_dict(state["module"])
    optimizer = engine.optimizer()
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    engine.steps, sampler.position = state["steps"], state["position"]
    recorded = sum(release.count for release in engine.ledger.releases() if release.purpose == "training")
    if recorded != engine.steps:
        fresh = KeySource()
        engine.keys = fresh
        sampler.keys = fresh
    extra: dict[str, Any] = state["extra"]
    return extra


def fingerprint(engine: Engine) -> str:
    """SHA-256 over the plan and the names, shapes and order of the trainable parameters."""
    shapes = [(name, list(p.shape)) for name, p in engine.recording.parameters.items()]
    text = json.dumps([engine.plan.to_json(), shapes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
