"""``dpfa report RUN``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dp_flash_attention.cli.output import answers, print_json


def report(
    run: Annotated[Path, typer.Argument(help="A run folder left by dpfa train.")],
    json: Annotated[bool, typer.Option("--json", help="Print privacy and metrics as one JSON object.")] = False,
) -> None:
    """Draw report.html of a finished run again and print where it is.

    Example: dpfa report runs/digits-20300101-120000
    """
    from dp_flash_attention.training_run.report import write_report
    from dp_flash_attention.training_run.run_folder import METRICS, PRIVACY, REPORT, RunFolder

    folder = RunFolder(run)
    privacy, metrics = folder.read_json(PRIVACY), folder.read_json(METRICS)
    write_report(folder)
    if json:
        print_json({"report": str(folder / REPORT), "privacy": privacy, "metrics": metrics})
    else:
        answers.print(str(folder / REPORT), markup=False, highlight=False, soft_wrap=True)
