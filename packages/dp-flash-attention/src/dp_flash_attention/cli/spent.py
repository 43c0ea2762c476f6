"""``dpfa spent LEDGER``."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from dp_flash_attention.cli.output import answers, down, print_json, side_by_side, working
from dp_flash_attention.numbers import number, strict


def spent(
    ledger: Annotated[Path, typer.Argument(help="The ledger's file, e.g. runs/digits/ledger.db")],
    delta: Annotated[float | None, typer.Option(help="Default: the ledger's own delta.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print one JSON line for each line of the ledger.")] = False,
) -> None:
    """What the releases in a ledger have cost together, by every accountant side by side.

    Example: dpfa spent runs/digits/ledger.db --delta 1e-5
    """
    from dp_flash_attention.planning.account import account, lines
    from dpfa_core.checks import require
    from dpfa_core.events import Event

    require(not (json and jsonl), "either --json or --jsonl must be given", "both")
    if jsonl:
        require(delta is None, "delta must be left out where --jsonl lists releases without a price", delta)
        for line in lines(ledger):
            sys.stdout.write(json_module.dumps(strict(line), allow_nan=False) + "\n")
        return
    with working() as say:
        found = account(ledger, delta, say)
    if json:
        print_json(found)
        return
    table = Table("count", "event", box=None, header_style="bold", pad_edge=False)
    for row in found["events"]:
        table.add_row(str(row["count"]), Text(str(Event.from_json(row["event"]))))
    answers.print(table)
    answers.print()
    side_by_side({"epsilon": found["epsilons"]}, found["no_bound"], found["remarks"])
    answers.print()
    budget = found["budget"]
    rest = "none" if budget is None else f"{down(budget)}, {down(found['remaining'])} of it left"
    answers.print(
        f"epsilon = {number(found['epsilon'])} at delta = {found['delta']:g}; unit {found['unit']}, relation "
        f"{found['relation']}, budget {rest}",
        soft_wrap=True,
    )
