"""What the steps of one run cost, and which of them were paid or taken before a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from dpfa_core.errors import BudgetExhausted, LedgerError
from dpfa_core.ledger import Ledger
from dpfa_training.plan import TrainingPlan
from dpfa_training.step_journal import StepJournal


class Charges:
    """Writes the ledger's lines of one run: one for each step, or for each round where draws share decisions.

    Guarantee: tested. Nothing is taken before it is on the ledger; a step that is redone bit for bit under the
    same noise is the same value and is not charged twice; every other one is.

    Args:
        planned_steps: steps that the noise was calibrated for, or None.
        secret: of the digests in the journal, where the noise comes from a seed and can be repeated; else None.
    """

    def __init__(
        self, ledger: Ledger, plan: TrainingPlan, *, backend: str, planned_steps: int | None, secret: bytes | None
    ) -> None:
        self.ledger, self.plan, self.backend, self.planned_steps = ledger, plan, backend, planned_steps
        self.run = os.urandom(8).hex()
        """Name of this run in the ledger, so that another run's lines are never taken for its own."""
        self.made = 0
        """Charges that steps of this run stand on, lost ones included."""
        self._prepaid = 0
        self._round: int | None = None
        self._secret = secret
        self._journal: StepJournal | None = None

    @property
    def purpose(self) -> str:
        """The purpose on the ledger's lines."""
        return f"training {self.run}"

    def recorded(self) -> int:
        """Charges of this run that the ledger holds."""
        return sum(release.count for release in self.ledger.releases() if release.purpose == self.purpose)

    def admits(self, step: int, sums: Mapping[str, torch.Tensor]) -> bool:
        """Whether the noise of `step` may be added to `sums`: it was never used, or on the same bits."""
        if self._secret is None or not self.plan.noisy or self.ledger.path == ":memory:":
            return True
        if self._journal is None:
            self._journal = StepJournal(f"{self.ledger.path}.steps", self._secret)
        return self._journal.admits(step, json.dumps(self.plan.to_json(), sort_keys=True), sums)

    @property
    def prepaid(self) -> int:
        """Charges on the ledger of steps that were lost and may be redone bit for bit."""
        return self._prepaid

    def pay(self, round_: int, steps: int) -> None:
        """Make sure that the step of `round_` is on the ledger; `steps` were taken before it.

        Raises: BudgetExhausted, LedgerError; nothing may be released then.
        """
        more_than_planned = self.planned_steps is not None and steps >= self.planned_steps
        paid = self.plan.steps_per_charge > 1 and self._round == round_
        if self.planned_steps is not None and not paid:
            more_than_planned |= self.made >= self.plan.charges(self.planned_steps)
        if more_than_planned:
            raise BudgetExhausted(
                f"the noise was calibrated for {self.planned_steps} steps and all are taken; nothing was "
                "released. Stop here, or plan more epochs from the start."
            )
        if paid:
            return
        if self._prepaid:
            self._prepaid -= 1
        else:
            self.ledger.record(self.plan.event(), purpose=self.purpose, mechanism="gaussian", backend=self.backend)
        self.made, self._round = self.made + 1, round_

    def renew(self) -> None:
        """Keys are fresh: whatever is redone is charged again."""
        self.made += self._prepaid
        self._prepaid, self._round, self._secret = 0, None, None

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"run": self.run, "made": self.made, "round": self._round}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the run of `state`, whose ledger may know of charges made after it.

        Raises: LedgerError if the ledger does not hold what the run has spent.
        """
        self.run, self.made, self._round = state["run"], state["made"], state["round"]
        recorded = self.recorded()
        if recorded < self.made:
            raise LedgerError(
                f"the ledger must hold the {self.made} charges of the run that is resumed, got {recorded}; open "
                "the run's own ledger with Ledger.open."
            )
        self._prepaid = recorded - self.made
