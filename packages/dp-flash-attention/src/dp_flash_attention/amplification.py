"""What sampling the records of every step saves."""

from __future__ import annotations

from dpfa_accounting.amplification import SubsamplingAmplification

__all__ = ["SubsamplingAmplification"]
