"""``torch.einsum`` with parameters: each sample gets its copy, marked by the letter of the samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpfa_training.per_sample.proxy import Proxy
from dpfa_training.per_sample.use import Use, register


@register(torch.einsum)
def einsum(use: Use, equation: str, *operands: Any) -> Tensor:
    """An equation with "->" and letters only, whose result keeps the samples."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in equation:
        raise use.unknown("an equation without '->' or with '...'")
    letters = set()
    for term, operand in zip(terms, operands, strict=True):
        layout = None if isinstance(operand, Proxy) else use.samples(operand)
        if layout is not None:
            letters.add(term[layout.dim] if layout.joined == "no" else "")
    letter = letters.pop() if len(letters) == 1 else ""
    held = any(letter in term for term, x in zip(terms, operands, strict=True) if isinstance(x, Proxy))
    if not letter or letter not in right or held:
        raise use.unknown("an equation that does not keep the samples apart")
    terms = [letter + term if isinstance(x, Proxy) else term for term, x in zip(terms, operands, strict=True)]
    copies = [use.copies(x) if isinstance(x, Proxy) else x for x in operands]
    return torch.einsum(f"{','.join(terms)}->{right}", *copies)
