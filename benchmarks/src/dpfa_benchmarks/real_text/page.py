"""The page and the picture of a record: nothing is measured here."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from scipy.stats import t as student

from dp_flash_attention.numbers import number
from dpfa_benchmarks.plot import OTHERS, OURS, where
from dpfa_benchmarks.real_text.public_encoder import CLIPPED, DIM
from dpfa_benchmarks.real_text.tasks import DELTA, LOGIT_BOUND, QUERIES
from dpfa_mechanisms.rounding import accumulation

WHAT = "accuracy on real text"
RECORD = Path("benchmarks/records/utility/real_text.jsonl")

Record = dict[str, Any]


def newest(path: Path) -> Record:
    """The last line of a file of records.

    Raises: ValueError if there is none.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if not lines:
        raise ValueError(f"expected a record in {str(path)!r}, got none; run with --record.")
    found: Record = json.loads(lines[-1])
    return found


def write(record: Record, path: Path) -> None:
    """The page, and the picture beside it."""
    svg = path.with_suffix(".svg")
    path.write_text(page(record, svg.name), encoding="utf-8")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dpfa", "font.size": 10}):
        picture(record).savefig(svg, format="svg", metadata={"Date": None, "Description": description(record)})


def epsilons(record: Record) -> list[float | None]:
    """In the order of the run; None is infinity."""
    return list(dict.fromkeys(run["epsilon"] for run in record["runs"]))


def accuracies(record: Record, task: str, epsilon: float | None) -> list[float]:
    return [run["accuracy"] for run in record["runs"] if (run["task"], run["epsilon"]) == (task, epsilon)]


def mean_and_half_width(values: list[float]) -> tuple[float, float]:
    """Mean over seeds, and half of its 95 % interval by Student's t; nan for one value."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(student.ppf(0.975, len(values) - 1)) * error


def cell(record: Record, task: str, epsilon: float | None) -> str:
    """Accuracy in percent with its interval."""
    values = accuracies(record, task, epsilon)
    if not values:
        return ""
    mean, half = mean_and_half_width(values)
    return f"{100 * mean:.1f}" if math.isnan(half) else f"{100 * mean:.1f} ± {100 * half:.1f}"


def page(record: Record, picture_name: str) -> str:
    """The Markdown page."""
    runs = record["runs"]
    seeds, train, test = len({run["seed"] for run in runs}), runs[0]["train"], runs[0]["test"]
    private = ", ".join(f"{name} {count}" for name, count in record["private"].items())
    chance = 100.0 / len(record["private"])
    margin = accumulation(train) * (train - 1 + math.exp(2 * LOGIT_BOUND)) / math.exp(2 * LOGIT_BOUND)
    one = 100.0 / math.sqrt(QUERIES)
    return f"""# Real text

Measured. Which package wrote a docstring: private texts are those of {private}, chance is {chance:.0f} %. Names of
packages are left out, and texts that begin alike are one record. About {train} texts are kept or released, {test}
ask or test. Accuracies are in percent, means over {seeds} splits with a 95 % interval; δ = {DELTA:g}. One record is
one text with its label, replaced, unless said otherwise. The whole run took {record["seconds"]:.0f} s, reading the
texts included.

Docstrings of other packages ({sum(record["public"].values())} texts) are public: words, word vectors ({DIM}
columns, latent semantic analysis), the weights of the attention and every choice of a number come from them. A text
becomes one row: its words' vectors, pooled by an attention whose query is public.

![Accuracy against epsilon]({picture_name})

## A private memory answers

A `PrivateMemory` holds {train} texts: the key is the pooled vector, the value the label. {QUERIES} texts ask in one
call, and the largest vote is the answer. ε is for the call with all its queries; ten such calls of one memory cost
what the last column says, at δ = {10 * DELTA:g}.

| ε | accuracy | noise std of a vote | ε of ten calls |
|---|---|---:|---:|
{_table(record, _memory_row)}

*Covered*: text and label of a record. *Not covered*: how many records there are.

