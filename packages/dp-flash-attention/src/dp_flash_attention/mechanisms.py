"""Mechanisms of your own."""

from __future__ import annotations

from dpfa_mechanisms.tensor_mechanism import DPMechanism

__all__ = ["DPMechanism"]
