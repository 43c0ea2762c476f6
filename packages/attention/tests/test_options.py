from __future__ import annotations

import math
import unicodedata

import pytest

from dpfa_attention.options import bound_of_logits, resolve, scale_of_logits
from dpfa_core.errors import PrivacyParameterError


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("gaussian", ("gaussian", None)),
        ("laplace", ("laplace", None)),
        ("laplacian", ("laplace", None)),
        ("pld", ("gaussian", "pld")),
        ("standard", ("gaussian", "rdp")),
        ("renyi_gaussian", ("gaussian", "rdp")),
        (unicodedata.normalize("NFC", "rényi_gaussian"), ("gaussian", "rdp")),
        (unicodedata.normalize("NFD", "rényi_gaussian"), ("gaussian", "rdp")),
        ("somebody_elses", ("somebody_elses", None)),
    ],
)
def test_an_alias_is_a_mechanism_and_an_accountant(asked: str, meant: tuple[str, str | None]) -> None:
    assert resolve(asked) == meant


@pytest.mark.parametrize(
    ("asked", "structure", "meant"),
    [
        ("structured_noise", None, ("low_rank", None)),
        ("structured_noise", "sparse", ("sparse", None)),
        ("gaussian", "block_diagonal", ("block_diagonal", None)),
        ("pld", "attention_aware", ("attention_aware", "pld")),
        ("sparse", "sparse", ("sparse", None)),
    ],
)
def test_a_structure_is_a_mechanism(asked: str, structure: str | None, meant: tuple[str, str | None]) -> None:
    assert resolve(asked, structure) == meant


def test_both_forms_of_the_accent_are_tested() -> None:
    assert unicodedata.normalize("NFC", "rényi") != unicodedata.normalize("NFD", "rényi")


def test_softcap_and_logit_bound_are_one_number() -> None:
    assert bound_of_logits(0.0, None) is None
    assert bound_of_logits(0.0, 2.0) == bound_of_logits(2.0, None) == bound_of_logits(2, 2.0) == 2.0
    with pytest.raises(PrivacyParameterError, match=r"logit_bound must equal softcap=2.0, .* got 3.0\. Give one"):
        bound_of_logits(2.0, 3.0)
    with pytest.raises(
        PrivacyParameterError, match=r"softcap must be a finite number >= 0, got -1.0. 0 means no bound"
    ):
        bound_of_logits(-1.0, None)


def test_scale_defaults_to_one_over_root_of_head_dim() -> None:
    assert scale_of_logits(None, 64) == 1 / 8
    assert scale_of_logits(2, 64) == 2.0
    for bad in (math.inf, math.nan, "1", True):
        with pytest.raises(PrivacyParameterError, match="softmax_scale must be None or a finite number, got"):
            scale_of_logits(bad, 64)  # type: ignore[arg-type]
