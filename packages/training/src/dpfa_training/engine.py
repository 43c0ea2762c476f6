"""The DP-SGD engine of one module: forward recorded, backward clipped, step noised and written down.

The user's loop stays as it is. Whatever would leave the guarantee (another sampler, another optimiser, a
second forward on the same batch, a gradient that came around the engine) raises before anything is
released.
"""

from __future__ import annotations

import hashlib
import time
import weakref
from typing import Any

import numpy as np
import torch
from torch import nn

from dpfa_core.checks import require
from dpfa_core.errors import NotPrivateError
from dpfa_core.ledger import Ledger
from dpfa_core.selection import backend as load_backend
from dpfa_core.selection import select
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_training import guard, loss_check
from dpfa_training.adaptive_clipping import COUNT, COUNT_PARAMETER, MovingThreshold, QuantileClipping
from dpfa_training.buffers import Buffers
from dpfa_training.charges import Charges
from dpfa_training.clipped_sums import ClippedSums
from dpfa_training.clipping import Clipping
from dpfa_training.inputs import check_inputs, rows_of
from dpfa_training.loss_check import LossCheck
from dpfa_training.plan import TrainingPlan
from dpfa_training.recording import Recording
from dpfa_training.sampling import Draws, PhysicalBatch
from dpfa_training.self_check import self_check
from dpfa_training.tape import Tape
from dpfa_training.threshold_groups import clipping_for

