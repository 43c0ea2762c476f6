"""Adam whose second moment is that of the gradients: the variance that the noise adds is taken away again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from dpfa_core.checks import fraction, non_negative, positive, require
from dpfa_core.errors import NotPrivateError
from dpfa_training.guard import engine_of_parameter

USUAL_FLOOR = 0.01
"""The default floor of the second moment, as a share of the noise's variance."""

NO_NOISE_FLOOR = 1e-16
"""The same without noise: the square of Adam's eps."""


class DPAdamBC(torch.optim.Optimizer):
    """DP-Adam with bias correction of the noise, for a module that ``make_private`` has prepared.

    Noise of std s on each coordinate raises Adam's second moment by s^2, which then decides the step's length
    wherever gradients are small. The step here is ``-lr m / sqrt(max(v - s^2, variance_floor))``, with m and v
    corrected for their start as in Adam. Where gradients were privatised with different stds, as under a moving
    threshold, s^2 is the mean with the weights that v gives them. Without noise it is Adam with eps = 0, down to
    the floor.

    Guarantee: tested. It reads nothing but noised gradients and public numbers.
    Args:
        lr: step size.
        betas: decay of the first and the second moment.
        variance_floor: the least second moment, in squared units of the gradient handed to the optimiser; about
            the square of the smallest gradient that shall count. Below it, and above all in the first steps, the
            difference is mostly the noise of v. By default 1 % of s^2, which lets no coordinate go much further than
            ten times as far as under DP-Adam.
        weight_decay: decoupled, as in AdamW.
    Raises: PrivacyParameterError; NotPrivateError at a step of parameters without an engine, which alone knows s.
    Source: Tang, Shpilevskiy & Lécuyer 2024, "DP-AdamBC", Algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        variance_floor: float | None = None,
        *,
        weight_decay: float = 0.0,
    ) -> None:
        positive("lr", lr)
        require(isinstance(betas, tuple | list) and len(betas) == 2, "betas must be two numbers", betas)
        for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
            fraction(name, beta)
        if variance_floor is not None:
            positive("variance_floor", variance_floor)
        non_negative("weight_decay", weight_decay)
        defaults = {"lr": lr, "betas": betas, "variance_floor": variance_floor, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step for the parameters that have a gradient: all of them after a whole draw, none within one."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, _noise_std(parameter))

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], noise_std: float) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        gradient = parameter.grad
        if not state:
            state["step"], state["noise_square"] = 0, 0.0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["noise_square"] = beta2 * state["noise_square"] + (1.0 - beta2) * noise_std**2
        mean = state["exp_avg"].lerp_(gradient, 1.0 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        seen = 1.0 - beta2 ** state["step"]
        floor = group["variance_floor"]
        if floor is None:
            floor = max(NO_NOISE_FLOOR, USUAL_FLOOR * state["noise_square"] / seen)
        variance = square.sub(state["noise_square"]).div_(seen).clamp_min_(floor)
        if group["weight_decay"]:
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(mean, variance.sqrt_(), value=-group["lr"] / (1.0 - beta1 ** state["step"]))


def _noise_std(parameter: torch.Tensor) -> float:
    """Of each coordinate of the gradient that the parameter's engine handed over last."""
    engine = engine_of_parameter(parameter)
    std = getattr(engine, "coordinate_noise_std", None)
    if std is None:
        raise NotPrivateError(
            "DPAdamBC must know the noise in the gradients, got a parameter without a private engine; pass module and "
            "optimiser to make_private, or use torch.optim.Adam."
        )
    return float(std)
