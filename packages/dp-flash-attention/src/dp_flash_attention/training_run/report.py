"""``report.html``: one self-contained page from ``privacy.json`` and ``metrics.json``."""

from __future__ import annotations

import io
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from dp_flash_attention.numbers import number
from dp_flash_attention.training_run.run_folder import METRICS, PRIVACY, REPORT, RunFolder, write_whole


def write_report(folder: RunFolder) -> None:
    """Draw the report of a finished run; needs nothing but the two files."""
    privacy, metrics = folder.read_json(PRIVACY), folder.read_json(METRICS)
    pages = Environment(loader=PackageLoader("dp_flash_attention"), autoescape=select_autoescape())
    pages.filters["rounded_up"] = lambda value: number(float(value), digits=6)
    page = pages.get_template("report.html").render(
        privacy=privacy,
        metrics=metrics,
        spending=spending_plot(metrics["curve"], privacy),
        accuracy=accuracy_plot(metrics),
    )
    write_whole(folder / REPORT, page.encode())


def spending_plot(curve: dict[str, Any], privacy: dict[str, Any]) -> str:
    """Epsilon against steps, one line for each accountant, as SVG."""
    figure, axes = _figure()
    dashes = ("-", "--", ":", "-.")  # two accountants often agree to the width of a line
    for index, (name, values) in enumerate(curve["by_accountant"].items()):
        style = dashes[index % len(dashes)]
        axes.plot(curve["steps"], [float(v) for v in values], marker=".", linestyle=style, label=name.upper())
    axes.axhline(privacy["epsilon"], color="0.5", linewidth=0.8, linestyle=":")
    axes.set(xlabel="steps", ylabel=f"epsilon at delta = {privacy['delta']:g}", ylim=(0, None), xlim=(0, None))
    axes.legend(frameon=False)
    return _svg(figure)


def accuracy_plot(metrics: dict[str, Any]) -> str:
    """Test accuracy with its interval beside the baselines, as SVG."""
    figure, axes = _figure(height=2.2)
    rows = [("private", metrics["test_accuracy"], metrics["test_accuracy_interval"])]
    rows += [(name, value, None) for name, value in metrics["baselines"].items() if value is not None]
    for position, (_, value, interval) in enumerate(reversed(rows)):
        colour = "#2a6f97" if interval else "#b8c4cc"
        axes.barh(position, value, color=colour, height=0.6)
        axes.text((interval[1] if interval else value) + 0.01, position, f"{value:.1%}", va="center", fontsize=9)
        if interval:
            axes.plot(interval, [position, position], color="black", linewidth=1.5)
    axes.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
    axes.set(xlim=(0, 1.12), xlabel="test accuracy")
    return _svg(figure)


def _figure(height: float = 3.0) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    from markupsafe import Markup

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])
