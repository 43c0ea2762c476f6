"""``dpfa doctor``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from dp_flash_attention.cli.output import answers, print_json


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at this installation: versions, plugins, and which backend would run and why not another.

    Example: dpfa doctor --json
    """
    from dp_flash_attention.cuda import cuda_version
    from dpfa_core.doctor import Finding, examine

    findings = (*examine(), Finding("cuda", True, cuda_version() or "none usable; kernels run on the CPU"))
    good = all(finding.ok for finding in findings)
    if json:
        print_json({"ok": good, "findings": [asdict(finding) for finding in findings]})
    else:
        table = Table("", "subject", "finding", box=None, header_style="bold")
        for finding in findings:
            table.add_row("ok" if finding.ok else "[red]FAIL[/red]", finding.subject, finding.text)
        answers.print(table)
    raise typer.Exit(0 if good else 1)