**Where the accuracy goes.** The logit bound of {LOGIT_BOUND:g} keeps the weight of one record below e²/n
([P3](../reference/privacy.md#p3-sensitivity-of-one-call)); it also flattens the vote, which limits the accuracy at
ε = ∞. The margin for rounding in float32 adds {100 * margin:.0f} % of that weight at n = {train}. The noise grows with
the root of the number of queries: one alone has {one:.0f} % of it.

## A head learns from released features (DP-Forward)

`release_features` hands out one row for each text, once. The head is a linear discriminant, from the class means of
the rows and a covariance of public texts.

| ε | features, labels not covered | features and labels, ε/2 each | test texts released, too | \
bag of words by DP-SGD | noise std of a number | of a class mean |
|---|---|---|---|---|---:|---:|
{_table(record, _head_row)}

- *Features, labels not covered*: the head is used where the test texts are, without noise. Labels leave as they
  are; whoever sees them, or the head, learns about them.
- *Features and labels*: half of ε for the features, half for labels by randomised response, in one ledger.
- *Test texts released, too*: each of them is a record of its own, released at the same ε to whoever has the head.
- *Bag of words by DP-SGD*: words are counted and the head is trained where the texts are, on one split. Text and
  label are covered (one example, added or removed). Only weights leave, and noise falls on sums over batches, not
  on each text. At ∞ it is the same few epochs, neither clipped nor noised.

**Where the accuracy goes.** Replacing a text can turn its row around: the sensitivity is 2 for a row of norm 1 at
most ({100 * CLIPPED:.0f} % of the public rows have it), and the noise falls on each of {DIM} numbers. A single row
drowns in it, as the released test texts show; a class mean over thousands of rows does not, as long as ε is not
small. Half of ε doubles the noise, and uniform answers thin out what labels say. More columns tell more at ε = ∞
and less below it: on public texts {DIM} and 8 did about equally well. Where a model can be trained where the texts are,
DP-SGD is the better tool; released features are for texts that have to leave.

{where(*(record[name] for name in ("machine", "time", "commit", "dirty", "versions")))}

```console
$ {record["command"]}
```
"""


def _table(record: Record, row: Callable[[Record, float | None], list[str]]) -> str:
    lines = [["∞" if epsilon is None else f"{epsilon:g}", *row(record, epsilon)] for epsilon in epsilons(record)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _memory_row(record: Record, epsilon: float | None) -> list[str]:
    run = _first(record, "memory", epsilon)
    ten_calls = run["epsilon_of_ten_calls"]
    together = "∞" if ten_calls is None else number(ten_calls, 3)
    return [cell(record, "memory", epsilon), f"{run['noise_std']:.3g}", together]


def _head_row(record: Record, epsilon: float | None) -> list[str]:
    tasks = ("features", "features and labels", "features, sent", "bag of words")
    run = _first(record, "features", epsilon)
    of_a_mean = run["noise_std"] / math.sqrt(run["train"] / len(record["private"]))
    return [*(cell(record, task, epsilon) for task in tasks), f"{run['noise_std']:.3g}", f"{of_a_mean:.2g}"]


def _first(record: Record, task: str, epsilon: float | None) -> dict[str, Any]:
    return next(run for run in record["runs"] if (run["task"], run["epsilon"]) == (task, epsilon))


def series(record: Record) -> dict[str, list[list[float]]]:
    """The numbers of the picture, in percent: by task and epsilon the mean, and the half width if there is one."""
    found = {}
    for task in ("memory", "features", "features and labels", "features, sent", "bag of words"):
        values = [accuracies(record, task, epsilon) for epsilon in epsilons(record)]
        found[task] = [[round(100 * x, 2) for x in mean_and_half_width(one) if x == x] for one in values if one]
    return found


def description(record: Record) -> str:
    """The picture in numbers, as it carries them."""
    return json.dumps(series(record))


def picture(record: Record) -> Figure:
    """Accuracy against epsilon: the memory, and the heads."""
    names = ["∞" if epsilon is None else f"{epsilon:g}" for epsilon in epsilons(record)]
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    memory, heads = figure.subplots(1, 2, sharey=True)
    drawn = series(record)
    styles = {
        "memory": (memory, OURS, "-"),
        "features": (heads, OURS, "-"),
        "features and labels": (heads, OURS, "--"),
        "features, sent": (heads, OURS, ":"),
        "bag of words": (heads, OTHERS, "-"),
    }
    for task, (axes, colour, line) in styles.items():
        means, bars = [point[0] for point in drawn[task]], [sum(point[1:]) for point in drawn[task]]
        places = range(len(means))
        axes.errorbar(places, means, yerr=bars, color=colour, linestyle=line, marker="o", markersize=3, label=task)
    for axes, title in ((memory, f"memory, {QUERIES} queries in a call"), (heads, "head on released features")):
        axes.axhline(100.0 / len(record["private"]), color="grey", linewidth=0.8)
        axes.set(title=title, xlabel="ε", xticks=range(len(names)), xticklabels=names, ylim=(25, 100))
        axes.spines[["top", "right"]].set_visible(False)
    memory.set_ylabel("accuracy, %")
    heads.legend(frameon=False, fontsize=8, ncols=2)
    return figure
