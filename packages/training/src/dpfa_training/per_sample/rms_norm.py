"""Root-mean-square normalisation: the scale multiplies what torch has normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfa_training.per_sample.proxy import Proxy
from dpfa_training.per_sample.use import Use, register


@register(F.rms_norm)
def rms_norm(
    use: Use, input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Tensor:
    """``F.rms_norm`` over the last dimensions."""
    samples = None if isinstance(input, Proxy) else use.samples(input)
    if samples is None or samples.dim >= input.dim() - len(normalized_shape):
        raise use.unknown("only over dimensions that do not count samples")
    normalised = F.rms_norm(input, normalized_shape, None, eps)
    scale = samples.spread(use.copies(weight), input.shape, input.dim())
    if scale is None:
        raise use.unknown()
    return (normalised * scale).to(torch.promote_types(normalised.dtype, scale.dtype))
