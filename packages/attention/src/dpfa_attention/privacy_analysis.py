"""What a module can say of its own promise, ready for JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dpfa_attention.module_arguments import one_token
from dpfa_attention.options import STRUCTURES
from dpfa_attention.tensor_release import tensor_mechanism
from dpfa_core.plugin_names import parts
from dpfa_core.registry import MECHANISMS
from dpfa_core.spec import AttentionProblem, Norm, PrivacySpec
from dpfa_core.spending import first_party_accountants
from dpfa_mechanisms.sensitivity import reasons_against
from dpfa_mechanisms.sensitivity_analysis import AttentionSensitivityAnalyzer

if TYPE_CHECKING:
    from dpfa_attention.module import DPFlashAttention

PROMISE = (
    *("setting", "embed_dim", "num_heads", "epsilon", "delta", "unit", "relation", "queries"),
    *("clip", "clip_norm", "logit_bound", "noise_structure"),
)


def spec_of(module: DPFlashAttention) -> PrivacySpec:
    """The promise of one call."""
    return PrivacySpec(
        epsilon=module.epsilon,
        delta=module.delta,
        unit=module.unit,
        relation=module.relation,
        queries=module.queries,
    )


def norm_of(module: DPFlashAttention) -> Norm:
    """The norm in which the module's mechanism clips rows."""
    found = tensor_mechanism(module.noise_mechanism, module.noise_structure)
    if found is not None:
        own: Norm = getattr(found[1], "norm", "l2")
        return own
    bare, given = parts(module._mechanism_and_accountant()[0])
    parameters = {name: value for name, value in given if name != "noise_multiplier"}
    norm: Norm = MECHANISMS.create(bare, **parameters).norm
    return norm


def configuration(module: DPFlashAttention, *more: str) -> dict[str, Any]:
    """The promise and how it is kept, with the attributes named in `more`."""
    mechanism = module.noise_mechanism
    return {
        "privacy_mechanism": mechanism if isinstance(mechanism, str) else module._mechanism_and_accountant()[0],
        **{name: getattr(module, name) for name in (*PROMISE, *more)},
        "head_epsilons": None if module.head_epsilons is None else list(module.head_epsilons),
    }


def sensitivity_of(module: DPFlashAttention, problem: AttentionProblem | None) -> dict[str, Any] | None:
    """``AttentionSensitivityAnalyzer`` for calls like `problem` at today's clip; None without a problem or a bound."""
    if problem is None:
        return None
    problem = dataclasses.replace(problem, clip_norm=1.0 if module.clip_norm is None else module.clip_norm)
    spec, norm = spec_of(module), norm_of(module)
    if reasons_against(spec, problem, norm):
        return None
    return AttentionSensitivityAnalyzer(spec, problem, norm=norm).analyze()


def features(module: DPFlashAttention) -> dict[str, bool]:
    """Whether PLD, noise structures and a bound on the sensitivity can be had here."""
    usable = {entry.name for entry in MECHANISMS.entries() if not entry.disabled}
    one = one_token(module.num_heads, module.head_dim, clip=module.clip, clip_norm=1.0, logit_bound=module.logit_bound)
    bounded = module.setting == "release" and not reasons_against(spec_of(module), one, norm_of(module))
    return {
        "pld_available": "pld" in first_party_accountants(),
        "structured_noise_available": usable.issuperset(STRUCTURES),
        "sensitivity_analysis_available": bounded,
    }
