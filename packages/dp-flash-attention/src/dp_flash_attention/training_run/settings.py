"""What the user asked of ``dpfa train``: kept in the run folder, so that a run can be resumed."""

from __future__ import annotations

from dataclasses import dataclass

from dpfa_core.checks import fraction, integer, positive
from dpfa_core.records import Record

DIGITS_DELTA, DELTA = 1e-4, 1e-5


@dataclass(frozen=True, kw_only=True)
class Settings(Record):
    """Options of one run; None stands for the recipe's value.

    Raises: PrivacyParameterError naming the option.
    """

    data: str = "digits"
    model: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    epsilon: float = 3.0
    delta: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        positive("--epsilon", self.epsilon, remedy="A private run needs a finite budget.")
        if self.delta is not None:
            fraction("--delta", self.delta, zero=False, remedy="A usual choice is below 1 / number of records.")
        for name, value in (("--epochs", self.epochs), ("--batch-size", self.batch_size)):
            if value is not None:
                integer(name, value, least=1)
        if self.seed is not None:
            integer("--seed", self.seed, least=0)

    @property
    def chosen_delta(self) -> float:
        """The delta given, or 1e-4 for the bundled digits and 1e-5 for everything else."""
        if self.delta is not None:
            return self.delta
        return DIGITS_DELTA if self.data == "digits" else DELTA

    @property
    def public_seed(self) -> int:
        """Seed of what may be public: the split, the initial weights."""
        return self.seed or 0
