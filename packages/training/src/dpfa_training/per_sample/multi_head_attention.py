"""``nn.MultiheadAttention``: torch's own function runs, and its matrix products meet their rules."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch.nn.functional as F

from dpfa_training.per_sample.use import Use, register


@register(F.multi_head_attention_forward)
def multi_head_attention_forward(use: Use, *args: Any, **kwargs: Any) -> Any:
    """The function as torch has it, past the check that led here."""
    whole = F.multi_head_attention_forward
    names = {**vars(F), "has_torch_function": lambda tensors: False}
    body = FunctionType(whole.__code__, names, whole.__name__, whole.__defaults__, whole.__closure__)
    body.__kwdefaults__ = whole.__kwdefaults__
    return body(*args, **kwargs)
