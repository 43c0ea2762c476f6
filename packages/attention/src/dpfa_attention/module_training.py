"""A module's forward in training: exact attention that an engine guards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from dpfa_attention.module_masks import Masks, additive, outside
from dpfa_attention.stats import PrivacyStats
from dpfa_attention.training_engine import guarding_engine
from dpfa_core.errors import NotPrivateError

if TYPE_CHECKING:
    from dpfa_attention.module import DPFlashAttention


def pending(module: DPFlashAttention) -> PrivacyStats:
    """The statement of a forward whose privacy is spent at the engine's next step.

    Raises: NotPrivateError in training mode where no engine guards the parameters.
    """
    engine = guarding_engine(module.parameters())
    if engine is None and module.training and any(x.requires_grad for x in module.parameters()):
        raise NotPrivateError(
            'setting="training" must run inside an engine, got parameters that none guards: their gradients would '
            "get no noise; call make_private on the model, or eval() to look at it."
        )
    ledger = getattr(engine, "ledger", None)
    return PrivacyStats(
        epsilon_spent=0.0,
        delta=0.0,
        scope="pending_step",
        unit=getattr(ledger, "unit", None) or "example",
        relation=getattr(ledger, "relation", None) or module.relation,
        privacy_mechanism="none",
        noise_multiplier=0.0,
        noise_std=0.0,
        backend="torch",
        event_id="",
        secure_noise=True,
    )


def exact_attention(module: DPFlashAttention, inputs: list[Tensor], masks: Masks, *, causal: bool) -> Tensor:
    """[B, S, E] of query, key and value [B, S, width], by torch."""
    q, k, v = (x.transpose(0, 1) for x in inputs)
    window = (module.window_size[0], module.window_size[1])
    out_of_sight = outside(q.shape[0], k.shape[0], causal=causal, window=window).to(q.device)
    attn_mask, padding = additive(masks, out_of_sight, module.num_heads)
    alike = module.in_proj_weight is not None
    separate: dict[str, Any] = {
        name: None if alike else getattr(module, name) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    }
    out, _ = F.multi_head_attention_forward(
        q,
        k,
        v,
        module.embed_dim,
        module.num_heads,
        module.in_proj_weight,
        module.in_proj_bias,
        None,
        None,
        False,
        module.dropout,
        module.out_proj.weight,
        module.out_proj.bias,
        training=module.training,
        key_padding_mask=padding,
        need_weights=False,
        attn_mask=attn_mask,
        use_separate_proj_weight=not alike,
        **separate,
    )
    return out.transpose(0, 1)
