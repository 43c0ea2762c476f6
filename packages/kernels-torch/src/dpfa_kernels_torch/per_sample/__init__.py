"""Per-sample gradients without their tensors: squared norms, and sums weighted by clip factors."""

from __future__ import annotations

from dpfa_kernels_torch.per_sample import bare, embedding, linear, scale, shift, tied
from dpfa_kernels_torch.per_sample.rule import Rule

RULES: dict[str, Rule] = {
    "linear": linear.RULE,
    "embedding": embedding.RULE,
    "scale": scale.RULE,
    "shift": shift.RULE,
    "bare": bare.RULE,
    "tied": tied.RULE,
}
"""One rule for each way in which a parameter enters a model."""
