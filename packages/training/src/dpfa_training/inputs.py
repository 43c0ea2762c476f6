"""What the loop calls the private module with."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from dpfa_core.errors import NotPrivateError


def rows_of(args: Any, kwargs: Any) -> int:
    """Rows of the first tensor, which all samples share.

    Raises: NotPrivateError where there is none.
    """
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            return int(leaf.shape[0])
    raise NotPrivateError("the batch must hold a tensor with one row per sample, got none; pass one in dimension 0.")


def check_inputs(args: Any, kwargs: Any) -> None:
    """Nothing in front of the module may be trained.

    Raises: NotPrivateError.
    """
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
            raise NotPrivateError(
                f"the module must get data, got a tensor of shape {tuple(leaf.shape)} that something outside of it "
                "computed with gradients: what is trained there would get no noise. Pass the whole model to "
                "make_private, or compute its input under torch.no_grad()."
            )
