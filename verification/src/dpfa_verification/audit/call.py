"""The public call under attack: without noise for the adversary, with noise for the audit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpfa_core.ledger import Ledger
from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_verification.audit.adversary import Inputs, Release
from dpfa_verification.audit.likelihood_ratio import Outputs

ROWS = 20_000
"""Batch rows of one call: each is a record of its own, and has noise of its own."""


def options(spec: PrivacySpec, problem: AttentionProblem, **more: Any) -> dict[str, Any]:
    """Keyword arguments of ``dp_flash_attn_func`` that ask for `spec` and `problem`; full batch rows only.

    What is spent is recorded in a ledger that is thrown away: an audit's inputs are made up.
    """
    kept = {name: getattr(spec, name) for name in ("epsilon", "delta", "unit", "relation", "queries")}
    kept |= {name: getattr(problem, name) for name in ("causal", "clip", "clip_norm", "logit_bound")}
    if "ledger" not in more:
        more["ledger"] = Ledger.memory(unit=spec.unit, relation=spec.relation)
    return kept | {"window_size": problem.window} | more


def noiseless_call(spec: PrivacySpec, **more: Any) -> Release:
    """``dp_flash_attn_func`` with epsilon=inf, for ``ascend``; `more` as its keyword arguments."""
    from dpfa_attention import dp_flash_attn_func

    ledger = Ledger.memory(unit=spec.unit, relation=spec.relation)

    def release(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem) -> Tensor:
        asked = options(spec, problem, epsilon=math.inf, ledger=ledger, **more)
        out: Tensor = dp_flash_attn_func(q, k, v, **asked)
        return out

    return release


def released(
    inputs: Inputs, spec: PrivacySpec, problem: AttentionProblem, trials: int, **more: Any
) -> tuple[Outputs, Any]:
    """(outputs [trials, S * H * D], the last call's stats) of `trials` independent releases of one batch row."""
    from dpfa_attention import dp_flash_attn_func

    asked = options(spec, problem, return_privacy_stats=True, **more)
    outputs, stats = [], None
    for start in range(0, trials, ROWS):
        rows = min(ROWS, trials - start)
        many = [x.to(getattr(torch, problem.dtype)).expand(rows, -1, -1, -1) for x in inputs]
        out, stats = dp_flash_attn_func(*many, **asked)
        outputs.append(out.detach().double().flatten(1).cpu().numpy())
    return np.concatenate(outputs), stats
