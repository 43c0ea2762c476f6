"""The engine that guards a module's parameters, known by the mark it leaves on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from dpfa_attention.privacy_spent import PrivacySpent
from dpfa_core.errors import NotPrivateError
from dpfa_core.ledger import Ledger

ENGINE = "_dpfa_engine"
"""The attribute of a guarded parameter: a weak reference to its engine."""


def guarding_engine(parameters: Iterable[Tensor]) -> Any:
    """The engine of the trainable ones of `parameters`, or None where one of them has none."""
    found: Any = None
    for parameter in parameters:
        if parameter.requires_grad:
            # while an engine records a forward, stand-ins with an `original` take the place of parameters
            guarded = getattr(parameter, "original", parameter)
            reference: Callable[[], Any] | None = getattr(guarded, ENGINE, None)
            found = None if reference is None else reference()
            if found is None:
                return None
    return found


def spent_by(engine: Any, delta: float | None, default_delta: float, forward_count: int) -> PrivacySpent:
    """What the steps of `engine` cost so far, at `delta`, its ledger's own, or the default.

    Raises: NotPrivateError where there is no engine.
    """
    if engine is None:
        raise NotPrivateError(
            'setting="training" spends at the steps of an engine, got none; call make_private on the model first.'
        )
    ledger: Ledger = engine.ledger
    at = next(x for x in (delta, ledger.delta, default_delta) if x is not None)
    epsilon = ledger.spent(at)
    lines = [line.id for line in ledger.releases()]
    return PrivacySpent(
        total_epsilon=epsilon,
        total_delta=at,
        lifetime_epsilon=epsilon,
        ledger_epsilon=epsilon,
        privacy_mechanism="dp_sgd",
        composition_method="auto",
        forward_count=forward_count,
        unit=ledger.unit,
        relation=ledger.relation,
        event_id=lines[-1] if lines else None,
    )
