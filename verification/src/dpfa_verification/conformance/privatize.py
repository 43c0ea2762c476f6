"""What clip-and-noise in place must keep: it is the epilogue of a release."""

from __future__ import annotations

import torch

from dpfa_core.contracts import Backend
from dpfa_verification.conformance.bench import NO_TENSORS, SILENT, Bench, plan, transform_for
from dpfa_verification.conformance.level import Level
from dpfa_verification.conformance.obligation import Undecided, holds, obligation
from dpfa_verification.conformance.release import ROW_MARGIN, TOLERANCE
from dpfa_verification.truth.attention import clipped, finite_rows


class PrivatizeExamination:
    """The obligations of the operation "privatize", the law of its noise apart."""

    def __init__(self, backend: Backend, bench: Bench, level: Level) -> None:
        self.backend, self.bench, self.level = backend, bench, level

    @obligation("privatize_clip", "PRIVACY P2, in float64")
    def clip(self) -> None:
        """Without noise: rows clipped, non-finite ones zero, in place."""
        tried = 0
        for problem in self.bench.problems(self.level.shapes):
            if self.backend.supports("privatize", problem, SILENT):
                continue
            tried += 1
            x = self.bench.inputs(problem, scale=3.0)[0]
            if problem.q_len > 1:
                x[0, 1, 0, 0] = torch.nan
            expected = clipped(finite_rows(x.cpu()), problem.clip_norm or 1.0, "l2")
            out = self.backend.privatize_(x, problem, SILENT, NO_TENSORS, self.bench.key(), clip_rows=True)
            holds(out.data_ptr() == x.data_ptr(), "privatize_() must work in place and return its argument")
            difference = float((x.double().cpu() - expected).abs().max())
            allowed = TOLERANCE[problem.dtype] * (problem.clip_norm or 1.0)
            holds(difference <= allowed, f"clipped rows differ by {difference:.3g} from float64 for {problem}")
            longest = float(torch.linalg.vector_norm(x.double(), dim=-1).max())
            bound = (problem.clip_norm or 1.0) * (1 + ROW_MARGIN[problem.dtype])
            holds(longest <= bound, f"a clipped row has the norm {longest:.7g}, allowed is {bound:.7g} for {problem}")
        if not tried:
            raise Undecided("supports() has a reason against every problem that was tried")

    @obligation("epilogue", "privatize_ after noiseless attention is release with the same key")
    def epilogue(self) -> None:
        if "release" not in self.backend.ops:
            raise Undecided("the backend does not offer release")
        tried = 0
        for problem in self.bench.problems(self.level.shapes):
            noise = plan(transform=transform_for(problem), head_scale=(0.3,))
            if self.backend.supports("privatize", problem, noise) or self.backend.supports("release", problem, noise):
                continue
            tried += 1
            inputs, key, scale = self.bench.inputs(problem), self.bench.key(), problem.head_dim**-0.5
            whole, _ = self.backend.release(*inputs, problem, noise, NO_TENSORS, key, softmax_scale=scale)
            x, _ = self.backend.release(*inputs, problem, SILENT, NO_TENSORS, key, softmax_scale=scale)
            clip_rows = problem.clip == "output"
            self.backend.privatize_(x, problem, noise, NO_TENSORS, key, clip_rows=clip_rows)
            difference = float((x.double() - whole.double()).abs().max())
            # A backend that noises before its only rounding is one rounding away from noise on a rounded row.
            allowed = TOLERANCE[problem.dtype] * max(1.0, float(whole.double().abs().max()))
            holds(difference <= allowed, f"privatize_ and release differ by {difference:.3g} for {problem}")
        if not tried:
            raise Undecided("supports() has a reason against every problem that was tried")
