"""The frozen values of the contract: what they refuse, in which words, and that JSON restores them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from dpfa_core.contracts import CounterLayout, NoiseKey, Term
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, Claim, NoisePlan, PrivacySpec, Sensitivity, Structure

SHAPE: dict[str, Any] = {
    "batch": 2,
    "q_len": 3,
    "kv_len": 5,
    "q_heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
}
PLAN: dict[str, Any] = {"mechanism": "gaussian", "distribution": "gaussian", "head_scale": (1.0,)}

RECORDS = [
    PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence"),
    PrivacySpec(epsilon=math.inf, delta=0.0, unit="token", queries="public", relation="add_or_remove"),
    AttentionProblem(**SHAPE),
    AttentionProblem(
        **SHAPE,
        lengths=((3, 5), (0, 1)),
        causal=True,
        window=(4, -1),
        mask=b"\x00\xff",
        clip="output",
        clip_norm=1.5,
        logit_bound=0.5,
        dtype="bfloat16",
        device="cuda:sm_90",
    ),
    Sensitivity(norm="l1", value=0.1, naive=2.0, item="P3.token.public", row_bound=(0.0, 0.1), worst_key=0),
    Structure(kind="low_rank", parameters=(("rank", 16.0),), seed=2**80),
    NoisePlan(**PLAN),
    NoisePlan(
        mechanism="low_rank",
        distribution="discrete_gaussian",
        head_scale=(1.0, 1e-300),
        row_scale=(0.0, 1.0, 0.1),
        norm="whitened_l2",
        structure=Structure(kind="sparse", parameters=(), seed=0),
        grid=0.25,
        transform="bm64",
    ),
    NoisePlan(mechanism="none", distribution="none", head_scale=(0.0,)),
    NoisePlan(mechanism="gaussian", distribution="gaussian", head_scale=(0.0, 1.5), noiseless_heads=True),
    Claim("calibration", (("epsilon", "1.0"), ("delta", "1e-5")), "proved", "Balle and Wang 2018"),
    CounterLayout(fields=(("row", 2**24),), words=((Term("row", 4, 20, "8*D32"),), ()), lane=()),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_json_restores_an_equal_and_hashable_record(record: Any) -> None:
    text = json.dumps(record.to_json(), allow_nan=False)
    restored = type(record).from_json(json.loads(text))
    assert restored == record
    assert hash(restored) == hash(record)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": 0}, r"^epsilon must be a number > 0, got 0\. Use inf only"),
        ({"epsilon": -1.0}, "epsilon must be"),
        ({"epsilon": math.nan}, "epsilon must be a number > 0, got nan"),
        ({"epsilon": "1"}, "got '1'"),
        ({"epsilon": True}, "got True"),
        ({"delta": 1.0}, r"^delta must be in \[0, 1\), got 1\.0\.$"),
        ({"delta": -1e-9}, "delta must be"),
        ({"delta": math.nan}, "delta must be"),
        ({"unit": "person"}, "unit must be one of 'sequence', 'token', 'example', 'user', got 'person'"),
        ({"relation": "swap"}, "relation must be one of 'add_or_remove', 'replace'"),
        ({"unit": "token"}, 'unit="token" needs queries="public" or "private", got None. Choose "private"'),
        ({"queries": "secret"}, "queries must be one of"),
    ],
)
def test_privacy_spec_refuses(wrong: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5, "unit": "sequence"}
    with pytest.raises(PrivacyParameterError, match=message):
        PrivacySpec(**good | wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *(({name: 0}, f"{name} must be an integer >= 1, got 0") for name in SHAPE),
        *(({name: 1.0}, f"{name} must be an integer >= 1, got 1.0") for name in SHAPE),
        ({"q_heads": 3}, "q_heads must be a multiple of kv_heads=2, got 3"),
        ({"lengths": ((3, 5),)}, "one pair for each of the 2 batch rows"),
        ({"lengths": [(3, 5), (3, 5)]}, "lengths must be a tuple"),
        ({"lengths": ([3, 5], (3, 5))}, r"must be a tuple \(queries, keys\), got \[3, 5\]"),
        ({"lengths": (3, 5)}, r"must be a tuple \(queries, keys\), got 3"),
        ({"lengths": ((3, 5), (3, 6))}, r"must not exceed \(q_len, kv_len\) = \(3, 5\), got \(3, 6\)"),
        ({"lengths": ((3, 5), (-1, 5))}, "a query length must be an integer >= 0"),
        ({"window": (1,)}, r"window must be a tuple \(left, right\), got \(1,\)"),
        ({"window": [1, 1]}, r"window must be a tuple"),
        ({"window": (-2, 0)}, "a window side must be an integer >= -1, got -2"),
        ({"mask": b"\x00"}, "mask must hold 2 bytes of packed bits, got 1"),
        ({"mask": [0, 1]}, "mask must be bytes, got 'list'"),
        ({"clip": "rows"}, "clip must be one of 'value', 'output', got 'rows'"),
        ({"clip_norm": 0.0}, "clip_norm must be a finite number > 0, got 0.0. None means no clip"),
        ({"clip_norm": math.inf}, "clip_norm must be a finite number"),
        ({"logit_bound": math.nan}, "logit_bound must be a finite number"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_attention_problem_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyParameterError, match=message):
        AttentionProblem(**SHAPE | wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"distribution": "uniform"}, "distribution must be one of"),
        ({"head_scale": ()}, "head_scale must hold at least one number"),
        ({"head_scale": [1.0]}, r"head_scale must be a tuple, got \[1\.0\]"),
        ({"head_scale": (1.0, 0.0)}, "head_scale must be > 0 wherever there is noise"),
        ({"head_scale": (math.nan,)}, "each entry of head_scale must be a finite number >= 0, got nan"),
        ({"head_scale": (math.inf,)}, "each entry of head_scale"),
        ({"head_scale": (0.0, 0.0), "noiseless_heads": True}, "head_scale must be > 0 for at least one head, got"),
        ({"row_scale": (0.0, 0.0)}, "row_scale must be > 0 for some rows wherever there is noise"),
        ({"noiseless_heads": 1}, "noiseless_heads must be True or False, got 1"),
        ({"row_scale": (-1.0,)}, "each entry of row_scale must be a finite number >= 0"),
        ({"distribution": "none"}, 'head_scale must be 0 where distribution="none"'),
        ({"norm": "l3"}, "norm must be one of"),
        ({"grid": -1.0}, "grid must be a finite number >= 0"),
        ({"transform": "bm16"}, "transform must be one of"),
    ],
)
def test_noise_plan_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyParameterError, match=message):
        NoisePlan(**PLAN | wrong)


def test_a_plan_written_before_noiseless_heads_still_reads() -> None:
    data = NoisePlan(**PLAN).to_json()
    del data["noiseless_heads"]
    assert NoisePlan.from_json(data) == NoisePlan(**PLAN)


def test_sensitivity_refuses_a_value_that_is_not_finite() -> None:
    with pytest.raises(PrivacyParameterError, match="value must be a finite number >= 0, got nan"):
        Sensitivity(norm="l2", value=math.nan, naive=1.0, item="x")


def test_structure_needs_a_public_seed() -> None:
    with pytest.raises(PrivacyParameterError, match="seed must be an integer >= 0, got -1"):
        Structure(kind="low_rank", parameters=(), seed=-1)


@pytest.mark.parametrize("parameters", [(("epsilon", 1.0),), (("epsilon", "one"),), (("epsilon", "nan"),)])
def test_claims_carry_decimal_strings(parameters: Any) -> None:
    with pytest.raises(PrivacyParameterError, match=r"must be pairs \(name, decimal string\)"):
        Claim("calibration", parameters)


@pytest.mark.parametrize("stride", ["", "H+1", "4**2", "2*", "x y", 4])
def test_a_stride_is_a_product_of_integers_and_names(stride: Any) -> None:
    with pytest.raises(PrivacyParameterError, match="stride must be a product of integers and names"):
        Term("row", 0, 1, stride)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"epsilon": 1.0, "delta": 0.0, "unit": "sequence", "sigma": 1}, r"got also \['sigma'\]"),
        ({"epsilon": 1.0}, "could not be restored"),
        ([], "expected the JSON object of a PrivacySpec"),
        ({"epsilon": -1.0, "delta": 0.0, "unit": "sequence"}, "epsilon must be"),
    ],
)
def test_json_is_checked_like_an_argument(data: Any, message: str) -> None:
    with pytest.raises(PrivacyParameterError, match=message):
        PrivacySpec.from_json(data)


def test_json_of_a_mask_must_be_hexadecimal() -> None:
    data = AttentionProblem(**SHAPE, mask=b"\x00\xff").to_json()
    with pytest.raises(PrivacyParameterError, match="expected hexadecimal bytes, got 'xyz'"):
        AttentionProblem.from_json(data | {"mask": "xyz"})


def test_a_noise_key_never_shows_its_words() -> None:
    key = NoiseKey(generator="chacha20", purpose="release", words=[12345], release=[678], secure=True)
    assert "12345" not in repr(key)
    assert "678" not in repr(key)
    assert not hasattr(key, "to_json")
    with pytest.raises(PrivacyParameterError, match="generator must be one of 'chacha20', 'philox4x32-10'"):
        NoiseKey(generator="mt19937", purpose="release", words=[], release=[], secure=True)  # type: ignore[arg-type]
