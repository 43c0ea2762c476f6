"""What one call promised and did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dpfa_core.spec import PrivacySpec, Relation, Unit

if TYPE_CHECKING:
    from dpfa_attention.pricing import PricedRelease


@dataclass(frozen=True, kw_only=True)
class PrivacyStats:
    """The statement of one release; every number in it is public, unless `private_diagnostics` were asked for.

    Guarantee: tested (`epsilon_spent` is priced by an accountant that did not choose the noise).
    """

    epsilon_spent: float
    """Of this call, at most the epsilon asked for; inf where there was no noise."""
    delta: float
    """Of this call, the end of the noise sampler included."""
    scope: Literal["release", "pending_step"] = "release"
    unit: Unit
    relation: Relation
    privacy_mechanism: str
    """The mechanism's own name, whatever alias it was asked by; "none" where there was no noise."""
    noise_multiplier: float
    """Gaussian: std / l2 sensitivity; Laplace: b / l1 sensitivity; 0 where there was none, or not in all heads."""
    noise_std: float
    """In output units; the largest over rows and heads."""
    backend: str
    event_id: str
    """The line of the ledger that this call was charged to."""
    secure_noise: bool
    """False where a seed was given: whoever knows it can subtract the noise."""
    grad_norm: float = math.nan
    """Private, and so NaN unless ``private_diagnostics=True``: the largest L2 norm of a value row before the clip."""
    head_epsilons: tuple[float, ...] = ()
    """What each head costs alone, rounded up, where `head_epsilons` were given; inf for one without noise."""
    head_noise_scales: tuple[float, ...] = ()
    """In output units, head by head, where `head_epsilons` were given; Gaussian: std, Laplace: b."""

    @classmethod
    def of(cls, spec: PrivacySpec, priced: PricedRelease, **more: Any) -> PrivacyStats:
        """The statement of a release on the terms of `spec`, with the noise that was `priced`."""
        return cls(
            delta=spec.delta,
            unit=spec.unit,
            relation=spec.relation,
            privacy_mechanism=priced.mechanism,
            noise_multiplier=priced.noise_multiplier,
            noise_std=priced.noise_std,
            **more,
        )
