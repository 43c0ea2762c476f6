"""Bad values die at the door: with a remedy, with nothing recorded and no tensor computed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpfa_attention import dp_flash_attn_func
from dpfa_core.errors import BackendUnavailable, DPFAError, NotPrivateError, PluginError, PrivacyParameterError
from dpfa_core.ledger import Ledger

TOKEN = {"unit": "token", "queries": "private", "logit_bound": 1.0}

CASES: list[tuple[dict[str, Any], type[DPFAError], str]] = [
    ({"epsilon": 0.0}, PrivacyParameterError, "epsilon must be a number > 0, got 0.0."),
    ({"epsilon": math.nan}, PrivacyParameterError, "epsilon must be a number > 0, got nan."),
    ({"epsilon": True}, PrivacyParameterError, "epsilon must be a number > 0, got True."),
    ({"delta": 1.5}, PrivacyParameterError, "delta must be in [0, 1), got 1.5."),
    ({"delta": 0.0}, PrivacyParameterError, "needs delta > 0, got 0.0; use laplace"),
    ({"delta": 0.0, "mechanism": "laplace"}, PrivacyParameterError, "delta must exceed 3.16e-11, what the end of the"),
    ({"delta": 1e-30}, PrivacyParameterError, "in float32, got 1e-30; raise delta or lower epsilon."),
    (
        {"epsilon": 1e4},
        PrivacyParameterError,
        "must be wide enough that the end of its sampler hides in delta=1e-05, got epsilon=10000, which asks for noise",
    ),
    ({"epsilon": 1e300}, PrivacyParameterError, "lower epsilon, or give epsilon=inf for attention that is not private"),
    (
        {"epsilon": 1e300, "mechanism": "laplace"},
        PrivacyParameterError,
        "got epsilon=1e+300, which asks for noise of 1e-300 times the sensitivity, whose end costs 1 at this size",
    ),
    ({"epsilon": 1e300, "mechanism": "discrete_gaussian"}, PrivacyParameterError, "multiplier of 0.25 or more, got"),
    (
        {"epsilon": math.inf, "head_epsilons": [1.0, 1.0, 1.0, 1e4]},
        PrivacyParameterError,
        "must be wide enough that the end of its sampler hides",
    ),
    ({"unit": "user"}, PrivacyParameterError, "got 'user'. Examples and users are units of training."),
    ({"unit": "word"}, PrivacyParameterError, "unit must be one of 'sequence', 'token'"),
    ({"relation": "swap"}, PrivacyParameterError, "relation must be one of 'add_or_remove', 'replace', got 'swap'"),
    ({"unit": "token"}, PrivacyParameterError, 'unit="token" needs queries="public" or "private", got None.'),
    (TOKEN | {"logit_bound": None}, PrivacyParameterError, 'unit="token" needs a logit_bound, got None'),
    (TOKEN | {"clip": "output"}, PrivacyParameterError, 'unit="token" needs clip="value", got \'output\''),
    ({"clip": "row"}, PrivacyParameterError, "clip must be one of 'value', 'output', got 'row'."),
    ({"clip_norm": -1.0}, PrivacyParameterError, "clip_norm must be a finite number > 0, got -1.0."),
    ({"clip_norm": math.inf}, PrivacyParameterError, "clip_norm must be a finite number > 0, got inf."),
    ({"logit_bound": 0.0}, PrivacyParameterError, "logit_bound must be a finite number > 0, got 0.0."),
    ({"softcap": 2.0, "logit_bound": 1.0}, PrivacyParameterError, "logit_bound must equal softcap=2.0"),
    ({"softmax_scale": math.inf}, PrivacyParameterError, "softmax_scale must be None or a finite number, got inf."),
    ({"window_size": (1, 2, 3)}, PrivacyParameterError, "window must be a tuple (left, right), got (1, 2, 3)."),
    ({"window_size": (-2, 0)}, PrivacyParameterError, "a window side must be an integer >= -1, got -2."),
    ({"causal": 1}, PrivacyParameterError, "causal must be True or False, got 1."),
    ({"dropout_p": 0.1}, PrivacyParameterError, "dropout_p must be 0 in a release, got 0.1. Dropped weights"),
    ({"return_attn_probs": True}, NotPrivateError, "return_attn_probs must be False, got True: attention probab"),
    (
        {"alibi_slopes": torch.ones(3)},
        PrivacyParameterError,
        "alibi_slopes must be a floating-point tensor [4] or [2, 4]",
    ),
    ({"alibi_slopes": [1.0] * 4}, PrivacyParameterError, "on q's device, got 'list'."),
    ({"alibi_slopes": torch.full((4,), math.inf)}, PrivacyParameterError, "must be finite, got 'an infinity or NaN'."),
    ({"alibi_slopes": torch.ones(4, requires_grad=True)}, NotPrivateError, "must not require a gradient, got one"),
    ({"noise_structure": "banded"}, PrivacyParameterError, "noise_structure must be one of 'low_rank', 'sparse',"),
    ({"noise_structure": "sparse", "mechanism": "laplace"}, PrivacyParameterError, "'gaussian', got 'laplace'. Leave"),
    ({"noise_structure": "sparse", "mechanism": "low_rank"}, PrivacyParameterError, "got 'low_rank'. Leave out one"),
    ({"noise_structure": "attention_aware"}, PrivacyParameterError, "protects unit=\"token\", got 'sequence'"),
    ({"noise_structure": "low_rank"}, PrivacyParameterError, "rank must be at most head_dim=8, got 16"),
    ({"head_epsilons": [0.5] * 3}, PrivacyParameterError, "head_epsilons must hold 4 numbers, one for each part, got"),
    ({"head_epsilons": [0.5, 0.0, 1, 1]}, PrivacyParameterError, "head_epsilons[1] must be a number > 0, got 0.0."),
    (
        {"head_epsilons": 0.5},
        PrivacyParameterError,
        "must be None or a list with one number for each head, got 'float'",
    ),
    ({"head_epsilons": [1, 1, 1, math.inf]}, PrivacyParameterError, "got inf for head 3; a head without noise takes"),
    ({"allow_infinite_heads": True}, PrivacyParameterError, "must be False without head_epsilons, got True. A list"),
    ({"mechanism": None}, PrivacyParameterError, "or an object with add_noise, got 'NoneType'."),
    ({"mechanism": "gausian", "epsilon": math.inf}, PluginError, "got 'gausian'; install the package"),
    ({"backend": "cuda9"}, PluginError, "got 'cuda9'; install the package"),
    ({"logit_bound": 400.0}, BackendUnavailable, "logit_bound must be at most 350.0, got 400.0"),
    ({"seed": -1}, PrivacyParameterError, "seed must be an integer >= 0, got -1. None draws a secret"),
    ({"seed": True}, PrivacyParameterError, "seed must be an integer >= 0, got True."),
    ({"ledger": "run.db"}, PrivacyParameterError, "got 'run.db'. A file is opened by Ledger.open(path,"),
]


@pytest.mark.parametrize(
    ("options", "error", "text"), CASES, ids=[f"{i}-{next(iter(c[0]))}" for i, c in enumerate(CASES)]
)
def test_a_bad_option_dies_at_the_door(
    inputs: Callable[..., Any], watched: Any, options: dict[str, Any], error: type[DPFAError], text: str
) -> None:
    unit = options.get("unit") if options.get("unit") in ("sequence", "token") else "sequence"
    ledger = Ledger.memory(unit=unit, relation="replace")
    arguments = {"epsilon": 1.0, "delta": 1e-5, "ledger": ledger} | options
    with pytest.raises(error, match=re.escape(text)):
        dp_flash_attn_func(*inputs(), **arguments)
    assert not list(ledger.events())
    assert watched.calls == 0


def tensors(q: Any = (2, 9, 4, 8), k: Any = (2, 9, 4, 8), v: Any = (2, 9, 4, 8)) -> list[torch.Tensor]:
    return [torch.zeros(shape) for shape in (q, k, v)]


@pytest.mark.parametrize(
    ("qkv", "text"),
    [
        (
            tensors(q=(2, 9, 8)),
            "q must be a dense tensor [batch, length, heads, head_dim], got 'torch.float32 [2, 9, 8]",
        ),
        ([*tensors()[:2], "v"], "v must be a dense tensor [batch, length, heads, head_dim], got 'str'."),
        ([x.to_sparse() for x in tensors()], "got 'torch.float32 [2, 9, 4, 8], torch.sparse_coo'"),
        ([x.int() for x in tensors()], "q must be float32, bfloat16, float16 or float64, got torch.int32."),
        ([*tensors()[:2], tensors()[2].half()], "v must be torch.float32 on cpu, as q is, got 'torch.float16 on cpu'."),
        ([tensors()[0], *(x.to("meta") for x in tensors()[1:])], "k must be torch.float32 on cpu, as q is, got"),
        (tensors(k=(3, 9, 4, 8)), "k must have the batch and head_dim of q, [2, *, *, 8], got [3, 9, 4, 8]."),
        (tensors(k=(2, 9, 4, 6), v=(2, 9, 4, 6)), "k must have the batch and head_dim of q, [2, *, *, 8], got"),
        (tensors(v=(2, 8, 4, 8)), "v must have the shape of k, [2, 9, 4, 8], got [2, 8, 4, 8]."),
        (
            tensors(k=(2, 9, 3, 8), v=(2, 9, 3, 8)),
            "the 4 heads of q must be a multiple of the heads of k and v, got 3.",
        ),
        (tensors(q=(2, 0, 4, 8)), "q_len must be an integer >= 1, got 0."),
        ([x.double() for x in tensors()], "got float64; release in float32."),
    ],
)
def test_tensors_that_do_not_fit_are_named(watched: Any, ledger: Ledger, qkv: Any, text: str) -> None:
    with pytest.raises(PrivacyParameterError, match=re.escape(text)):
        dp_flash_attn_func(*qkv, epsilon=1.0, delta=1e-5, ledger=ledger)
    assert not list(ledger.events())
    assert watched.calls == 0
