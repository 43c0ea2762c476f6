"""Does a plan add the noise that its mechanism's event is priced by, and can the output hold it?"""

from __future__ import annotations

import dataclasses

from dpfa_attention.sampler_end import even
from dpfa_core.checks import require
from dpfa_core.errors import PluginError, PrivacyParameterError
from dpfa_core.registry import Entry
from dpfa_core.spec import AttentionProblem, NoisePlan, PrivacySpec, Sensitivity
from dpfa_mechanisms.block_diagonal import LARGEST_CONDITION, whitened
from dpfa_mechanisms.low_rank import projected
from dpfa_mechanisms.noise_energy import noise_energy, plan_multiplier
from dpfa_mechanisms.sparse import rescaled

AGREEMENT = 1e-9
"""Two correct numbers of one release differ by less than this, relative or absolute."""

LARGEST_FLOAT16 = 65504.0

REACH = {"gaussian": 8.0, "discrete_gaussian": 8.0, "laplace": 34.0}
"""In scales: noise is smaller than this but for one number in 10**14."""


def check_structure(entry: Entry, plan: NoisePlan, problem: AttentionProblem) -> None:
    """The structure has the parameters of its kind, in range, and the clip that it needs.

    Raises: PluginError.
    """
    if plan.structure is None:
        return
    try:
        noise_energy(plan, problem)
        moved(0.0, plan, problem)
    except PrivacyParameterError as error:
        raise PluginError(
            f"mechanism {entry.name!r} of {entry.origin} must plan a structure that can be made; nothing was released. "
            f"Correct the plugin. {error}"
        ) from error


def check_plan(
    entry: Entry,
    plan: NoisePlan,
    noise_multiplier: float,
    bound: Sensitivity,
    spec: PrivacySpec,
    problem: AttentionProblem,
) -> None:
    """Scales, rows, heads and structure together have `noise_multiplier` or more.

    Heads that the plan leaves without noise on purpose are left out.

    Raises: PluginError.
    """
    least = noise_multiplier * moved(bound.value, plan, problem)
    if plan.norm != bound.norm or (even(plan) and plan.head_scale[0] * plan.row_scale[0] < least):
        raise PluginError(
            f"mechanism {entry.name!r} of {entry.origin} must plan noise of scale {least:.9g} or more and a clip in "
            f"{bound.norm}, as its noise multiplier and norm say, got {plan}; nothing was released. Correct the plugin."
        )
    if even(plan) or plan.distribution == "custom":
        return
    # a head without noise counts as one with so much that it costs nothing
    endless = 2.0**40 * max(plan.head_scale)
    counted = dataclasses.replace(plan, head_scale=tuple(scale or endless for scale in plan.head_scale))
    found = plan_multiplier(counted, spec, problem)
    if found < noise_multiplier * (1.0 - AGREEMENT):
        raise PluginError(
            f"mechanism {entry.name!r} of {entry.origin} must plan noise of multiplier {noise_multiplier:.9g} or "
            f"more, as it says, got rows and heads that together have {found:.9g}; nothing was released. Correct "
            "the plugin."
        )


def check_range(plan: NoisePlan, problem: AttentionProblem) -> None:
    """float16, which ends at 65504, holds the noised output.

    Raises: PrivacyParameterError.
    """
    if problem.dtype != "float16" or problem.clip_norm is None or plan.distribution not in REACH:
        return
    parameters = {} if plan.structure is None else dict(plan.structure.parameters)
    stretched = 1.0 - parameters["sparsity"] if parameters.get("rescale") else 1.0
    scale, reach = max(plan.head_scale) * max(plan.row_scale), REACH[plan.distribution]
    largest = problem.clip_norm / stretched + reach * scale
    require(
        largest <= LARGEST_FLOAT16,
        f"clip_norm and {reach:g} scales of the noise must add up to {LARGEST_FLOAT16:g}, float16's largest number",
        float(f"{largest:.4g}"),
        "Lower clip_norm, raise epsilon, or release in bfloat16.",
    )


def moved(value: float, plan: NoisePlan, problem: AttentionProblem) -> float:
    """How far a record moves the numbers that get the noise, if it moves the output by `value`.

    With what the computation of a structure rounds.

    Raises: PrivacyParameterError for parameters that a structure needs and the plan lacks or has out of range.
    """
    structure = plan.structure
    if structure is None:
        return value
    parameters = dict(structure.parameters)
    needed = {
        "low_rank": ("rank",),
        "sparse": ("kept", "sparsity", "rescale"),
        "block_diagonal": ("block_size", "condition"),
    }[structure.kind]
    missing = [name for name in needed if name not in parameters]
    if missing:
        raise PrivacyParameterError(f"{structure.kind} noise needs the parameters {missing}, got {sorted(parameters)}.")
    if structure.kind == "low_rank":
        return projected(value, int(parameters["rank"]), problem)
    if structure.kind == "sparse":
        return rescaled(value, parameters["sparsity"], problem) if parameters["rescale"] else value
    if plan.norm != "whitened_l2" or not 1 <= parameters["condition"] <= LARGEST_CONDITION:
        raise PrivacyParameterError(
            f"block_diagonal noise needs a clip in whitened_l2 and a condition in [1, {LARGEST_CONDITION:g}], got "
            f"{plan.norm} and {parameters['condition']}."
        )
    return whitened(value, int(parameters["block_size"]), parameters["condition"], problem)
