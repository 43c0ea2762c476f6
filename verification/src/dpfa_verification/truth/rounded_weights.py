"""Neighbours that rounded softmax weights tell apart, where a weight depends on other keys than its own.

With the row maximum taken off, one token that lowers it shifts all other logits, and each weight is rounded anew.
Keys are put at two logits: at the one the shift turns a weight rounded down into one rounded up, at the other
the other way round. Their values point in opposite directions, so that what each key gains adds up.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpfa_core.spec import AttentionProblem

Inputs = tuple[Tensor, Tensor, Tensor]
Floats = NDArray[np.float64]

STEP = 2e-5
"""Of the logits that are tried."""

SLACK = 5
"""Steps by which a logit may be off without being rounded another way."""


def neighbours(problem: AttentionProblem) -> tuple[Inputs, Inputs]:
    """(q, k, v) twice, which differ in the last key and value: one row of one head, a logit bound and a value clip.

    Args: `problem` with q_len 1, one head, head_dim a power of 4, and half precision.
    """
    bound, clip, dtype = problem.logit_bound or 0.0, problem.clip_norm or 0.0, getattr(torch, problem.dtype)
    up, down, highest, lower = _logits(bound, dtype)
    others = problem.kv_len - 1
    # as many of each as cancel: small outputs are rounded by little
    rising = round(others / (1.0 + np.exp(up - down)))
    logits = np.array([up] * rising + [down] * (others - rising))
    signs = np.array([1.0] * rising + [-1.0] * (others - rising))

    def inputs(logit: float, sign: float) -> Inputs:
        q = torch.zeros(1, 1, 1, problem.head_dim)
        # two numbers of the dtype hold a logit to 16 bits; the scale is 1 / sqrt(head_dim)
        q[..., 0], q[..., 1] = problem.head_dim**0.5, problem.head_dim**0.5 / 2**8
        k, v = (torch.zeros(1, problem.kv_len, 1, problem.head_dim) for _ in range(2))
        wanted = torch.from_numpy(bound * np.arctanh(np.append(logits, logit) / bound))
        k[0, :, 0, 0] = wanted.to(dtype)
        k[0, :, 0, 1] = (wanted - wanted.to(dtype).double()) * 2**8
        v[0, :, 0, 0] = clip * torch.from_numpy(np.append(signs, sign))
        return q.to(dtype), k.to(dtype), v.to(dtype)

    # the token with the lower logit raises the first kind of weights, and its value points their way
    return inputs(highest, -1.0), inputs(lower, 1.0)


def _logits(bound: float, dtype: torch.dtype) -> tuple[float, float, float, float]:
    """(logit whose weight gains, logit whose weight loses, the token's logit, its lower one)."""
    # the token's logits stay above all the others
    tried = np.arange(-bound + 2 * SLACK * STEP, -bound / 2, STEP)
    highest = bound * (1.0 - 2.0**-8)

    def gained(lower: float) -> tuple[Floats, Floats]:
        gain = _rounding(tried - lower, dtype) - _rounding(tried - highest, dtype)
        near = np.lib.stride_tricks.sliding_window_view(gain, 2 * SLACK + 1)
        return near.min(1), near.max(1)

    def spread(lower: float) -> float:
        least, most = gained(lower)
        return float(least.max() - most.min())

    best = max(np.linspace(0.0, highest, 100, endpoint=False), key=spread)
    least, most = gained(best)
    return float(tried[least.argmax() + SLACK]), float(tried[most.argmin() + SLACK]), highest, float(best)


def _rounding(exponents: Floats, dtype: torch.dtype) -> Floats:
    """Relative error of exp() rounded to `dtype`."""
    exact = np.exp(exponents)
    found: Floats = torch.from_numpy(exact).to(dtype).double().numpy() / exact - 1.0
    return found
