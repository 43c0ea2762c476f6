"""The base of a mechanism that finishes tensors itself: the slow path, for trying an idea out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from dpfa_core.spec import Norm


class DPMechanism(ABC):
    """Noise of your own on the clipped attention output.

    A release calls ``add_noise`` once, after clipping in ``norm``. It cannot see whether the noise is right, so
    without ``dp_event`` the release counts as not private: its event is ``NonPrivate`` and its epsilon infinite. A
    subclass that knows what its noise costs says so with ``dp_event(self, sensitivity, epsilon, delta)``, which
    returns an event of ``dpfa_core.events``; accounting prices it, and a price above the promise ends the call.

    Guarantee: assumed (nobody has checked the subclass).
    """

    norm: ClassVar[Norm] = "l2"
    """In which rows are clipped and sensitivities are measured: "l2", or "l1" for Laplace noise."""

    @property
    def name(self) -> str:
        """What ledger and report call it."""
        return type(self).__name__

    @abstractmethod
    def add_noise(self, tensor: Any, sensitivity: float, epsilon: float) -> Any:
        """`tensor` with noise, in its shape, dtype and device.

        Args: `tensor` [B, S, H, D], float32, clipped; `sensitivity` of all of it in ``norm``; `epsilon` of this call.
        """
