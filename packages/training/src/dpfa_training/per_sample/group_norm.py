"""Group normalisation: scale and shift of a channel act on what torch has normalised."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dpfa_training.per_sample.proxy import Proxy
from dpfa_training.per_sample.samples import Samples
from dpfa_training.per_sample.use import Use, register


@register(F.group_norm)
def group_norm(
    use: Use, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    """``F.group_norm`` on (B, C, ...), also with the samples joined: (B*T, C, ...)."""
    samples = None if isinstance(input, Proxy) else use.samples(input)
    if samples is None or samples.dim != 0:
        raise use.unknown("the samples must be in dimension 0")
    out = F.group_norm(input, num_groups, None, None, eps)
    if weight is not None:
        out = out * _for_channels(use, weight, out, samples)
    if bias is not None:
        out = out + _for_channels(use, bias, out, samples)
    return out


def _for_channels(use: Use, parameter: Any, x: Tensor, samples: Samples) -> Tensor:
    each = (-1, *[1] * (x.dim() - 2))
    if not isinstance(parameter, Proxy):
        return parameter.view(each)  # type: ignore[no-any-return]
    copies = samples.spread(use.copies(parameter), x.shape[:2], 2)
    if copies is None:
        raise use.unknown()
    return copies.reshape(*copies.shape[:2], *each[1:])
