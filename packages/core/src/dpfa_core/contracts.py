"""What a plugin must offer, and the values that pass through its door."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from dpfa_core.checks import integer, one_of, require
from dpfa_core.events import Event
from dpfa_core.records import Record
from dpfa_core.spec import (
    CONTRACT_VERSION,
    AttentionProblem,
    Claim,
    NoisePlan,
    Norm,
    PrivacySpec,
    Reasons,
    Sensitivity,
    Tensor,
)

__all__ = [
    "CONTRACT_VERSION",
    "SUMMED_KEYS",
    "Accountant",
    "Backend",
    "CounterLayout",
    "Mechanism",
    "NoiseKey",
    "PlanTensors",
    "TensorMechanism",
    "Term",
]

PURPOSES = ("release", "training", "sampling")
GENERATORS = ("chacha20", "philox4x32-10")


@dataclass(frozen=True)
class NoiseKey:
    """The secret of one stream of noise; its words never show in ``repr`` and have no JSON.

    ``words`` is uint32[8] (Philox: [2]) and ``release`` uint64[1], both tensors on the device.
    """

    generator: Literal["chacha20", "philox4x32-10"]
    purpose: Literal["release", "training", "sampling"]
    words: Tensor = field(repr=False)
    release: Tensor = field(repr=False)
    secure: bool

    def __post_init__(self) -> None:
        one_of("generator", self.generator, GENERATORS)
        one_of("purpose", self.purpose, PURPOSES)


@dataclass(frozen=True)
class PlanTensors:
    """Public tensors of a noise structure; rows f are clipped by the norm of ``f @ whiten``.

    The output is ``(f @ project + z) @ mix.T``, the sum rounded before it is lifted, and without `project`
    ``f + z @ mix.T``: projecting f alone and adding lifted noise would leave f's rounding errors without noise.
    """

    project: Tensor = None
    mix: Tensor = None
    whiten: Tensor = None


STRIDE = re.compile(r"[A-Za-z0-9]+(\*[A-Za-z0-9]+)*")


@dataclass(frozen=True)
class Term(Record):
    """``((field >> low_bit) & (2**bits - 1)) * stride``; a stride multiplies integers and field counts."""

    field: str
    low_bit: int
    bits: int
    stride: str

    def __post_init__(self) -> None:
        integer("low_bit", self.low_bit, least=0)
        integer("bits", self.bits, least=1)
        good = isinstance(self.stride, str) and STRIDE.fullmatch(self.stride) is not None
        require(good, "stride must be a product of integers and names", self.stride)


@dataclass(frozen=True)
class CounterLayout(Record):
    """How coordinates become counter words and a lane, as data that a verifier can prove injective."""

    fields: tuple[tuple[str, int], ...]
    """(name, exclusive bound) of each coordinate."""
    words: tuple[tuple[Term, ...], ...]
    lane: tuple[Term, ...]


class Mechanism(Protocol):
    """How much noise a promise needs. The entry point is a callable with keyword parameters only."""

    contract_version: int
    name: str
    kind: Literal["additive", "selection"]
    norm: Norm

    def supports(self, spec: PrivacySpec, problem: AttentionProblem) -> Reasons:
        """Reasons against using this mechanism for this problem."""
        ...

    def calibrate(self, epsilon: float, delta: float) -> float:
        """The least noise multiplier of ONE release, rounded up."""
        ...

    def event(self, noise_multiplier: float) -> Event:
        """What one release with this noise multiplier costs."""
        ...

    def plan(
        self, sensitivity: Sensitivity, noise_multipliers: tuple[float, ...], problem: AttentionProblem
    ) -> NoisePlan:
        """The noise a backend has to add; one multiplier, or one for each query head."""
        ...

    def claims(self) -> tuple[Claim, ...]:
        """What the verifier must discharge."""
        ...


class SelectionMechanism(Protocol):
    """A mechanism of ``kind="selection"``: it picks one of several scored candidates."""

    contract_version: int
    name: str
    kind: Literal["additive", "selection"]
    norm: Norm

    def supports(self, spec: PrivacySpec, problem: AttentionProblem) -> Reasons: ...
    def calibrate(self, epsilon: float, delta: float) -> float: ...
    def event(self, noise_multiplier: float) -> Event: ...
    def claims(self) -> tuple[Claim, ...]: ...
    def select(
        self,
        scores: tuple[float, ...],
        sensitivity: float,
        epsilon: float,
        random_bits: Callable[[int], bytes],
    ) -> int: ...


class TensorMechanism(Protocol):
    """The slow path: noise on a finished tensor. Without ``dp_event`` its event is ``NonPrivate``."""

    def add_noise(self, tensor: Tensor, sensitivity: float, epsilon: float) -> Tensor: ...


class Accountant(Protocol):
    """Events in, epsilon out. The entry point is a class; ``Accountant()`` is empty."""

    contract_version: ClassVar[int]
    name: ClassVar[str]
    bound: ClassVar[Literal["exact", "certified", "upper", "interval"]]

    def supports(self, event: Event) -> Reasons: ...
    def compose(self, event: Event, count: int = 1) -> Accountant:
        """Add `event` `count` times, in place; ``UnsupportedEvent`` if there is no valid bound."""
        ...

    def epsilon(self, delta: float) -> float:
        """An upper bound, rounded up; infinity is allowed, NaN never."""
        ...

    def delta(self, epsilon: float) -> float: ...
    def state(self) -> dict[str, Any]:
        """JSON: the events, never an epsilon."""
        ...

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Accountant: ...


SUMMED_KEYS = 256
"""Keys that a release may add up in float32 one after the other. Longer sums are sums of sums of so many, so that no
term goes through more than ``SUMMED_KEYS + n / SUMMED_KEYS`` additions; what is left of each sensitivity for rounding
rests on it."""


class Backend(Protocol):
    """Computes attention and exactly the planned noise. The entry point is a callable without arguments.

    A backend offers the methods of the operations it lists in ``ops``: "release" (``release`` and
    ``release_backward``), "privatize" (``privatize_``), "training" (``sqnorm``, ``clipped_grad``,
    ``add_noise_``), and, where it can, "per_sample" (``per_sample_grad``,
    ``add_clipped_grad_``).
    """

    contract_version: int
    name: str
    ops: frozenset[str]

    def supports(self, op: str, problem: AttentionProblem | None, plan: NoisePlan | None) -> Reasons: ...
    def counter_layout(self, op: str) -> CounterLayout: ...
    def release(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        problem: AttentionProblem,
        plan: NoisePlan,
        tensors: PlanTensors,
        key: NoiseKey,
        *,
        softmax_scale: float,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """q, k, v (B, S, H, D) to (out in q's dtype, saved for backward); the LSE never leaves.

        Weights, and weighted values, are added up as ``SUMMED_KEYS`` says.

        `bias` comes only where the problem is ``biased``: (B or 1, H or 1, S, Sk) is added to the logits, of (B or 1,
        H) slopes minus the slope times the distance from the bottom-right diagonal.
        """
        ...

    def release_backward(self, dout: Tensor, saved: Any) -> tuple[Tensor, Tensor, Tensor]: ...
    def privatize_(
        self,
        x: Tensor,
        problem: AttentionProblem,
        plan: NoisePlan,
        tensors: PlanTensors,
        key: NoiseKey,
        *,
        clip_rows: bool,
    ) -> Tensor:
        """Clip (if asked) and noise x (B, S, H, D) in place; equal to the epilogue of ``release``."""
        ...

    def sqnorm(self, kind: str, saved: tuple[Any, ...], *, method: str = "auto") -> Tensor:
        """(B,) float32: an upper bound of each sample's squared gradient norm."""
        ...

    def clipped_grad(self, kind: str, saved: tuple[Any, ...], factors: Tensor) -> Tensor:
        """The sum over samples of ``factors[i]`` times the gradient of sample i, in float32."""
        ...

    def per_sample_grad(self, kind: str, saved: tuple[Any, ...]) -> Tensor:
        """[B, *shape]: every sample's gradient, for blocks of samples small enough to hold it."""
        ...

    def add_clipped_grad_(self, total: Tensor, kind: str, saved: tuple[Any, ...], factors: Tensor) -> Tensor:
        """``clipped_grad``, added to `total` in place."""
        ...

    def add_noise_(
        self,
        grad: Tensor,
        std: float,
        key: NoiseKey,
        *,
        parameter: int,
        step: int,
        first_element: int = 0,
    ) -> Tensor: ...


OPERATIONS: dict[str, tuple[str, ...]] = {
    "release": ("release", "release_backward"),
    "privatize": ("privatize_",),
    "training": ("sqnorm", "clipped_grad", "add_noise_"),
    "per_sample": ("per_sample_grad", "add_clipped_grad_"),
}
"""The methods a backend must have for each operation it lists."""
