"""Everything costs 1 % less than it does."""

from __future__ import annotations

from typing import ClassVar

from dpfa_accounting.gdp import GdpAccountant


class Optimist(GdpAccountant):
    name: ClassVar[str] = "optimist"

    def epsilon(self, delta: float) -> float:
        return 0.99 * super().epsilon(delta)