NOT_COVERED = (
    "Loss, accuracy, gradient norms and clip fractions seen during training are functions of the private "
    "data; they are not covered by epsilon.",
    "Labels, masks, weights and other numbers without a gradient that enter the loss are assumed to be, row by row, "
    "the row's own; the loss is checked to keep the rows of the module's output apart.",
    "What the data set, the loader's collation and the loop do to records before the module sees them is assumed to "
    "keep records apart (no mixing of images, no statistics of a batch).",
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
        self.plan, self.ledger, self.keys = plan, ledger, keys
        self.recording = Recording(module, by_hook=True)
        self.optimizer = weakref.ref(optimizer)
        self.backend_name = select("training", None, None, backend).name
        self._backend = load_backend(self.backend_name)
        secret = None if keys.secure else self.secret()
        self.charges = Charges(ledger, plan, backend=self.backend_name, planned_steps=planned_steps, secret=secret)
        self.draws: Draws | None = None
        """Where the rows come from; None where the loader is the user's own."""
        self.steps = 0
        """Optimiser steps taken; also the counter of the noise."""
        self.checked_samples = 0
        """How many samples the self-check compared; 0 until the first batch."""
        self.non_finite_samples = 0
        """Samples whose gradient was not finite and added nothing; a private figure."""
        self.coordinate_noise_std = 0.0
        """Std of the noise in each coordinate of the gradients handed over last."""
        self._clip_and_sum = ClippedSums(self._backend, clipping_for(plan.clipping, plan.max_grad_norm, module))
        self._threshold = None
        if isinstance(plan.clipping, QuantileClipping):
            self._threshold = MovingThreshold(plan.max_grad_norm, plan.clipping, plan.expected_batch_size)
            count = len(self.recording.parameters)
            require(count < COUNT_PARAMETER, f"a model must have fewer than {COUNT_PARAMETER} parameters", count)
        self._sums: dict[str, torch.Tensor] = {}
        self._handed: dict[str, tuple[torch.Tensor, int]] = {}
        self._batch: PhysicalBatch | None = None
        self._draw: int | None = None
        """The draw that ``_sums`` belongs to."""
        self._forwarded = self._clipped = self._stepped = False
        self._buffers = Buffers(module)
        self._loss = LossCheck(plan.reduction, self.recording.anchor)
        self._tape: Tape | None = None
        loss_check.install()
        _check_optimizer(self.recording, optimizer)
        guard.watch(self, self.recording.parameters.values())
        self._hand({})  # gradients of what the module did before are nobody's any more
        self._hooks = (
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            module.register_forward_hook(self._after_forward, always_call=True),
        )

    # ---- what the user asks

    def get_epsilon(self, delta: float | None = None, accountant: str = "auto") -> float:
        """Epsilon spent so far at `delta`, from the ledger; an upper bound."""
        return self.ledger.spent(delta, accountant)

    @property
    def clip_norm(self) -> float:
        """What bounds one unit's contribution; moved by released counts only under a ``QuantileClipping``."""
        return self.plan.max_grad_norm if self._threshold is None else self._threshold.value

    @property
    def in_draw(self) -> bool:
        """Whether gradients of an unfinished draw are held."""
        return bool(self._sums)

    def detach(self) -> None:
        """Give the module back to ordinary training; what was spent stays in the ledger."""
        for hook in self._hooks:
            hook.remove()
        self._loss.forget()
        self.recording.stop()
        guard.release(self.recording.parameters.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """A copied model is an ordinary model: its hooks lead here and are ignored."""
        return self

    # ---- the sampler

    def announce(self, batch: PhysicalBatch) -> None:
        """The loop is about to see the rows of `batch`."""
        before = self._batch
        used = self._stepped or (self._clipped and before is not None and not before.last)
        if before is not None and self._clipped and not used:
            raise NotPrivateError(
                "every batch drawn must be used in a step of its own, got gradient accumulation over draw "
                f"{before.draw} and the next: each draw is charged by itself. Raise the loader's batch_size and set "
                "max_physical_batch_size instead, and call step after every backward."
            )
        if before is not None and not used:
            raise NotPrivateError(
                f"every batch drawn must be used, got none or no step for draw {before.draw}: a skipped batch is a "
                "choice that depends on the data. Call backward and step for every batch of the loader."
            )
        if self._draw != batch.draw:
            self._sums.clear()  # parts of a draw that the loop left early were never released
        self._batch, self._draw = batch, batch.draw
        self._forwarded = self._clipped = self._stepped = False

    def abandon(self) -> None:
        """The loop was left and begins anew: what is held of its last draw will not be released."""
        self._sums.clear()
        self._batch = self._draw = None
        self._forwarded = self._clipped = self._stepped = False

    def renew(self) -> None:
        """Fresh keys from the system for noise and sampling; the draw at hand is given up."""
        self.keys = KeySource()
        self.charges.renew()
        self.abandon()
        if self.draws is not None:
            self.draws.renew(self.keys)

    # ---- checkpoints

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the engine, the sums of an unfinished draw included: not private.

        Raises: NotPrivateError where a batch is at hand whose part in the step is still open.
        """
        batch, open_ = self._batch, self._clipped if self.plan.sampling == "none" else False
        if batch is not None and not self._stepped:
            open_ = batch.last or not self._clipped
        if open_:
            raise NotPrivateError(
                "a checkpoint must be taken before a batch is drawn or after its backward and step, got one in "
                "between; finish the batch first."
            )
        return {
            "steps": self.steps,
            "draw": self._draw,
            "sums": dict(self._sums),
            "non_finite_samples": self.non_finite_samples,
            "clip_norm": self.clip_norm,
            "charges": self.charges.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.abandon()
        self.charges.restore(state["charges"])
        self.steps, self.non_finite_samples = state["steps"], state["non_finite_samples"]
        self._draw = state["draw"]
        devices = {name: parameter.device for name, parameter in self.recording.parameters.items()}
        self._sums = {name: value.to(devices.get(name, value.device)) for name, value in state["sums"].items()}
        self._clip_at(state["clip_norm"])

    def secret(self) -> bytes:
        """Key of the digests that a run leaves on disk."""
        return hashlib.sha256(b"dpfa/digest" + np.asarray(self.keys.key("sampling").words).tobytes()).digest()

    # ---- forward

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is not self.recording.module:
            return
        self.recording.stop()  # a backward that failed may have left its proxies behind
        if module.training:
            self._buffers.begin()
        if not (module.training and torch.is_grad_enabled()):
            return
        self._loss.forget()
        self.recording.check_parameters()
        check_inputs(args, kwargs)
        rows = rows_of(args, kwargs)
        batch = self._current_batch(rows)
        if self.checked_samples < min(rows, 2):  # one sample alone shows nothing about others
            self.checked_samples = self_check(self.recording, self._backend, args, kwargs, rows, self.plan.reduction)
        self._forwarded = True
        started = time.perf_counter()

        def finish(tape: Tape) -> None:
            self._clip(tape, batch)
            if self.draws is not None:
                self.draws.clipped(rows, time.perf_counter() - started)

        self._tape = Tape(rows, finish)
        if batch.units is None:
            self._clip_and_sum.form_during(self._tape)
        self.recording.start(self._tape, (args, kwargs))

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self.recording.module:
            self.recording.recorded(output)
            tape, self._tape = self._tape, None
            if tape is not None:
                self._loss.expect(output, tape.rows, tape.hold)
            self._buffers.check()

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
        if not self._loss.passed:
            raise NotPrivateError(
                "the loss must go backward by loss.backward() or torch.autograd.backward, where it can be looked at, "
                "got another way; call loss.backward()."
            )
        scale = tape.rows if self.plan.reduction == "mean" else 1
        norms = self._clip_and_sum.add(tape, self._sums, weights=batch.weights, scale=float(scale), units=batch.units)
        self.non_finite_samples += int((~norms.isfinite().all(0)).sum())
        if self._threshold is not None:
            count = self._threshold.centred_count(norms[0], batch.weights, batch.units)
            self._sums[COUNT] = self._sums.get(COUNT, 0.0) + count
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
        _check_optimizer(self.recording, optimizer)
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
        round_ = self.steps if self._batch is None else self._batch.round
        if not self.charges.admits(self.steps, self._sums | self._public()):
            # the same noise on another sum would reveal the difference: a new draw under new keys
            self.renew()
            self._hand({})
            return
        self.charges.pay(round_, self.steps)
        self._hand(self._noised())
        if self._threshold is not None:
            self._move(self._threshold)
        self.steps += 1
        self._sums.clear()
        self._clipped, self._stepped = False, True

    def _noised(self) -> dict[str, torch.Tensor]:
        gradients = {}
        key = self.keys.key("training")
        divisor = self.plan.expected_batch_size if self.plan.reduction == "mean" else 1
        std = self.plan.noise_std_at(self.clip_norm)
        self.coordinate_noise_std = std / divisor
        for index, (name, parameter) in enumerate(self.recording.parameters.items()):
            total = self._sums.get(name)
            if total is None:
                total = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            total = total.reshape(parameter.shape)
            if self.plan.noisy:
                self._backend.add_noise_(total, std, key, parameter=index, step=self.steps)
            gradients[name] = total.div_(divisor).to(parameter.dtype)
        return gradients

    def _public(self) -> dict[str, torch.Tensor]:
        """What a noised value depends on besides sums and plan."""
        return {} if self._threshold is None else {"clip_norm": torch.tensor([self.clip_norm], dtype=torch.float64)}

    def _move(self, threshold: MovingThreshold) -> None:
        """The adaptive clip's second release of this step, which the event covers, and what follows from it."""
        count, key = self._sums[COUNT].cpu(), self.keys.key("training")
        if self.plan.noisy:
            std = self.plan.count_noise_std
            self._backend.add_noise_(count, std, key, parameter=COUNT_PARAMETER, step=self.steps)
        threshold.move(float(count))
        self._clip_at(threshold.value)

    def _clip_at(self, clip_norm: float) -> None:
        if self._threshold is not None:
            self._threshold.value = clip_norm
            self._clip_and_sum.clipping = Clipping.flat(clip_norm)

    def _check_gradients(self) -> None:
        for name, parameter in self.recording.parameters.items():
            handed, version = self._handed.get(name, (None, 0))
            if parameter.grad is None or (parameter.grad is handed and parameter.grad._version == version):
                continue
            if not parameter.grad.any():  # zero_grad(set_to_none=False)
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
