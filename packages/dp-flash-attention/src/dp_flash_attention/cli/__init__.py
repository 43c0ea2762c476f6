"""The ``dpfa`` command. Exit codes: 0 done, 1 a check failed, 2 bad input, 3 budget exhausted, 130 interrupted."""

from __future__ import annotations

import os
import sys

import typer

from dp_flash_attention.cli import doctor, plan, report, spent, train, verify
from dp_flash_attention.cli.output import errors
from dpfa_core.errors import BudgetExhausted, DPFAError

BAD_INPUT, EXHAUSTED = 2, 3

# Read when torch loads, which no command has done yet. Where other programs want the processor too, threads
# that spin while they wait take it from the one that works: eight times slower at two threads on two busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="dpfa",
    help="Differentially private transformers. Try: dpfa train",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train")(train.train)
app.add_typer(plan.app, name="plan")
app.command("report")(report.report)
app.command("spent")(spent.spent)
app.command("doctor")(doctor.doctor)
app.command("verify")(verify.verify)


def main() -> None:
    """Run the command line; every error made on purpose becomes one sentence and an exit code."""
    try:
        app()
    except BudgetExhausted as error:
        _fail(str(error), EXHAUSTED)
    except DPFAError as error:
        _fail(str(error), BAD_INPUT)


def _fail(text: str, code: int) -> None:
    errors.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
