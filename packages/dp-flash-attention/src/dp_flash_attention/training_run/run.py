"""``dpfa train`` from settings to a finished run folder."""

from __future__ import annotations

import copy
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dp_flash_attention.data.sources import load_task
from dp_flash_attention.data.task import Task
from dp_flash_attention.models import Recipe, StartingPoint, starting_point
from dp_flash_attention.training_run.curve import Curve, curve
from dp_flash_attention.training_run.loop import train_privately
from dp_flash_attention.training_run.progress import Screen
from dp_flash_attention.training_run.report import write_report
from dp_flash_attention.training_run.run_folder import CHECKPOINT, LEDGER, METRICS, PRIVACY, RESUME, RunFolder
from dp_flash_attention.training_run.settings import Settings
from dp_flash_attention.training_run.statement import Statement, state
from dp_flash_attention.training_run.utility import Utility, measure
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.ledger import Ledger
from dpfa_training import TrainingPlan, plan_for_target

Result = dict[str, Any]


def start_run(settings: Settings, out: Path | None, screen: Screen) -> Result:
    """A new run; bad input raises before the folder is made."""
    started = time.monotonic()
    task, start = _prepared(settings, screen)
    plan, steps = _plan(settings, start.recipe, len(task.train))
    folder = RunFolder.create(out or Path("runs") / f"{Path(task.name).stem}-{datetime.now():%Y%m%d-%H%M%S}")
    key = secrets.token_bytes(32)
    folder.write_json(
        RESUME,
        {
            "settings": settings.to_json(),
            "plan": plan.to_json(),
            "steps": steps,
            "digest_key": key.hex(),
            "digest": task.digest(key),
        },
    )
    return _finish(folder, settings, task, start, plan, steps, screen, started)


def resume_run(path: Path, screen: Screen) -> Result:
    """Go on with an interrupted run, with its own settings, data and ledger.

    Raises: PrivacyParameterError if the folder or the data are not those of an interrupted run.
    """
    started = time.monotonic()
    folder = RunFolder.unfinished(path)
    stored = folder.read_json(RESUME)
    settings = Settings.from_json(stored["settings"])
    task, start = _prepared(settings, screen)
    if task.digest(bytes.fromhex(stored["digest_key"])) != stored["digest"]:
        raise PrivacyParameterError(
            f"a run must be resumed on the data it was started with, got other records from {settings.data!r}; "
            "restore them, or start a new run."
        )
    plan, steps = TrainingPlan.from_json(stored["plan"]), int(stored["steps"])
    return _finish(folder, settings, task, start, plan, steps, screen, started)


def _prepared(settings: Settings, screen: Screen) -> tuple[Task, StartingPoint]:
    task = load_task(
        settings.data,
        text_column=settings.text_column,
        label_column=settings.label_column,
        seed=settings.public_seed,
    )
    with screen.task("public pre-training") as progress:
        start = starting_point(task, model=settings.model, seed=settings.public_seed, progress=progress)
    return task, start


def _plan(settings: Settings, recipe: Recipe, records: int) -> tuple[TrainingPlan, int]:
    batch_size = settings.batch_size or recipe.expected_batch_size
    if batch_size > records:
        raise PrivacyParameterError(
            f"--batch-size must not exceed the {records} training records, got {batch_size}; choose a smaller one."
        )
    steps = (settings.epochs or recipe.epochs) * -(-records // batch_size)
    plan = plan_for_target(
        target_epsilon=settings.epsilon,
        target_delta=settings.chosen_delta,
        steps=steps,
        max_grad_norm=recipe.max_grad_norm,
        population=records,
        expected_batch_size=batch_size,
    )
    return plan, steps


def _finish(
    folder: RunFolder,
    settings: Settings,
    task: Task,
    start: StartingPoint,
    plan: TrainingPlan,
    steps: int,
    screen: Screen,
    started: float,
) -> Result:
    delta = settings.chosen_delta
    if delta >= 1 / len(task.train):
        screen.warn(
            f"delta = {delta:g} is not below 1 / {len(task.train)} records: a mechanism that publishes one record "
            "in full would pass. Choose a smaller --delta."
        )
    if task.kind == "image" and not start.sources:
        screen.warn(
            "This vision transformer starts from scratch, without public pre-training: with a few thousand images "
            "noise leaves it near the majority class. Compare the baselines in the table."
        )
    module = copy.deepcopy(start.module)
    prices = curve(plan, steps, delta)
    with Ledger.open(
        folder / LEDGER, unit="example", relation=plan.relation, delta=delta, budget=settings.epsilon
    ) as ledger:
        with screen.training(steps, prices, settings.epsilon) as step_done:
            train_privately(
                module,
                start.encode(task.train),
                task.train.labels,
                plan=plan,
                recipe=start.recipe,
                steps=steps,
                ledger=ledger,
                folder=folder,
                seed=settings.seed,
                step_done=step_done,
            )
        statement = state(
            plan,
            ledger,
            secure=settings.seed is None,
            tuning=start.recipe.origin,
            sources=(*start.sources, *task.sources),
            not_covered=(*task.not_covered, *start.not_covered),
        )
    utility = measure(task, start, module, settings, screen)
    privacy = statement.to_json()
    privacy["weights_sha256"] = folder.write_weights(module.state_dict(), privacy)
    metrics = _metrics(task, start, statement, prices, utility) | {
        "settings": settings.to_json(),
        "seconds": time.monotonic() - started,
        "run": str(folder.path),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    folder.write_json(METRICS, metrics)
    folder.write_json(PRIVACY, privacy)
    write_report(folder)
    for name in (CHECKPOINT, RESUME):  # they hold what only an unfinished run needs
        (folder / name).unlink(missing_ok=True)
    return privacy | {name: metrics[name] for name in _RESULT}


_RESULT = (
    "test_accuracy",
    "test_accuracy_interval",
    "baseline_nonprivate",
    "baseline_majority",
    "baselines",
    "seconds",
    "run",
)


def _metrics(task: Task, start: StartingPoint, statement: Statement, prices: Curve, utility: Utility) -> dict[str, Any]:
    return {
        "data": task.name,
        "model": start.description,
        "statement": statement.in_words(),
        "test_accuracy": utility.accuracy,
        "test_accuracy_interval": list(utility.interval),
        "test_records": len(task.test),
        "baseline_nonprivate": utility.nonprivate,
        "baseline_majority": utility.majority,
        "baselines": utility.baselines(),
        "covered_by_epsilon": "none of these figures",
        "curve": {"steps": prices.steps, "epsilon": prices.epsilon, "by_accountant": dict(prices.by_accountant)},
    }
