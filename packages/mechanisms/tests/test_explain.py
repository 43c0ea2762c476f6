"""An explanation adds up to the bound it explains, and its sentences name what is there."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_mechanisms.explain import Explanation, explain
from dpfa_mechanisms.sensitivity import explain as explain_beside_sensitivity
from dpfa_mechanisms.sensitivity import sensitivity

DENSE = AttentionProblem(
    batch=1, q_len=32, kv_len=32, q_heads=2, kv_heads=1, head_dim=8, clip_norm=1.0, logit_bound=0.5
)
CAUSAL = dataclasses.replace(DENSE, causal=True)
TALL = dataclasses.replace(DENSE, q_len=40, kv_len=4, logit_bound=3.0)
PADDED = dataclasses.replace(CAUSAL, batch=3, lengths=((4, 9), (32, 32), (32, 32)))
MASKED = dataclasses.replace(DENSE, q_len=4, kv_len=4, mask=np.packbits(~np.eye(4, dtype=bool)).tobytes())
CASES = {"dense": DENSE, "causal": CAUSAL, "tall": TALL, "padded": PADDED, "masked": MASKED}


def token(queries: str) -> PrivacySpec:
    return PrivacySpec(epsilon=1.0, delta=1e-5, unit="token", queries=queries)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("queries", ["public", "private"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_it_repeats_the_bound_and_survives_json(case: str, queries: str, norm: Any) -> None:
    problem = CASES[case]
    bound, found = sensitivity(token(queries), problem, norm), explain(token(queries), problem, norm)
    assert (found.tight, found.naive, found.item, found.norm) == (bound.value, bound.naive, bound.item, norm)
    assert found.saving == pytest.approx(1 - bound.value / bound.naive)
    assert sum(row.rows for row in found.rows) == (problem.lengths or ((problem.q_len, 0),))[found.worst_batch_row][0]
    assert explain_beside_sensitivity(token(queries), problem, norm) == found
    assert Explanation.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_the_profile_of_a_dense_release_adds_up_to_its_bound() -> None:
    found = explain(token("private"), DENSE)
    (row,) = found.rows
    assert (row.visible_keys, row.rows) == (32, 32)
    assert (2 * (31 * row.if_seen**2 + row.if_own**2)) ** 0.5 == pytest.approx(found.tight, rel=1e-6)
    assert found.own_share == pytest.approx(row.if_own**2 / (31 * row.if_seen**2 + row.if_own**2))
    assert (found.worst_batch_row, found.worst_key, found.worst_query) == (0, 0, 0)


def test_the_profile_of_a_causal_release_adds_up_to_its_bound() -> None:
    found = explain(token("public"), CAUSAL)
    assert [(row.visible_keys, row.rows) for row in found.rows] == [(n, 1) for n in range(1, 33)]
    assert (2 * sum(row.if_seen**2 for row in found.rows)) ** 0.5 == pytest.approx(found.tight, rel=1e-6)


def test_the_first_of_the_worst_batch_rows_is_named() -> None:
    found = explain(token("private"), PADDED)
    assert found.worst_batch_row == 1
    assert "The worst key is 0 of 32 in batch row 1" in found.sentences[0]


def test_a_query_without_a_key_can_be_the_worst_token() -> None:
    """Five rows and three keys: rows 0 and 1 have no key of their own, and only row 0 sees anything."""
    first_row_alone = dataclasses.replace(DENSE, q_len=5, kv_len=3, mask=b"\xe0\x00")
    alone = explain(token("private"), first_row_alone)
    assert (alone.worst_key, alone.worst_query, alone.own_share) == (None, 0, 1.0)
    assert explain(token("public"), first_row_alone).worst_key == 0
    assert alone.sentences[0].startswith("The worst token is the query of row 0 in batch row 0: it has no key")


@pytest.mark.parametrize(
    ("queries", "case", "text"),
    [
        ("private", "dense", "What dominates is its own row, with 54% of the load: there everything can change"),
        ("private", "dense", 'queries="public" (1.29), if the queries hold no part of a record'),
        ("public", "dense", "how many rows see the token: 32, all of about the same load"),
        ("public", "causal", "2 of the 32 rows that see the token, those with at most 2 visible keys, make 50%"),
        ("public", "causal", "with 1 to 32 visible keys each; the fewer keys a row sees, the more weight"),
        ("public", "causal", "not releasing the rows that see the fewest keys (1 key), or letting them see more"),
        ("public", "dense", "a smaller logit_bound (it is 0.5)"),
        ("public", "dense", "The bound is 1.29 where the naive one is 16.01: 12.4 times less noise."),
    ],
)
def test_sentences_say_what_makes_the_bound(queries: str, case: str, text: str) -> None:
    assert text in " ".join(explain(token(queries), CASES[case]).sentences)


@pytest.mark.parametrize("case", CASES)
def test_the_remedies_do_lower_the_bound(case: str) -> None:
    problem, spec = CASES[case], token("private")
    found = explain(spec, problem)
    assert explain(spec, dataclasses.replace(problem, logit_bound=(problem.logit_bound or 0) / 2)).tight < found.tight
    assert explain(spec, dataclasses.replace(problem, clip_norm=0.5)).tight < found.tight
    public = explain(token("public"), problem).tight
    assert (public < found.tight * 0.999) == ('queries="public"' in " ".join(found.sentences))


def test_a_margin_of_low_precision_is_worth_a_sentence() -> None:
    low = explain(token("public"), dataclasses.replace(DENSE, dtype="bfloat16")).sentences[-1]
    assert low.startswith("Rounding to bfloat16 makes 1.")
    assert "Rounding" not in " ".join(explain(token("public"), DENSE).sentences)


def test_the_sequence_unit_has_no_worst_key_and_saves_nothing() -> None:
    spec = PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence", relation="add_or_remove")
    found = explain(spec, PADDED)
    assert (found.saving, found.worst_key, found.worst_query, found.worst_batch_row) == (0.0, None, None, 1)
    assert found.sentences[0].startswith(
        "A whole sequence is one record, so every one of its 32 rows in 2 heads that sees a key can move by its clip "
        "norm: batch row 1, which has most of them,"
    )
    assert found.sentences[-1].startswith("The bound is the naive one")


def test_a_release_that_depends_on_no_token_says_so() -> None:
    for lengths in (((4, 0),), ((0, 9),), ((0, 0),)):
        found = explain(token("private"), dataclasses.replace(DENSE, lengths=lengths))
        assert found.tight == 0.0
        assert found.sentences[0] == "No query sees a key, so nothing that is released depends on a token."


def test_what_has_no_sensitivity_has_no_explanation() -> None:
    with pytest.raises(PrivacyParameterError, match='unit="token" needs a logit_bound'):
        explain(token("public"), dataclasses.replace(DENSE, logit_bound=None))
