"""``python -m dpfa_benchmarks.token_privacy``: the noise of one token's release beside that of a whole sequence.

Nothing is timed, so page and picture are functions of the code alone: a test writes both again and compares.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from dp_flash_attention.numbers import number
from dpfa_attention.pricing import priced_release
from dpfa_benchmarks.plot import OTHERS, OURS
from dpfa_benchmarks.structures import MASKS, SHAPE
from dpfa_core.registry import MECHANISMS
from dpfa_core.spec import PrivacySpec

EPSILON, DELTA = 8.0, 1e-6
CLIP_NORM = 1.0
LOGIT_BOUNDS = (0.5, 1.0, 2.0, 4.0)
LENGTHS = (16, 64, 256, 1024, 4096)
"""Of the picture; the table has every other one."""
PANELS = (("dense", "public"), ("dense", "private"), ("causal", "private"))
LARGEST_SIGNAL = CLIP_NORM / math.sqrt(SHAPE.head_dim)


@lru_cache(maxsize=1024)
def std(mask: str, queries: str, length: int, logit_bound: float) -> float:
    """What one call adds to each number, in output units, as the call prices it: the sampler's end is paid as well."""
    spec = PrivacySpec(epsilon=EPSILON, delta=DELTA, unit="token", queries=queries)  # type: ignore[arg-type]
    return _std(spec, MASKS[mask], length, logit_bound)


@lru_cache(maxsize=64)
def naive(length: int) -> float:
    """What the call adds if every row and head moves by 2 clip_norm, with any mask: a sequence's noise."""
    return _std(PrivacySpec(epsilon=EPSILON, delta=DELTA, unit="sequence"), {}, length, None)


def _std(spec: PrivacySpec, mask: dict[str, Any], length: int, logit_bound: float | None) -> float:
    fields = mask | {"q_len": length, "kv_len": length, "logit_bound": logit_bound, "clip_norm": CLIP_NORM}
    problem = dataclasses.replace(SHAPE, **fields)
    return priced_release(MECHANISMS.entry("gaussian"), None, spec, problem, DELTA).noise_std


def rows(mask: str) -> list[str]:
    """The lines of one mask: those of public and of private queries, or one for both where they print alike."""
    lines = {queries: [_cells(mask, queries, length) for length in LENGTHS[::2]] for queries in ("public", "private")}
    if lines["public"] == lines["private"]:
        lines = {"either": lines["public"]}
    return [f"| {mask} | {queries} | {cells} |" for queries, found in lines.items() for cells in found]


def _cells(mask: str, queries: str, length: int) -> str:
    whole, found = naive(length), [std(mask, queries, length, bound) for bound in LOGIT_BOUNDS]
    tight = [f"{number(one, 3)} ({whole / one:.3g}×)" for one in found]
    ratios = [f"{LARGEST_SIGNAL / one:.2g}" for one in (whole, *found)]
    return " | ".join([str(length), number(whole, 3), *tight, *ratios])


