"""What a backend's attention must keep: the function, its gradient, its clip, and silence about bad inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpfa_core.contracts import SUMMED_KEYS, Backend
from dpfa_core.spec import AttentionProblem, NoisePlan, PrivacySpec
from dpfa_mechanisms.rounding import accumulation
from dpfa_mechanisms.sensitivity import sensitivity
from dpfa_verification.conformance.bench import NO_TENSORS, SILENT, Bench, plan, transform_for
from dpfa_verification.conformance.level import Level
from dpfa_verification.conformance.obligation import Undecided, holds, obligation
from dpfa_verification.truth import attention as truth
from dpfa_verification.truth.drifting_sums import drifting
from dpfa_verification.truth.rounded_weights import neighbours

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}
"""Largest difference from float64, as a share of the largest value."""

ROW_MARGIN = {"float32": 1e-5, "bfloat16": 3 * 2.0**-8, "float16": 3 * 2.0**-11}
"""How far above the clip norm rounding may leave a row."""


class ReleaseExamination:
    """The obligations of the operation "release", noise apart."""

    def __init__(self, backend: Backend, bench: Bench, level: Level) -> None:
        self.backend, self.bench, self.level = backend, bench, level

    def problems(self, **fields: Any) -> Iterator[AttentionProblem]:
        """Problems that the backend says it supports; an examination without one decides nothing."""
        found = 0
        for problem in self.bench.problems(self.level.shapes):
            problem = replace(problem, **fields)
            if not self.backend.supports("release", problem, SILENT):
                found += 1
                yield problem
        if not found:
            raise Undecided("supports() has a reason against every problem that was tried")

    def run(
        self, inputs: tuple[Tensor, Tensor, Tensor], problem: AttentionProblem, noise: NoisePlan = SILENT
    ) -> tuple[Tensor, Any]:
        key = self.bench.key()
        scale = problem.head_dim**-0.5
        return self.backend.release(*inputs, problem, noise, NO_TENSORS, key, softmax_scale=scale)

    def true(self, inputs: tuple[Tensor, ...], problem: AttentionProblem, noise: NoisePlan = SILENT) -> Tensor:
        q, k, v = (x.cpu() for x in inputs)
        return truth.attention(q, k, v, problem, noise.norm, problem.head_dim**-0.5)

    def compare(self, what: str, found: Tensor, expected: Tensor, problem: AttentionProblem, factor: float = 1) -> None:
        allowed = factor * TOLERANCE[problem.dtype] * max(1.0, float(expected.detach().abs().amax()))
        difference = float((found.detach().double().cpu() - expected.detach()).abs().max())
        holds(
            difference <= allowed,
            f"{what} differs by {difference:.3g} from float64, allowed is {allowed:.3g}, for {problem} "
            f"(seed {self.bench.seed})",
        )

    @obligation("attention", "PRIVACY P2, from its definition in float64")
    def forward(self) -> None:
        """Without noise a release is bounded attention; the inputs stay as they were."""
        for problem in self.problems():
            inputs = self.bench.inputs(problem)
            kept = [x.clone() for x in inputs]
            out, _ = self.run(inputs, problem)
            holds(
                out.shape == inputs[0].shape and out.dtype == inputs[0].dtype,
                f"the output must be like q, it is {out.dtype} {tuple(out.shape)} for {problem}",
            )
            self.compare("the output", out, self.true(inputs, problem), problem)
            same = all(torch.equal(now, then) for now, then in zip(inputs, kept, strict=True))
            holds(same, f"release() changed its inputs for {problem}")

    @obligation("clip", "PRIVACY P2 and P10: no row is longer than the clip norm")
    def clip(self) -> None:
        for problem in self.problems():
            for norm in ("l2", "l1"):
                noise = NoisePlan(mechanism="none", distribution="none", head_scale=(0.0,), norm=norm)
                if self.backend.supports("release", problem, noise):
                    continue
                q, k, v = self.bench.inputs(problem)
                inputs = (q, k, 20 * v)
                out, _ = self.run(inputs, problem, noise)
                lengths = torch.linalg.vector_norm(out.double(), ord=1 if norm == "l1" else 2, dim=-1)
                bound = (problem.clip_norm or 0.0) * (1 + ROW_MARGIN[problem.dtype])
                holds(
                    bool((lengths <= bound).all()),
                    f"a row has the {norm} norm {float(lengths.max()):.7g}, the clip norm is {problem.clip_norm} for "
                    f"{problem} (seed {self.bench.seed})",
                )
                self.compare(f"the {norm}-clipped output", out, self.true(inputs, problem, noise), problem)

    @obligation("backward", "autograd through the float64 definition; additive noise has no gradient")
    def backward(self) -> None:
        for problem in self.problems():
            inputs = self.bench.inputs(problem)
            dout = self.bench.tensor(tuple(inputs[0].shape), inputs[0].dtype)
            leaves = [x.detach().double().cpu().requires_grad_() for x in inputs]
            expected = torch.autograd.grad(self.true(tuple(leaves), problem), leaves, dout.double().cpu())
            noise = plan(transform=transform_for(problem))
            plans = [SILENT] if self.backend.supports("release", problem, noise) else [SILENT, noise]
            for chosen in plans:
                _, saved = self.run(inputs, problem, chosen)
                found = self.backend.release_backward(dout, saved)
                for name, got, want in zip("qkv", found, expected, strict=True):
                    holds(
                        got.shape == want.shape and got.dtype == inputs[0].dtype,
                        f"d{name} must be like {name}, it is {got.dtype} {tuple(got.shape)}",
                    )
                    noisy = "" if chosen is SILENT else " after a noisy release"
                    self.compare(f"d{name}{noisy}", got, want, problem, factor=4)

    @obligation("poison", "PRIVACY P2: what is not finite becomes zeros, silently, in its own row")
    def poison(self) -> None:
        for problem in self.problems(lengths=()):
            for which, bad in ((0, torch.nan), (1, torch.inf), (2, torch.nan), (2, -torch.inf)):
                inputs = self.bench.inputs(problem)
                row = int(self.bench.dice.integers(inputs[which].shape[1]))
                inputs[which][0, row, 0, -1] = bad
                out, saved = self.run(inputs, problem)
                what = f"with {bad} in row {row} of {'qkv'[which]}"
                holds(bool(torch.isfinite(out).all()), f"the output is not finite {what}, for {problem}")
                self.compare(f"the output {what}", out, self.true(inputs, problem), problem)
                gradients = self.backend.release_backward(torch.ones_like(out), saved)
                finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
                holds(finite, f"a gradient is not finite {what}, for {problem}")
            huge = torch.finfo(getattr(torch, problem.dtype)).max
            inputs = tuple(torch.sign(x) * huge for x in self.bench.inputs(problem))
            out, _ = self.run(inputs, problem)  # type: ignore[arg-type]
            lengths = torch.linalg.vector_norm(out.double(), dim=-1)
            bound = (problem.clip_norm or 0.0) * (1 + ROW_MARGIN[problem.dtype])
            holds(
                bool((lengths <= bound).all()),
                f"inputs of the largest finite number give a row of norm {float(lengths.max())} for {problem}",
            )

    @obligation("nothing_visible", "PRIVACY P2: a row that sees no key is zero")
    def nothing_visible(self) -> None:
        for problem in self.problems(q_len=9, kv_len=4, causal=True, window=(-1, -1), lengths=()):
            out, _ = self.run(self.bench.inputs(problem), problem)
            blind = out[:, : problem.q_len - problem.kv_len]
            holds(bool((blind == 0).all()), f"a row before the first key is not zero for {problem}")

    @obligation("hidden_keys", "PRIVACY P2: a mask is visibility, applied after the logit bound")
    def hidden_keys(self) -> None:
        """What a row does not see changes nothing in it, not by a bit."""
        hidden = False
        for problem in self.problems():
            sees = truth.visible(problem)
            q, k, v = self.bench.inputs(problem)
            before, _ = self.run((q, k, v), problem)
            key = int((~sees).sum((0, 1)).argmax())
            hidden |= not bool(sees[:, :, key].all())
            other = self.bench.inputs(problem)
            k[:, key], v[:, key] = other[1][:, key], 20 * other[2][:, key]
            after, _ = self.run((q, k, v), problem)
            changed = (before != after).any(-1).any(-1).cpu() & ~sees[:, :, key]
            text = f"rows that do not see key {key} change with it, for {problem} (seed {self.bench.seed})"
            holds(not bool(changed.any()), text)
        if not hidden:
            raise Undecided("supports() has a reason against every problem that was tried and hides a key")

    @obligation("token_rounding", "PRIVACY P2: the rounding of a weight does not depend on other keys")
    def token_rounding(self) -> None:
        """Neighbours made for the row maximum and rounded weights stay within the sensitivity of one token."""
        sizes = {"batch": 1, "q_len": 1, "kv_len": 1024, "q_heads": 1, "kv_heads": 1, "head_dim": 16}
        spec = PrivacySpec(epsilon=1.0, delta=1e-5, unit="token", queries="public")
        problems = [self.bench.problem(**sizes, logit_bound=0.25, dtype=dtype) for dtype in ("bfloat16", "float16")]
        served = [problem for problem in problems if not self.backend.supports("release", problem, SILENT)]
        if not served:
            raise Undecided("supports() has a reason against long rows with a logit bound in half precision")
        for problem in served:
            outs = []
            for q, k, v in neighbours(problem):
                on_device = (q.to(self.bench.device), k.to(self.bench.device), v.to(self.bench.device))
                outs.append(self.run(on_device, problem)[0].double())
            moved = float(torch.linalg.vector_norm(outs[0] - outs[1]))
            # the output's own rounding comes after the noise
            rounded = sum(float(out.norm()) for out in outs) * torch.finfo(getattr(torch, problem.dtype)).eps / 2
            claim = sensitivity(spec, problem).value
            holds(
                moved <= claim + rounded,
                f"one of {problem.kv_len} tokens moves a row by {moved:.4g}, its sensitivity is {claim:.4g}, for "
                f"{problem}; is a weight rounded after the row's maximum is taken off?",
            )

    @obligation("long_sums", "PRIVACY P10: sums over many keys lose no more than their sensitivity allows for")
    def long_sums(self) -> None:
        """A mean of many equal values, of those that a sum in one go rounds the same way each time."""
        sizes = {"batch": 1, "q_len": 1, "kv_len": 1 << 14, "q_heads": 1, "kv_heads": 1, "head_dim": 16}
        # weights are exp(-logit_bound) here, which drifts, too
        bound = -math.log(float(drifting(sizes["kv_len"], 1)) / 2)
        problem = self.bench.problem(**sizes, clip_norm=16.0, logit_bound=bound)
        if self.backend.supports("release", problem, SILENT):
            raise Undecided("supports() has a reason against a row of 16384 keys in float32")
        value = drifting(problem.kv_len, problem.head_dim)
        q, k = torch.zeros(1, 1, 1, problem.head_dim), torch.zeros(1, problem.kv_len, 1, problem.head_dim)
        inputs = (q, k, value.expand(k.shape).contiguous())
        out, _ = self.run(tuple(x.to(self.bench.device) for x in inputs), problem)  # type: ignore[arg-type]
        off = float((out.double().cpu().flatten() - value.double()).norm() / value.double().norm())
        allowed = accumulation(problem.kv_len)
        holds(
            off <= allowed,
            f"a mean of {problem.kv_len} equal values is off by {off:.3g} of it, allowed is {allowed:.3g}, for "
            f"{problem}; does a sum of more than {SUMMED_KEYS} keys take one after the other?",
        )
