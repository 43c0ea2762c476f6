from __future__ import annotations

import pytest

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.plugin_names import named, parts


def test_a_name_with_parameters_is_taken_apart_and_put_together() -> None:
    assert parts("gaussian") == ("gaussian", ())
    assert parts("low_rank( rank = 8, rescale=True,seed=2 )") == (
        "low_rank",
        (("rank", 8), ("rescale", True), ("seed", 2)),
    )
    assert parts("sparse(sparsity=1e-1)") == ("sparse", (("sparsity", 0.1),))
    assert named("low_rank(seed=2)", rank=8) == "low_rank(rank=8, seed=2)" == named(named("low_rank", rank=8), seed=2)
    assert named("gaussian") == "gaussian"


@pytest.mark.parametrize("bad", ["a(rank)", "a(rank=x)", "a(rank=1, rank=2)", "a(8)", "a(rank=__import__)"])
def test_other_parameters_are_refused(bad: str) -> None:
    with pytest.raises(PrivacyParameterError, match="must be like"):
        parts(bad)
