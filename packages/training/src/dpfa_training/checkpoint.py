"""A training run on disk: weights, optimiser, sampler, partial sums and counters, written as one file.

The ledger is a file of its own and is the authority on what was spent. A run with a seed goes on exactly
where it stopped; steps that it lost are redone, and are charged again unless they are the same bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pickle
import platform
import random
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dpfa_core.checks import require
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.registry import BACKENDS
from dpfa_training.engine import Engine
from dpfa_training.sampling import Draws

FORMAT = 2

OWNER_ONLY = 0o600
"""A checkpoint inside a draw holds gradients without noise."""


def save_checkpoint(
    path: str | os.PathLike[str],
    engine: Engine,
    sampler: Draws,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write the run as it is, between steps or inside a draw, atomically (a crash leaves the file before).

    The file is readable by its owner only: it is not private. Keys are never written. `extra` holds tensors,
    numbers and strings of the caller's (a scheduler's state, the epoch).
    Raises: NotPrivateError while a batch is at hand that has not been through backward, or a last one without
    its step.
    """
    _check_kinds(engine, sampler)
    optimizer = engine.optimizer()
    state = {
        "format": FORMAT,
        "plan": fingerprint(engine),
        "binding": binding(engine, sampler),
        "module": engine.recording.module.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "engine": engine.state(),
        "sampler": sampler.state(),
        "random": _random_states(),
        "extra": extra or {},
    }
    target = Path(path)
    draft = target.with_suffix(target.suffix + ".part")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, OWNER_ONLY)
    with os.fdopen(descriptor, "wb") as file:
        draft.chmod(OWNER_ONLY)  # of a draft that was there before
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(target)
    _sync_folder(target.parent)


def load_checkpoint(path: str | os.PathLike[str], engine: Engine, sampler: Draws) -> dict[str, Any]:
    """Restore a run into a freshly attached engine with the same plan; returns `extra`.

    With the same seed, code and loader, noise, sampling and random states go on where they stopped, also
    inside a draw and an epoch, so the run equals one without interruption. Otherwise keys are fresh from the
    system, a begun draw or round is given up, and whatever is redone is charged again.

    Raises: PrivacyParameterError if the file is missing, damaged or of another plan or model; LedgerError if
    the engine's ledger does not hold what the run has spent.
    """
    _check_kinds(engine, sampler)
    try:
        state = torch.load(Path(path), weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise PrivacyParameterError(
            f"expected a checkpoint at {os.fspath(path)!r}, got {type(error).__name__}; "
            "start the run again, its ledger is kept."
        ) from error
    if state.get("format") != FORMAT or state.get("plan") != fingerprint(engine):
        raise PrivacyParameterError(
            f"the checkpoint {os.fspath(path)!r} must belong to the same plan and parameters, got another; "
            "resume with the settings the run was started with."
        )
    engine.restore(state["engine"])
    engine.recording.module.load_state_dict(state["module"])
    optimizer = engine.optimizer()
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    same = state["binding"] is not None and state["binding"] == binding(engine, sampler)
    sampler.restore(state["sampler"])
    if not same:
        engine.renew()
    _restore_random_states(state["random"])
    extra: dict[str, Any] = state["extra"]
    return extra


def _check_kinds(engine: Any, sampler: Any) -> None:
    require(isinstance(engine, Engine), "engine must be engine_of(module)", type(engine).__name__)
    remedy = 'With sampling="none" there is nothing to resume privately: use torch.save.'
    require(isinstance(sampler, Draws), "sampler must be that of a private loader", type(sampler).__name__, remedy)


def fingerprint(engine: Engine) -> str:
    """SHA-256 over the plan and the names, shapes and order of the trainable parameters."""
    shapes = [(name, list(p.shape)) for name, p in engine.recording.parameters.items()]
    text = json.dumps([engine.plan.to_json(), shapes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def binding(engine: Engine, sampler: Draws) -> str | None:
    """What the counter of the noise is bound to: key, data, code and machine; None if the key cannot come back.

    It is keyed, so that it tells nothing of the seed or the grouping to who cannot guess the key.
    """
    if engine.keys.secure:
        return None
    parts = {
        "plan": fingerprint(engine),
        "users": sampler.users.digest() if sampler.users else "",
        "rows": sampler.max_rows if isinstance(sampler.max_rows, int | None) else "auto",
        "workers": sampler.workers,
        "data": sampler.data,
        "versions": _versions(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "backend": (engine.backend_name, BACKENDS.entry(engine.backend_name).version),
    }
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), key=engine.secret(), digest_size=32).hexdigest()


@functools.cache
def _versions() -> tuple[str, ...]:
    return tuple(metadata.version(name) for name in ("dpfa-training", "dpfa-kernels-torch", "torch", "numpy"))


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = (name, keys.tolist(), *rest)
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    version, words, following = states["python"]
    random.setstate((version, tuple(words), following))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    if "numpy" in states:
        import numpy as np

        name, keys, *rest = states["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def _sync_folder(folder: Path) -> None:
    # The new name is durable once its folder is; not every system lets a folder be opened.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
