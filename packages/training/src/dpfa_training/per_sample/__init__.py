"""Per-sample gradients of every use of a trainable parameter: one rule per torch function, one file each.

Autograd never forms a weight gradient: parameters enter detached, and each rule's backward writes down what
the backend's ``sqnorm`` and ``clipped_grad`` need.
"""

from dpfa_training.per_sample import (
    convolution,
    einsum,
    elementwise,
    embedding,
    group_norm,
    layer_norm,
    linear,
    multi_head_attention,
    refused,
    rms_norm,
)
from dpfa_training.per_sample.proxy import Proxy
from dpfa_training.per_sample.rule import RULES, Rule, rule_for
from dpfa_training.per_sample.use import Use, register
from dpfa_training.per_sample.uses import UnknownUse

__all__ = [
    "RULES",
    "Proxy",
    "Rule",
    "UnknownUse",
    "Use",
    "convolution",
    "einsum",
    "elementwise",
    "embedding",
    "group_norm",
    "layer_norm",
    "linear",
    "multi_head_attention",
    "refused",
    "register",
    "rms_norm",
    "rule_for",
]
