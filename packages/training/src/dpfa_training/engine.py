"""The DP-SGD engine of one module: forward recorded, backward clipped, step noised and written down.

The user's loop stays as it is. Whatever would leave the guarantee (another sampler, another optimiser, a
second forward on the same batch, a gradient that came around the engine) raises before anything is
released.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dpfa_core.errors import BudgetExhausted, NotPrivateError
from dpfa_core.ledger import Ledger
from dpfa_core.selection import backend as load_backend
from dpfa_core.selection import select
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_training import guard
from dpfa_training.clipping import clipped_sums
from dpfa_training.plan import TrainingPlan
from dpfa_training.recording import Recording
from dpfa_training.sampling import PhysicalBatch
from dpfa_training.self_check import self_check
from dpfa_training.tape import Tape

NOT_COVERED = (
    "Loss, accuracy, gradient norms and clip fractions seen during training are functions of the private "
    "data; they are not covered by epsilon.",
    "The loss is assumed to be a mean (or sum) over rows of terms that depend on their own row only, where "
    "the module does not compute it itself.",
    "Noise is drawn in floating point (53-bit radius); the finite tail and the rounding of the noised "
    "sum are not part of epsilon.",
)


class Engine:
    """Attached to one module and one optimiser by ``make_private``.

    Guarantee: tested. After k steps the parameters are (epsilon, delta)-DP with the epsilon that
    ``get_epsilon(delta)`` computes from the ledger; unit and relation are the ledger's.
    """

    def __init__(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: TrainingPlan,
        keys: KeySource,
        ledger: Ledger,
        planned_steps: int | None = None,
        backend: str = "auto",
    ) -> None:
        self.plan, self.ledger, self.keys, self.planned_steps = plan, ledger, keys, planned_steps
        self.recording = Recording(module)
        self.optimizer = weakref.ref(optimizer)
        self.backend_name = select("training", None, None, backend).name
        self._backend = load_backend(self.backend_name)
        self.steps = 0
        """Optimiser steps taken; also the counter of the noise."""
        self.checked_samples = 0
        """How many samples the self-check compared; 0 until the first batch."""
        self.non_finite_samples = 0
        """Samples whose gradient was not finite and added nothing; a private figure."""
        self._sums: dict[str, torch.Tensor] = {}
        self._handed: dict[str, tuple[torch.Tensor, int]] = {}
        self._batch: PhysicalBatch | None = None
        self._forwarded = self._clipped = self._stepped = False
        _check_optimizer(self.recording, optimizer)
        guard.watch(self, self.recording.parameters.values())
        self._hooks = (
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            module.register_forward_hook(self._after_forward, always_call=True),
        )

    # ---- what the user asks

    def get_epsilon(self, delta: float | None = None, accountant: str = "auto") -> float:
        """Epsilon spent so far at `delta`, from the ledger; an upper bound."""
        return self.ledger.spent(delta, accountant)

    @property
    def in_draw(self) -> bool:
        """Whether gradients of an unfinished draw are held."""
        return bool(self._sums)

    def detach(self) -> None:
        """Give the module back to ordinary training; what was spent stays in the ledger."""
        for hook in self._hooks:
            hook.remove()
        guard.release(self.recording.parameters.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """A copied model is an ordinary model: its hooks lead here and are ignored."""
        return self

    # ---- the sampler

    def announce(self, batch: PhysicalBatch) -> None:
        """The loop is about to see the rows of `batch`."""
        before = self._batch
        if before is not None and before.draw != batch.draw and before.last and not self._stepped:
            raise NotPrivateError(
                f"every batch drawn must be used, got no step for draw {before.draw}: a skipped batch is a "
                "choice that depends on the data. Call backward and step for every batch of the loader."
            )
        if before is None or before.draw != batch.draw:
            self._sums.clear()  # parts of a draw that the loop left early were never released
        self._batch, self._forwarded, self._clipped, self._stepped = batch, False, False, False

    # ---- forward

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is not self.recording.module or not (module.training and torch.is_grad_enabled()):
            return
        rows = _rows(args, kwargs)
        batch = self._current_batch(rows)
        if not self.checked_samples:
            self.checked_samples = self_check(self.recording, self._backend, args, kwargs, rows, self.plan.reduction)
        self._forwarded = True

        def finish(tape: Tape) -> None:
            self._clip(tape, batch)

        self.recording.start(Tape(rows, finish))

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self.recording.module:
            self.recording.stop()

    def _current_batch(self, rows: int) -> PhysicalBatch:
        if self.plan.sampling == "none":
            return PhysicalBatch(self.steps, (), torch.ones(rows), True)
        batch = self._batch
        if batch is None or self._forwarded:
            problem = "a second forward on the same batch" if batch else "a forward without a batch"
            raise NotPrivateError(
                f"a training forward needs its own batch from the private loader, got {problem}; iterate "
                "over the loader that make_private returned, and evaluate under module.eval() or "
                "torch.no_grad()."
            )
        if rows != len(batch.weights):
            raise NotPrivateError(
                f"the module must get the rows that the private loader drew ({len(batch.weights)}), got "
                f"{rows}; pass them on unchanged."
            )
        return batch

    # ---- backward

    def _clip(self, tape: Tape, batch: PhysicalBatch) -> None:
        scale = tape.rows if self.plan.reduction == "mean" else 1
        sums, norms = clipped_sums(
            self._backend,
            tape,
            weights=batch.weights,
            max_grad_norm=self.plan.max_grad_norm,
            scale=float(scale),
        )
        self.non_finite_samples += int((~norms.isfinite()).sum())
        for name, value in sums.items():
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value
        self._clipped = True

    # ---- step

    def before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...]) -> None:
        """Called for every optimiser that holds one of the parameters, before it looks at a gradient.

        Raises: NotPrivateError, BudgetExhausted or LedgerError; the parameters are then unchanged.
        """
        if optimizer is not self.optimizer():
            raise NotPrivateError(
                f"only the optimiser given to make_private may change the private parameters, got another "
                f"{type(optimizer).__name__}; use one optimiser, or detach the engine first."
            )
        if any(argument is not None for argument in args):
            raise NotPrivateError("step must be called without a closure, which would draw several gradients.")
        self._check_gradients()
        last = self.plan.sampling == "none" or (self._batch is not None and self._batch.last)
        if not self._clipped:
            raise NotPrivateError(
                "a step needs a batch that went through forward and backward, got none since the last step; "
                "call backward once for every batch of the private loader, then step."
            )
        if not last:  # part of a draw: the optimiser skips parameters without a gradient
            self._hand({})
            return
        if self.planned_steps is not None and self.steps >= self.planned_steps:
            raise BudgetExhausted(
                f"the noise was calibrated for {self.planned_steps} steps and all are taken; nothing was "
                "released. Stop here, or plan more epochs from the start."
            )
        self.ledger.record(self.plan.event(), purpose="training", mechanism="gaussian", backend=self.backend_name)
        self._hand(self._noised())
        self.steps += 1
        self._sums.clear()
        self._clipped, self._stepped = False, True

    def _noised(self) -> dict[str, torch.Tensor]:
        gradients = {}
        key = self.keys.key("training")
        divisor = self.plan.expected_batch_size if self.plan.reduction == "mean" else 1
        for index, (name, parameter) in enumerate(self.recording.parameters.items()):
            total = self._sums.get(name)
            if total is None:
                total = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            total = total.reshape(parameter.shape).contiguous()
            if self.plan.noisy:
                self._backend.add_noise_(total, self.plan.noise_std, key, parameter=index, step=self.steps)
            gradients[name] = (total / divisor).to(parameter.dtype)
        return gradients

    def _check_gradients(self) -> None:
        for name, parameter in self.recording.parameters.items():
            handed, version = self._handed.get(name, (None, 0))
            if parameter.grad is None or (parameter.grad is handed and parameter.grad._version == version):
                continue
            raise NotPrivateError(
                f"the gradient of {name!r} must come from the engine, got one that was set or changed "
                "outside; train through the loader and the module's forward in train() mode, keep penalties in "
                "the optimiser (weight_decay), and do not clip again."
            )

    def _hand(self, gradients: dict[str, torch.Tensor]) -> None:
        self._handed = {}
        for name, parameter in self.recording.parameters.items():
            parameter.grad = gradients.get(name)
            if parameter.grad is not None:
                self._handed[name] = (parameter.grad, parameter.grad._version)


def _rows(args: Any, kwargs: Any) -> int:
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            return int(leaf.shape[0])
    raise NotPrivateError("the module must get a tensor with one row per sample, got none.")


def _check_optimizer(recording: Recording, optimizer: torch.optim.Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in recording.parameters.items() if id(parameter) not in held]
    if missing:
        raise NotPrivateError(
            f"the optimiser must hold every trainable parameter, got none of {missing}; add them or freeze "
            "them with requires_grad_(False)."
        )
    if len(held) > len(recording.parameters):
        raise NotPrivateError(
            f"the optimiser must hold the module's {len(recording.parameters)} trainable parameters and "
            f"nothing else, got {len(held)}; give foreign or frozen parameters to another optimiser."
        )