def page(picture: str) -> str:
    """The Markdown page, with the address of the picture."""
    bounds = [f"B = {bound:g}" for bound in LOGIT_BOUNDS]
    lines = [
        "# What token privacy buys",
        "",
        f"Computed, not measured. One call of `dp_flash_attn_func`: {SHAPE.q_heads} heads of {SHAPE.head_dim} columns, "
        f"S queries and S keys, float32, clip norm {CLIP_NORM:g}, Gaussian noise. The claim: one token, replaced, at "
        f"ε = {EPSILON:g}, δ = {DELTA:g} for this call.",
        "",
        "*Naive* is the standard deviation that holds without looking at the softmax: every row and head of the "
        'release moves by twice the clip norm. It is what `unit="sequence"` adds. The *B* columns hold what the call '
        "adds with that logit bound: a row with n visible keys gives one of them a weight of at most "
        "1 / (1 + (n−1)e⁻²ᴮ), and a token moves it by little "
        "([P3](../reference/privacy.md#p3-sensitivity-of-one-call)). In brackets: how many times less noise.",
        "",
        f"*Signal to noise* is for one number of the output, at most: a row of norm {CLIP_NORM:g} has a root mean "
        f"square of {LARGEST_SIGNAL:g}. Attention that averages many values that point apart has a shorter row, and "
        "less.",
        "",
        f"![Noise against length, tight and naive, for four logit bounds]({picture})",
        "",
        f"| mask | queries | S | naive std | {' | '.join(bounds)} | naive signal to noise | {' | '.join(bounds)} |",
        f"|---|---|---:|---:|{'---:|' * len(bounds)}---:|{'---:|' * len(bounds)}",
        *[line for mask in MASKS for line in rows(mask)],
        "",
        "How to read it:",
        "",
        "- **Dense, public queries.** A token's largest weight falls like e²ᴮ/S in each of S rows, so the noise falls "
        "with the length; the margin for rounding, which grows with S/256, is a small part of it here.",
        "- **Dense, private queries.** The token's own row can turn around entirely, whatever the length: a floor.",
        "- **Causal.** The first rows see few keys, and the first key is seen by all: the noise does not fall with S, "
        "and stops growing once S is large beside e²ᴮ. A window stops it at its own width.",
        "- **The logit bound decides.** Where e²ᴮ is not small beside S, one key can take most of a row, and little is "
        "bought. A small B flattens the attention, which is a price in accuracy that is not in this table.",
        "- The std is proportional to the clip norm, and nearly so to the square root of the heads. `attention_aware` "
        "noise lowers it for later rows of causal masks: [noise structures](structures.md).",
        "",
        "```console",
        "$ python -m dpfa_benchmarks.token_privacy --page docs/benchmarks/token-privacy.md",
        "```",
        "",
    ]
    return "\n".join(lines)


def series() -> list[dict[str, Any]]:
    """The numbers of the picture: for each panel the naive curve and one for each logit bound, against the length."""
    return [
        {
            "panel": f"{mask}, {queries} queries",
            "lengths": list(LENGTHS),
            "naive": [_short(naive(length)) for length in LENGTHS],
            "tight": {
                f"B = {bound:g}": [_short(std(mask, queries, length, bound)) for length in LENGTHS]
                for bound in LOGIT_BOUNDS
            },
        }
        for mask, queries in PANELS
    ]


def description() -> str:
    """The picture in numbers, as it carries them."""
    return json.dumps(series())


def picture() -> Figure:
    """Noise on the left axis, the largest signal over it on the right one, both against the length."""
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, drawn in zip(panels, series(), strict=True):
        axes.plot(drawn["lengths"], drawn["naive"], color=OTHERS, linestyle="--")
        axes.annotate("naive", (drawn["lengths"][-1], drawn["naive"][-1]), ha="right", va="bottom", fontsize=8)
        for shade, (label, curve) in enumerate(drawn["tight"].items()):
            axes.plot(drawn["lengths"], curve, color=OURS, alpha=0.35 + 0.2 * shade)
            axes.annotate(label, (drawn["lengths"][-1], curve[-1]), ha="right", va="bottom", fontsize=8)
        axes.set(title=drawn["panel"], xlabel="length S", xscale="log", yscale="log")
        axes.spines["top"].set_visible(False)
    panels[0].set_ylabel("noise std of one number")
    right = panels[-1].secondary_yaxis("right", functions=(_over_signal, _over_signal))
    right.set_ylabel("signal to noise, at most")
    return figure


def _over_signal(value: Any) -> Any:
    return LARGEST_SIGNAL / np.maximum(value, 1e-12)  # the axis asks about 0, too


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def main(arguments: list[str]) -> int:
    """Print the page, or write it and the picture beside it."""
    parser = argparse.ArgumentParser(prog="python -m dpfa_benchmarks.token_privacy", description=__doc__)
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="write the page there, and FILE.svg, instead of printing"
    )
    options = parser.parse_args(arguments)
    if not options.page:
        sys.stdout.write(page("token-privacy.svg"))
        return 0
    svg = options.page.with_suffix(".svg")
    options.page.write_text(page(svg.name), encoding="utf-8")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dpfa", "font.size": 10}):
        picture().savefig(svg, format="svg", metadata={"Date": None, "Description": description()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
