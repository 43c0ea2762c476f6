"""``dpfa train``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dp_flash_attention.cli.output import answers, errors, print_json
from dp_flash_attention.numbers import number

INTERRUPTED = 130


def train(
    data: Annotated[
        str, typer.Option(help='"digits", a CSV/JSONL/Parquet file of texts, or a folder of images per class.')
    ] = "digits",
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face model directory; default: a small transformer of ours.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    epsilon: Annotated[float, typer.Option(help="Privacy budget epsilon.")] = 3.0,
    delta: Annotated[
        float | None, typer.Option(help="Privacy parameter delta. Default: 1e-4 for the digits, 1e-5 otherwise.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Default: the recipe of the task.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Expected Poisson batch. Default: the recipe.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Reproducible, NOT secure noise; default: keys from the system.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder, new or empty. Default: runs/NAME-TIME.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Fine-tune a transformer privately and leave weights, a privacy statement and a report.

    With no option: public weights drawn and pre-trained on first use, then DP-SGD on the real handwritten
    digits to (epsilon 3, delta 1e-4). Unit: one record. Ctrl-C stops after the step; --resume goes on.

    Examples: dpfa train
    dpfa train --data reviews.csv --text-column text --label-column label --epsilon 8
    dpfa train --resume runs/digits-20300101-120000
    """
    from dp_flash_attention.training_run.progress import Screen
    from dp_flash_attention.training_run.run import resume_run, start_run
    from dp_flash_attention.training_run.settings import Settings

    screen = Screen(errors)
    try:
        if resume is not None:
            result = resume_run(resume, screen)
        else:
            settings = Settings(
                data=data,
                model=None if model is None else str(model),
                text_column=text_column,
                label_column=label_column,
                epsilon=epsilon,
                delta=delta,
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
            )
            result = start_run(settings, out, screen)
    except KeyboardInterrupt:
        screen.warn("Interrupted. What was spent is in the ledger; go on with dpfa train --resume and the run folder.")
        raise typer.Exit(INTERRUPTED) from None
    if json:
        print_json(result)
    else:
        _table(result)


def _table(result: dict[str, Any]) -> None:
    low, high = result["test_accuracy_interval"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row(
        "test accuracy", f"[bold]{result['test_accuracy']:.1%}[/bold]  (95 % interval {low:.1%} to {high:.1%})"
    )
    for name, value in result["baselines"].items():
        table.add_row(f"  {name}", f"{value:.1%}")
    bound = f"[bold]{number(result['epsilon'])}[/bold] at delta = {result['delta']:g}"
    table.add_row("epsilon", f"{bound}, one {result['unit']}, {result['relation'].replace('_', ' ')}")
    for name, value in result["epsilons"].items():
        table.add_row(f"  by {name.upper()}", number(float(value)))
    table.add_row("run folder", f"{result['run']}  (report.html, privacy.json, model.safetensors)")
    table.add_row("time", f"{result['seconds']:.0f} s")
    answers.print(table)
