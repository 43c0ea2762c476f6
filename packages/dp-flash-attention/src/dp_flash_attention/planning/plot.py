"""Two curves of a plan: epsilon against steps or calls, and the noise multiplier against epsilon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dp_flash_attention.planning.pricing import Say, nobody
from dpfa_core.checks import require
from dpfa_core.errors import DPFAError
from dpfa_core.events import Event
from dpfa_core.spending import upper_bound

LENGTHS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the planned length at which epsilon is drawn."""

LEAST = 32
"""A plan that is shorter is drawn up to here: one point is no curve."""

NOISES = (0.5, 0.63, 0.8, 1.0, 1.3, 1.7, 2.2)
"""Multiples of the planned noise at which epsilon is drawn."""


STYLES = ("-", "--", "-.", ":")


def check_picture(path: Path) -> None:
    """Say so before a minute of work if the picture cannot be written.

    Raises: PrivacyParameterError.
    """
    require(path.suffix == ".png", "plot must be the name of a .png file", str(path))
    require(path.parent.is_dir(), "plot must lie in a folder that exists", str(path))


def draw_plan(
    path: Path,
    event_of: Callable[[float, int], Event],
    noise_multiplier: float,
    count: int,
    delta: float,
    epsilons: dict[str, float],
    *,
    counted: str,
    say: Say = nobody,
) -> None:
    """Write both panels to `path`.

    Args: `event_of(noise multiplier, number)` is the whole release; `epsilons` of the plan by accountant: all are
    drawn against the number, the quick ones and the tightest against the noise; `counted`, "steps" or "calls".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    longest = max(count, LEAST)
    numbers = sorted({count, *(max(1, round(share * longest)) for share in LENGTHS)})
    for name in epsilons:
        say(f"curve by {name}")
        _line(left, name, [(n, _price(name, event_of(noise_multiplier, n), delta)) for n in numbers])
    left.set(xlabel=counted, ylabel=f"epsilon at delta = {delta:g}", title=f"noise multiplier {noise_multiplier:.4g}")
    tightest = min(epsilons, key=lambda name: epsilons[name])
    for name in epsilons:
        if name in ("rdp", "gdp", tightest):
            noises = [share * noise_multiplier for share in NOISES]
            _line(right, name, [(_price(name, event_of(z, count), delta), z) for z in noises])
    right.set(xlabel=f"epsilon at delta = {delta:g}", ylabel="noise multiplier", title=f"{count} {counted}")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _line(axes: Any, name: str, points: list[tuple[float | None, float | None]]) -> None:
    known = [(x, y) for x, y in points if x is not None and y is not None]
    # two accountants may agree: the wider dashes of the later one leave the earlier one to be seen
    style = STYLES[len(axes.lines) % len(STYLES)]
    axes.plot([x for x, _ in known], [y for _, y in known], style, marker="o", markersize=3, label=name)


def _price(name: str, event: Event, delta: float) -> float | None:
    try:
        return upper_bound(name, ((event, 1),), delta)
    except DPFAError:
        return None
