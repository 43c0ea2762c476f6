"""A public bias of the logits: added before they are bounded, with no gradient.

The bound is applied to logit plus bias, so that what a key can weigh is what it can weigh without a bias, and every
sensitivity stays what it is (PRIVACY P2, P3). What they ask of a bias is that it is the same for neighbours.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from dpfa_core.checks import require
from dpfa_core.errors import NotPrivateError


def alibi(slopes: Any, q: Tensor) -> Tensor | None:
    """flash-attn's ``alibi_slopes`` as the bias of an operator: [B or 1, H].

    The logit of row i and key j gets -slope * |i + Sk - S - j|; the lengths of a padded batch count for themselves.

    Raises: PrivacyParameterError for anything but floating-point [H] or [B, H] on q's device.
    """
    if slopes is None:
        return None
    shapes = ((q.shape[2],), (q.shape[0], q.shape[2])) if isinstance(q, Tensor) and q.dim() == 4 else ()
    good = isinstance(slopes, Tensor) and slopes.is_floating_point() and tuple(slopes.shape) in shapes
    require(
        good and slopes.device == q.device,
        f"alibi_slopes must be a floating-point tensor {' or '.join(str(list(shape)) for shape in shapes)}, "
        "on q's device",
        f"{slopes.dtype} {list(slopes.shape)} on {slopes.device}"
        if isinstance(slopes, Tensor)
        else type(slopes).__name__,
    )
    return slopes[None] if slopes.dim() == 1 else slopes


def check_finite(bias: Tensor | None) -> None:
    """The numbers of a bias are public, so a bad one may be told.

    Raises: PrivacyParameterError.
    """
    require(
        bias is None or bool(torch.isfinite(bias).all()),
        "a bias of the logits must be finite",
        "an infinity or NaN",
        "What hides a key is a mask, which is applied after the bound.",
    )


def without_gradient(bias: Tensor | None) -> Tensor | None:
    """Raises: NotPrivateError for a bias that asks for its gradient."""
    if bias is not None and torch.is_grad_enabled() and bias.requires_grad:
        refuse_gradient()
    return None if bias is None else bias.detach()


def refuse_gradient() -> NoReturn:
    raise NotPrivateError(
        "a bias of the logits must not require a gradient, got one that does: its gradient is a function of the "
        "records that leaves without noise; pass bias.detach(), or train it with make_private."
    )
