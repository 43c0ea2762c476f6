"""The privacy statement of a run: what is promised, by what it is computed, and what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

from dp_flash_attention.data.task import Source
from dp_flash_attention.numbers import number
from dpfa_core.ledger import Ledger
from dpfa_core.spending import Spending, spending
from dpfa_training import NOT_COVERED, TrainingPlan

OWNER_ONLY = (
    "Test accuracy, its interval and all baselines are computed from the data without noise; they are for "
    "the owner of the data and are not covered by epsilon.",
)


@dataclass(frozen=True)
class Statement:
    """(epsilon, delta) with everything that the numbers depend on."""

    plan: TrainingPlan
    spent: Spending
    steps: int
    events: tuple[tuple[dict[str, Any], int], ...]
    secure: bool
    tuning: str
    not_covered: tuple[str, ...]
    data: str
    unit: str = "example"

    def to_json(self) -> dict[str, Any]:
        """The keys of ``privacy.json``."""
        return {
            "epsilon": self.spent.epsilon,
            "delta": self.spent.delta,
            "epsilons": dict(self.spent.by_accountant),
            "remarks": [f"{name}: {remark}" for name, remark in self.spent.remarks],
            "unit": self.unit,
            "relation": self.plan.relation,
            "steps": self.steps,
            "sampling_probability": self.plan.sampling_probability,
            "noise_multiplier": self.plan.noise_multiplier,
            "max_grad_norm": self.plan.max_grad_norm,
            "expected_batch_size": self.plan.expected_batch_size,
            "records": self.plan.population,
            "normaliser": "expected batch size, a public constant",
            "sampler": self.plan.sampling,
            "mechanism": "gaussian",
            "trust_boundary": "the trained weights leave; gradients, losses and data stay",
            "randomness": randomness(self.secure),
            "tuning": self.tuning,
            "data": self.data,
            "events": [{"event": event, "count": count} for event, count in self.events],
            "not_covered": list(self.not_covered),
            "versions": versions(),
        }

    def in_words(self) -> str:
        """One paragraph for people."""
        plan = self.plan
        return (
            f"Whoever sees these weights learns almost the same whether or not any one {self.unit} was in the "
            f"training data: epsilon = {number(self.spent.epsilon)} at delta = {self.spent.delta:g}, for adding or "
            f"removing one {self.unit}. {self.steps} steps were taken; each drew every one of the "
            f"{plan.population} records with probability {plan.sampling_probability:.4g}, clipped each "
            f"record's gradient to {plan.max_grad_norm:g} and added Gaussian noise of {plan.noise_multiplier:.4g} "
            "times that bound."
        )


def state(
    plan: TrainingPlan,
    ledger: Ledger,
    *,
    secure: bool,
    tuning: str,
    sources: tuple[Source, ...],
    not_covered: tuple[str, ...] = (),
) -> Statement:
    """Compute the statement from the ledger: the events that were recorded, not those planned."""
    events = tuple(ledger.events())
    delta = ledger.delta or 0.0
    return Statement(
        plan=plan,
        spent=spending(events, delta),
        steps=sum(count for _, count in events),
        events=tuple((event.to_json(), count) for event, count in events),
        secure=secure,
        tuning=tuning,
        not_covered=(*NOT_COVERED, *OWNER_ONLY, *not_covered),
        data="; ".join(f"{source.name}: {source.records} records, {source.visibility}" for source in sources),
    )


def randomness(secure: bool) -> str:
    """How the noise was keyed."""
    if secure:
        return "ChaCha20, key from the operating system"
    return "ChaCha20, key from a given seed: NOT SECURE, whoever knows the seed can subtract the noise"


def versions() -> dict[str, str]:
    """Versions of what computed and accounted for the run."""
    names = ("dp-flash-attention", "dpfa-core", "dpfa-training", "dpfa-accounting", "dpfa-kernels-torch")
    return {name: metadata.version(name) for name in (*names, "torch", "dp-accounting", "prv-accountant")}
