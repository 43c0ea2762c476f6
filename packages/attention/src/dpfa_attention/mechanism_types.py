"""The mechanisms that a module takes, by name, and how to make one."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from dpfa_attention.options import resolve
from dpfa_core.plugin_names import parts
from dpfa_core.registry import MECHANISMS


class PrivacyMechanismType(StrEnum):
    """Every first-party name and alias; each is a string, and says the same as that string."""

    GAUSSIAN = "gaussian"
    PLD = "pld"
    """gaussian, priced by privacy loss distributions."""
    STANDARD = "standard"
    """gaussian, priced by RDP."""
    RENYI_GAUSSIAN = "renyi_gaussian"
    """gaussian, priced by RDP."""
    LAPLACE = "laplace"
    LAPLACIAN = "laplacian"
    """laplace."""
    DISCRETE_GAUSSIAN = "discrete_gaussian"
    STRUCTURED_NOISE = "structured_noise"
    """The `noise_structure` given beside it, or low_rank."""
    LOW_RANK = "low_rank"
    SPARSE = "sparse"
    BLOCK_DIAGONAL = "block_diagonal"
    ATTENTION_AWARE = "attention_aware"
    EXPONENTIAL = "exponential"
    """Selects and adds no noise: no module releases with it."""


def create_research_mechanism(
    mechanism_type: PrivacyMechanismType | str, *, noise_structure: str | None = None, **parameters: Any
) -> Any:
    """The mechanism of a name or alias, from the registry, which calibrates, plans and states the event of one release.

    Guarantee: as of the mechanism.
    Args: `mechanism_type`, an installed name, third-party ones included, or an alias, also with parameters,
        "low_rank(rank=8)"; `noise_structure` as in ``dp_flash_attn_func``; `parameters` of the mechanism.
    Raises: PluginError for a name that is not installed; PrivacyParameterError for parameters or a combination that
        cannot be.
    """
    name, _ = resolve(str(mechanism_type), noise_structure)
    bare, given = parts(name)
    return MECHANISMS.create(bare, **(dict(given) | parameters))
