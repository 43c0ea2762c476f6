"""The backend: torch's, with its noise from the compiled library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpfa_core.contracts import NoiseKey
from dpfa_core.errors import PluginError
from dpfa_core.spec import AttentionProblem, NoisePlan, Reasons
from dpfa_kernels_cpu.library import library
from dpfa_kernels_cpu.norms import bare_squares, embedding_squares
from dpfa_kernels_cpu.release_run import add_release_run_
from dpfa_kernels_cpu.training_run import add_run_
from dpfa_kernels_torch.backend import TorchBackend
from dpfa_kernels_torch.noise.training_noise import add_training_noise_
from dpfa_kernels_torch.per_sample.rule import float32_above


class CpuBackend(TorchBackend):
    """Private releases and training on CPUs.

    Matrix products are torch's own, the fastest there are; so is discrete noise, and that of Philox keys. Squared
    norms are summed here where one pass is all there is to do: float32 gradients in memory, and embedding tables.

    Guarantee: tested (each method names its own).
    """

    name = "cpu"
    release_run = staticmethod(add_release_run_)

    def supports(self, op: str, problem: AttentionProblem | None, plan: NoisePlan | None) -> Reasons:
        """Reasons against running `op`, one sentence each."""
        try:
            library()
        except PluginError as error:
            return (str(error),)
        reasons = super().supports(op, problem, plan)
        if problem is not None and problem.device != "cpu":
            reasons += (f"The native CPU kernels run on the cpu, got {problem.device}.",)
        return reasons

    def sqnorm(self, kind: str, saved: tuple[Any, ...], *, method: str = "auto") -> Tensor:
        """An upper bound of each sample's squared gradient norm, as torch's backend has it; see there.

        Guarantee: tested (against exact sums, and torch's).
        """
        if method != "auto" or kind not in ("bare", "embedding") or not _is_native(saved[kind == "embedding"]):
            return super().sqnorm(kind, saved, method=method)
        return float32_above(bare_squares(saved[0]) if kind == "bare" else embedding_squares(*saved))

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
        """Gaussian noise on a summed gradient, in place, as torch's backend adds it; see ``training_noise`` there.

        Guarantee: tested (equal to torch's in float32, to rounding in float64).
        """
        return add_training_noise_(
            grad, std, key, parameter=parameter, step=step, first_element=first_element, run=add_run_
        )


def _is_native(gradient: Tensor) -> bool:
    return gradient.dtype == torch.float32 and gradient.device.type == "cpu" and gradient.is_contiguous()
