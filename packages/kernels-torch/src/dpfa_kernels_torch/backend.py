"""The backend: plain torch, every device with float64, nothing hidden."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpfa_core.checks import one_of, require
from dpfa_core.contracts import CounterLayout, NoiseKey, PlanTensors
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, NoisePlan, Norm, Reasons
from dpfa_kernels_torch.attention import (
    MAX_LOGIT_BOUND,
    attention,
    attention_backward,
    cleaned_inputs,
    cleaned_inputs_backward,
)
from dpfa_kernels_torch.epilogue import epilogue
from dpfa_kernels_torch.noise.discrete_noise import DISCRETE_LAYOUTS, LARGEST
from dpfa_kernels_torch.noise.draw import TRANSFORMS
from dpfa_kernels_torch.noise.layout import LAYOUTS, RELEASE_FIELDS
from dpfa_kernels_torch.noise.release_noise import ReleaseRun
from dpfa_kernels_torch.noise.release_run import add_release_run_
from dpfa_kernels_torch.noise.training_noise import add_training_noise_
from dpfa_kernels_torch.per_sample import RULES
from dpfa_kernels_torch.per_sample.rule import Rule, float32_above
from dpfa_kernels_torch.precision import plain_arithmetic, working_dtype
from dpfa_kernels_torch.products import product
from dpfa_kernels_torch.structures import against_structure, fitting


class Saved(NamedTuple):
    """What the backward of a release needs: its inputs, the public structure, and no result."""

    q: Tensor
    k: Tensor
    v: Tensor
    problem: AttentionProblem
    norm: Norm
    tensors: PlanTensors
    softmax_scale: float
    bias: Tensor | None = None


class TorchBackend:
    """Private attention and per-sample gradients in torch operations alone.

    Guarantee: tested (each method names its own).
    """

    contract_version = 1
    name = "torch"
    ops = frozenset({"release", "privatize", "training", "per_sample"})
    release_run: ReleaseRun = staticmethod(add_release_run_)
    """What adds the ChaCha20 noise of a release on the CPU."""

    def supports(self, op: str, problem: AttentionProblem | None, plan: NoisePlan | None) -> Reasons:
        """Reasons against running `op`, one sentence each."""
        if op not in self.ops:
            return (f"op must be one of {sorted(self.ops)}, got {op!r}.",)
        if op in ("training", "per_sample"):
            return ()
        if problem is None or plan is None:
            return (f"{op} needs a problem and a plan.",)
        return (*_against_problem(problem), *_against_plan(problem, plan))

    def counter_layout(self, op: str, *, generator: str = "chacha20", transform: str | None = None) -> CounterLayout:
        """The counter map of "release", "privatize" (the same) or "training".

        Args: transform: "bm32", "bm64", or "discrete" for discrete Gaussian noise; by default bm32 for releases, bm64
        for training.
        """
        one_of("op", op, sorted(self.ops))
        require(op != "per_sample", "op must be one that draws noise", op)
        purpose = "training" if op == "training" else "release"
        if transform == "discrete" and purpose == "release":
            one_of("generator", generator, list(DISCRETE_LAYOUTS))
            return DISCRETE_LAYOUTS[generator]
        chosen = (purpose, generator, transform or ("bm64" if op == "training" else "bm32"))
        one_of("(purpose, generator, transform)", chosen, list(LAYOUTS))
        return LAYOUTS[chosen]

    def release(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        problem: AttentionProblem,
        plan: NoisePlan,
        tensors: PlanTensors | None,
        key: NoiseKey | None,
        *,
        softmax_scale: float,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Saved]:
        """Attention clipped, noised in float32 and rounded once.

        Non-finite inputs never raise and are never counted: a row of q, k or v that holds one is zero, so
        is a logit, and so is an output row whose norm is not finite.

        Guarantee: tested (against a definition in loops; noise law; bitwise repeatable for one key).
        Args:
            q: [B, S, H, D]; k, v: [B, Sk, Hk, D]; one dtype and device, those of `problem`.
            tensors: of the plan's structure, made from its public seed; None where it has none.
            key: of purpose "release" on q's device; None where the plan adds no noise.
            bias: public, where the problem is ``biased``: [B or 1, H or 1, S, Sk], added to the logits before they are
                bounded, or slopes [B or 1, H].
        Returns: (out in q's dtype [B, S, H, D], what ``release_backward`` needs).
        Raises: PrivacyParameterError where ``supports`` has a reason, or tensors or key do not fit.
        Source: PRIVACY P2, P10.
        """
        self._refuse("release", problem, plan)
        B, H, Hk, D = problem.batch, problem.q_heads, problem.kv_heads, problem.head_dim
        _fits("q", q, (B, problem.q_len, H, D), problem, q.device)
        _fits("k", k, (B, problem.kv_len, Hk, D), problem, q.device)
        _fits("v", v, (B, problem.kv_len, Hk, D), problem, q.device)
        _key_fits(key, plan, q.device)
        _bias_fits(bias, problem, q.device)
        tensors = fitting(tensors, problem, plan, q.device)
        with plain_arithmetic(q.device):
            cleaned = cleaned_inputs(q, k, v, problem, plan.norm, working_dtype(q), tensors.whiten)
            rows = attention(*cleaned, problem, softmax_scale, bias).to(_noise_dtype(q))
            clip = problem.clip == "output" and problem.clip_norm is not None
            out = epilogue(rows, problem, plan, tensors, key, clip=clip, run=self.release_run).to(q.dtype)
        return out, self.saved(q, k, v, problem, plan, tensors, softmax_scale=softmax_scale, bias=bias)

    def saved(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        problem: AttentionProblem,
        plan: NoisePlan,
        tensors: PlanTensors | None,
        *,
        softmax_scale: float,
        bias: Tensor | None = None,
    ) -> Saved:
        """What ``release`` saves for its backward, which is no result of it: inputs and public tensors."""
        tensors = fitting(tensors, problem, plan, q.device)
        return Saved(q.detach(), k.detach(), v.detach(), problem, plan.norm, tensors, softmax_scale, bias)

    def release_backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients for q, k and v. Noise and bias have none; clipped rows are projected.

        Guarantee: tested (finite differences in float64).
        Args: dout: [B, S, H, D].
        Returns: (dq, dk, dv) in the inputs' dtype.
        """
        q, k, v, problem, norm, tensors, softmax_scale, bias = saved
        with plain_arithmetic(q.device):
            dtype = working_dtype(q)
            dout = dout.to(dtype)
            if tensors.project is not None:
                dout = product(product(dout, tensors.mix), tensors.project.T)
            cleaned = cleaned_inputs(q, k, v, problem, norm, dtype, tensors.whiten)
            grads = attention_backward(dout, *cleaned, problem, norm, softmax_scale, tensors.whiten, bias)
            return cleaned_inputs_backward(grads, q, k, v, problem, norm, dtype, tensors.whiten)

    def privatize_(
        self,
        x: Tensor,
        problem: AttentionProblem,
        plan: NoisePlan,
        tensors: PlanTensors | None,
        key: NoiseKey | None,
        *,
        clip_rows: bool,
    ) -> Tensor:
        """Clip (if asked) and noise attention's output in place: the epilogue of ``release``.

        Guarantee: tested (bitwise equal to ``release``).
        Args:
            x: [B, S, H, D], the noiseless output in any dtype of the contract.
            clip_rows: clip each row to the problem's clip norm, in the plan's norm.
        Returns: x.
        Raises: as ``release``.
        """
        self._refuse("privatize", problem, plan)
        tensors = fitting(tensors, problem, plan, x.device)
        _fits("x", x, (problem.batch, problem.q_len, problem.q_heads, problem.head_dim), problem, x.device)
        _key_fits(key, plan, x.device)
        require(
            not clip_rows or problem.clip_norm is not None,
            "clip_rows needs a problem with a clip_norm",
            problem.clip_norm,
        )
        with plain_arithmetic(x.device):
            rows = x.to(_noise_dtype(x))
            return x.copy_(epilogue(rows, problem, plan, tensors, key, clip=clip_rows, run=self.release_run))

    def sqnorm(self, kind: str, saved: tuple[Any, ...], *, method: str = "auto") -> Tensor:
        """An upper bound of each sample's squared gradient norm, accumulated in float64.

        | kind | saved |
        |---|---|
        | linear | input [B, T, d], output gradient [B, T, p] |
        | embedding | ids [B, T], output gradient [B, T, d], rows, padding_idx or None |
        | scale | normalised input [B, T, d], output gradient [B, T, d] |
        | shift | output gradient [B, T, p] |
        | bare | gradient of each sample [B, *shape] |
        | tied | ids [B, S], their gradient [B, S, d], rows, padding_idx or None, hidden [B, T, d], logits' gradient |

        Guarantee: tested (against exact per-sample gradients; cancellation and bfloat16 cases by name).
        Args: method: for "linear" also "direct" or "gram"; "auto" takes the one with fewer multiplications.
        Returns: float32 [B], rounded up; infinity for a sample whose gradient is not finite.
        Raises: PrivacyParameterError for another kind or method, or shapes that do not fit.
        Source: TRAINING, exact formulas.
        """
        rule = _rule(kind)
        one_of(f"the method of {kind!r}", method, ("auto", *rule.methods))
        with plain_arithmetic(rule.gradient(saved).device):
            return float32_above(rule.sqnorm(saved, method))

    def clipped_grad(self, kind: str, saved: tuple[Any, ...], factors: Tensor) -> Tensor:
        """The sum over samples of factors[i] times the gradient of sample i.

        A sample with factor 0 is left out, whatever its values: that is how a sample whose gradient is not
        finite is removed.

        Guarantee: tested (against exact per-sample gradients).
        Args:
            saved: as in ``sqnorm``.
            factors: float32 [B], finite and >= 0.
        Returns: float32 (float64 for float64 inputs), in the parameter's shape.
        Raises: PrivacyParameterError for another kind, factors or shapes that do not fit.
        Source: PRIVACY P7: factors multiply in float32 or better.
        """
        rule, saved, factors = _weighted(kind, saved, factors)
        with plain_arithmetic(factors.device):
            grad = rule.clipped_grad(saved, factors)
        return grad.to(torch.promote_types(rule.gradient(saved).dtype, torch.float32))

    def add_clipped_grad_(self, total: Tensor, kind: str, saved: tuple[Any, ...], factors: Tensor) -> Tensor:
        """``clipped_grad`` added to `total` (its shape, float32 or float64), in place.

        Guarantee: tested. Returns: `total`. Raises: as ``clipped_grad``.
        """
        rule, saved, factors = _weighted(kind, saved, factors)
        with plain_arithmetic(factors.device):
            if rule.add_clipped_grad_ is not None:
                return rule.add_clipped_grad_(total, saved, factors)
            return total.add_(rule.clipped_grad(saved, factors))

    def per_sample_grad(self, kind: str, saved: tuple[Any, ...]) -> Tensor:
        """Every sample's gradient, for layers where that costs less than a norm without it.

        ``sqnorm("bare", ...)`` and ``clipped_grad("bare", ...)`` of the result are then exact: what is measured is
        what is summed.

        Guarantee: tested (against exact per-sample gradients).
        Args: kind: "linear" or "tied"; saved: as in ``sqnorm``.
        Returns: float32 (float64 for float64 inputs) [B, *shape].
        Raises: PrivacyParameterError for a kind that has no such form, or shapes that do not fit.
        """
        rule = _rule(kind)
        if rule.per_sample is None:
            raise PrivacyParameterError(
                f"per_sample_grad offers the kinds 'linear' and 'tied', got {kind!r}; use sqnorm."
            )
        with plain_arithmetic(rule.gradient(saved).device):
            return rule.per_sample(saved)

    def add_noise_(
        self,
        grad: Tensor,
        std: float,
        key: NoiseKey,
        *,
        parameter: int,
        step: int,
        first_element: int = 0,
    ) -> Tensor:
        """Gaussian noise on a summed gradient, in place; see ``noise.training_noise``."""
        return add_training_noise_(grad, std, key, parameter=parameter, step=step, first_element=first_element)

    def _refuse(self, op: str, problem: AttentionProblem, plan: NoisePlan) -> None:
        reasons = self.supports(op, problem, plan)
        if reasons:
            raise PrivacyParameterError(f"the {self.name} backend cannot run {op!r} here: {' '.join(reasons)}")


def _weighted(kind: str, saved: tuple[Any, ...], factors: Tensor) -> tuple[Rule, tuple[Any, ...], Tensor]:
    """The rule, and what is left once the samples with factor 0 are taken out."""
    rule = _rule(kind)
    batch = len(rule.gradient(saved))
    require(factors.shape == (batch,), f"factors must have the shape ({batch},)", tuple(factors.shape))
    used = factors != 0
    require(
        bool((torch.isfinite(factors) & (factors >= 0)).all()),
        "clip factors must be finite and >= 0",
        "another value",
        "Give 0 to a sample whose norm is not finite.",
    )
    if not used.all():
        saved = tuple(x[used] if isinstance(x, Tensor) else x for x in saved)
        factors = factors[used]
    return rule, saved, factors


def _against_problem(problem: AttentionProblem) -> Reasons:
    bounds = dict(RELEASE_FIELDS)
    sizes = {
        "batch": problem.batch,
        "head": problem.q_heads,
        "row": problem.q_len,
        "column": problem.head_dim,
    }
    reasons = [
        f"The noise counter numbers at most {bounds[name]} of {name}, got {size}."
        for name, size in sizes.items()
        if size > bounds[name]
    ]
    if problem.logit_bound is not None and problem.logit_bound > MAX_LOGIT_BOUND:
        reasons.append(f"logit_bound must be at most {MAX_LOGIT_BOUND}, got {problem.logit_bound}; use None.")
    if problem.device.startswith("mps"):
        reasons.append("Noise is computed in float64, which mps lacks; use the cpu.")
    return tuple(reasons)


def _against_plan(problem: AttentionProblem, plan: NoisePlan) -> Reasons:
    reasons = []
    reasons.extend(against_structure(problem, plan))
    if len(plan.head_scale) not in (1, problem.q_heads):
        reasons.append(f"head_scale must have 1 or {problem.q_heads} entries, got {len(plan.head_scale)}.")
    if len(plan.row_scale) not in (1, problem.kv_len + 1):
        reasons.append(f"row_scale must have 1 or {problem.kv_len + 1} entries, got {len(plan.row_scale)}.")
    if plan.distribution == "none":
        return tuple(reasons)
    if plan.distribution == "discrete_gaussian":
        reasons.extend(_against_grid(plan))
    elif (plan.distribution, plan.transform) not in TRANSFORMS:
        offered = ", ".join(f"{name} by {transform}" for name, transform in TRANSFORMS)
        offered += ", discrete_gaussian"
        reasons.append(f"Noise here is {offered}; got {plan.distribution} by {plan.transform}.")
    if problem.clip_norm is None:
        reasons.append("Noise without a clip_norm hides nothing; set clip_norm.")
    if plan.distribution == "gaussian" and plan.transform == "bm32" and problem.dtype in ("float32", "float64"):
        reasons.append(f"{problem.dtype} outputs show where a 32-bit sampler ends; use transform='bm64'.")
    return tuple(reasons)


def _against_grid(plan: NoisePlan) -> Reasons:
    if plan.grid <= 0 or math.frexp(plan.grid)[0] != 0.5:
        return (f"Discrete noise needs a grid that is a power of two, got {plan.grid}.",)
    largest = max(plan.head_scale) * max(plan.row_scale)
    if largest >= LARGEST * plan.grid:
        return (f"The scale of discrete noise must be below 2**46 grids, got {largest / plan.grid:.4g}.",)
    return ()


def _fits(name: str, x: Tensor, shape: tuple[int, ...], problem: AttentionProblem, device: torch.device) -> None:
    require(
        tuple(x.shape) == shape and x.dtype == getattr(torch, problem.dtype) and x.device == device,
        f"{name} must be {problem.dtype} {list(shape)} on {device}, as the problem says",
        f"{x.dtype} {list(x.shape)} on {x.device}",
    )


def _bias_fits(bias: Tensor | None, problem: AttentionProblem, device: torch.device) -> None:
    if bias is None or not problem.biased:
        require(
            bias is None and not problem.biased,
            "bias must come with a biased problem, and only then",
            f"biased={problem.biased} and bias {'None' if bias is None else list(bias.shape)}",
        )
        return
    sizes = (problem.batch, problem.q_heads, problem.q_len, problem.kv_len)
    good = (
        bias.device == device
        and bias.is_floating_point()
        and bias.shape[0] in (1, sizes[0])
        and (
            (bias.dim() == 2 and bias.shape[1] == sizes[1])
            or (bias.dim() == 4 and bias.shape[1] in (1, sizes[1]) and bias.shape[2:] == sizes[2:])
        )
    )
    require(
        good,
        f"bias must be floating-point [{sizes[0]} or 1, {sizes[1]} or 1, {sizes[2]}, {sizes[3]}] or slopes "
        f"[{sizes[0]} or 1, {sizes[1]}], on {device}",
        f"{bias.dtype} {list(bias.shape)} on {bias.device}",
    )


def _key_fits(key: NoiseKey | None, plan: NoisePlan, device: torch.device) -> None:
    if plan.distribution == "none":
        return
    purpose = None if key is None else key.purpose
    require(purpose == "release", 'the noise key must have the purpose "release"', purpose)
    require(key.words.device == device, f"the noise key must be on {device}", str(key.words.device))


def _noise_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rule(kind: str) -> Rule:
    one_of("kind", kind, tuple(RULES))
    return RULES[kind]
