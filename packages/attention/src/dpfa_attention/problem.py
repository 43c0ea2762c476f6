"""From three tensors to the attention that is released: everything read here is public."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dpfa_core.checks import integer, require
from dpfa_core.spec import AttentionProblem
from dpfa_mechanisms.sensitivity import different_rows
from dpfa_mechanisms.visible import Visible

DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}


NOTHING = "Leave out a call that has nothing to attend to."


def attention_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: tuple[int, int],
    clip: Literal["value", "output"],
    clip_norm: float | None,
    logit_bound: float | None,
    mask: Tensor | bytes | None = None,
    lengths: tuple[tuple[int, int], ...] = (),
    biased: bool = False,
) -> AttentionProblem:
    """The shapes, dtype and device of q [B, S, H, D] and k, v [B, Sk, Hk, D], checked against each other.

    Args: `mask`, bool [S, Sk] or its packed bits, True = visible, the same for every batch row and head and for
    neighbours; what causal or window hide stays hidden; `lengths`, (queries, keys) of each batch row of a padded batch.
    Raises: PrivacyParameterError naming the tensor and what it should have been, or if every key is hidden.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(
            isinstance(x, Tensor) and x.layout == torch.strided and x.dim() == 4,
            f"{name} must be a dense tensor [batch, length, heads, head_dim]",
            _described(x),
        )
        require(x.dtype in DTYPES, f"{name} must be float32, bfloat16, float16 or float64", x.dtype)
        require(
            x.dtype == q.dtype and x.device == q.device,
            f"{name} must be {q.dtype} on {q.device}, as q is",
            f"{x.dtype} on {x.device}",
            "Convert it before the call.",
        )
    B, S, H, D = q.shape
    Sk, Hk = k.shape[1], k.shape[2]
    require(k.shape == (B, Sk, Hk, D), f"k must have the batch and head_dim of q, [{B}, *, *, {D}]", list(k.shape))
    require(v.shape == k.shape, f"v must have the shape of k, {list(k.shape)}", list(v.shape))
    require(
        Hk > 0 and H % Hk == 0,
        f"the {H} heads of q must be a multiple of the heads of k and v",
        Hk,
        "Query head h uses key head h // (H / Hk).",
    )
    require(isinstance(causal, bool), "causal must be True or False", causal)
    for name, size in (("batch", B), ("q_len", S), ("kv_len", Sk)):
        integer(name, size, least=1, remedy=NOTHING)
    problem = AttentionProblem(
        batch=B,
        q_len=S,
        kv_len=Sk,
        q_heads=H,
        kv_heads=Hk,
        head_dim=D,
        causal=causal,
        window=tuple(window) if isinstance(window, list) else window,
        mask=packed_mask(mask, S, Sk) if isinstance(mask, Tensor) else mask,
        lengths=lengths,
        clip=clip,
        clip_norm=clip_norm,
        logit_bound=logit_bound,
        dtype=DTYPES[q.dtype],
        device=_architecture(q.device),
        biased=biased,
    )
    # without a mask, the last query of a batch row sees the last key, whatever causal and window hide
    seen = any(all(pair) for pair in lengths) if lengths else True
    if mask is not None:
        seen = any(bool(Visible.of(problem, row).counts.any()) for row in different_rows(problem))
    require(
        seen,
        "at least one query must see a key",
        "lengths or a mask that hide every key",
        NOTHING,
    )
    return problem


def packed_mask(mask: Tensor, q_len: int, kv_len: int) -> bytes:
    """The bits of a public mask as ``AttentionProblem.mask`` holds them.

    Visibility is never a bias: a number added to logits that are then bounded would show the hidden keys again.

    Guarantee: tested (unpacked by the definition).
    Raises: PrivacyParameterError for anything but bool [q_len, kv_len] that shows a key.
    Source: PRIVACY P2.
    """
    good = isinstance(mask, Tensor) and mask.dtype == torch.bool and tuple(mask.shape) == (q_len, kv_len)
    require(good, f"mask must be bool [{q_len}, {kv_len}], True where a key is visible", _described(mask))
    shown = mask.detach().cpu()
    require(bool(shown.any()), "mask must show at least one key", "a mask that hides every key")
    return np.packbits(shown.numpy()).tobytes()


def _described(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}, {x.layout}" if isinstance(x, Tensor) else type(x).__name__


@lru_cache(maxsize=64)
def _architecture(device: torch.device) -> str:
    """ "cpu", "cuda:sm_90", "hip:gfx942", or the device's type."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return "hip:" + torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:sm_{major}{minor}"
