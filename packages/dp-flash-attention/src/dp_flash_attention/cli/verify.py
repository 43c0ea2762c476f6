"""``dpfa verify [NAME...]``."""

from __future__ import annotations

from typing import Annotated

import typer

from dp_flash_attention.cli.output import answers, print_json
from dpfa_core.errors import PluginError


def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Plugin names; none means all installed.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds.")] = False,
    full: Annotated[bool, typer.Option("--full", help="More samples and parameters, minutes.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check mechanisms, accountants and backends, yours or ours, against what they claim.

    Exit code 1 if an obligation fails. Example: dpfa verify gaussian rdp torch --quick
    """
    try:
        from dpfa_verification.conformance import render, verify
    except ImportError as error:
        raise PluginError(
            "dpfa verify needs the package dpfa-verification, got none installed; "
            "pip install dp-flash-attention[verification]."
        ) from error
    level = "full" if full else "quick" if quick else "default"
    reports = verify(tuple(names or ()), level)
    if json:
        print_json({"ok": all(report.ok for report in reports), "reports": [r.to_json() for r in reports]})
    else:
        for report in reports:
            answers.print(render(report), markup=False, highlight=False)
    raise typer.Exit(0 if all(report.ok for report in reports) else 1)
