"""Progress on stderr: what is being made, which step, epsilon now against its target, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dp_flash_attention.training_run.curve import Curve

Report = Callable[[int, int], None]
"""Called with (done, in all)."""


class Screen:
    """One progress display for the whole run; silent where stderr is not a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def warn(self, text: str) -> None:
        """One line that does not stop the run."""
        self.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, text: str) -> Iterator[Report]:
        """A bar for one part of the work, shown from its first report on."""
        with self._bar("") as bar:
            task = bar.add_task(text, total=None, note="", visible=False)
            yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)

    @contextmanager
    def training(self, steps: int, curve: Curve, target: float) -> Iterator[Callable[[int], None]]:
        """The bar of the private steps."""
        with self._bar("{task.fields[note]}") as bar:
            task = bar.add_task("private training", total=steps, note=_spent(0.0, target))

            def show(done: int) -> None:
                bar.update(task, completed=done, note=_spent(curve.at_most(done), target))

            yield show

    def _bar(self, note: str) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn(note),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=False,
        )


def _spent(now: float, target: float) -> str:
    return f"epsilon <= {now:.2f} / {target:g}"
