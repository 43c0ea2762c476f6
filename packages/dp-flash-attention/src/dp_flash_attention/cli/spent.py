"""``dpfa spent LEDGER``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dp_flash_attention.cli.output import answers, print_json
from dp_flash_attention.numbers import number


def spent(
    ledger: Annotated[Path, typer.Argument(help="The ledger's file, e.g. runs/digits/ledger.db")],
    delta: Annotated[float | None, typer.Option(help="Default: the ledger's own delta.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What the releases in a ledger have cost together, by every accountant.

    Example: dpfa spent runs/digits/ledger.db --delta 1e-5
    """
    from dpfa_core.checks import fraction
    from dpfa_core.ledger import Ledger
    from dpfa_core.spending import spending

    with Ledger.read(ledger) as book:
        chosen = book.delta if delta is None else delta
        fraction("delta", chosen, zero=False, remedy="Pass --delta.")
        assert chosen is not None  # noqa: S101  (fraction refuses None)
        events = tuple(book.events())
        total = spending(events, chosen)
        terms = {"unit": book.unit, "relation": book.relation, "budget": book.budget}
    if json:
        print_json(
            {
                "epsilon": total.epsilon,
                "delta": chosen,
                "epsilons": dict(total.by_accountant),
                "no_bound": dict(total.reasons),
                "events": [{"event": event.to_json(), "count": count} for event, count in events],
            }
            | terms
        )
        return
    table = Table("count", "event", box=None, header_style="bold")
    for event, count in events:
        table.add_row(str(count), str(event))
    answers.print(table)
    by = ", ".join(f"{name} {number(value)}" for name, value in total.by_accountant) or "nothing spent"
    answers.print(
        f"epsilon = {number(total.epsilon)} at delta = {chosen:g} ({by}); unit {terms['unit']}, relation "
        f"{terms['relation']}, budget {terms['budget'] or 'none'}",
        soft_wrap=True,
    )
