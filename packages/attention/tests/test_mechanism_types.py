from __future__ import annotations

import pytest

from dpfa_attention.mechanism_types import PrivacyMechanismType, create_research_mechanism
from dpfa_attention.module import DPFlashAttention
from dpfa_attention.options import ALIASES, STRUCTURES
from dpfa_core.errors import PluginError, PrivacyParameterError
from dpfa_core.registry import MECHANISMS


@pytest.mark.parametrize("kind", PrivacyMechanismType)
def test_every_kind_constructs_and_calibrates(kind: PrivacyMechanismType) -> None:
    made = create_research_mechanism(kind)
    assert made.kind == ("selection" if kind == "exponential" else "additive")
    assert made.calibrate(1.0, 1e-6) > 0


def test_no_first_party_name_and_no_alias_is_missing() -> None:
    names = {entry.name for entry in MECHANISMS.entries() if entry.first_party}
    ascii_aliases = {alias for alias in ALIASES if alias.isascii()}
    assert {str(kind) for kind in PrivacyMechanismType} == names | ascii_aliases | {"structured_noise"} | set(
        STRUCTURES
    )


def test_parameters_and_a_structure_are_passed_on() -> None:
    assert create_research_mechanism("structured_noise", noise_structure="sparse", sparsity=0.5).sparsity == 0.5
    assert create_research_mechanism("low_rank(rank=3)", seed=2).rank == 3
    assert (
        create_research_mechanism(PrivacyMechanismType.PLD, noise_structure="block_diagonal").name == "block_diagonal"
    )
    with pytest.raises(PluginError, match=r"installed: .*gaussian"):
        create_research_mechanism("nothing")
    with pytest.raises(PrivacyParameterError, match="shapes Gaussian noise"):
        create_research_mechanism("laplace", noise_structure="sparse")


def test_a_kind_is_as_good_as_its_name_in_a_module() -> None:
    assert (
        DPFlashAttention(16, 2, noise_mechanism=PrivacyMechanismType.STANDARD).get_privacy_spent()["unit"] == "sequence"
    )
