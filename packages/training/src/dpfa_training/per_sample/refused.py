"""Functions that join the samples of a batch, whatever module calls them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F

from dpfa_core.errors import NotPrivateError
from dpfa_training.per_sample.use import Use, register


@register(F.batch_norm, torch.batch_norm)
def batch_norm(use: Use, *args: Any, **kwargs: Any) -> NoReturn:
    """Statistics over the batch: in eval() they would look harmless."""
    raise NotPrivateError(
        f"{use.proxies[0].label!r} must not be used by batch_norm, which couples the samples of a batch; use layer or "
        "group normalisation."
    )
