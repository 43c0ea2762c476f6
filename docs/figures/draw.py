"""Draws the two flow pictures of the documentation: ``python docs/figures/draw.py [FOLDER]``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, BOX, GAP, TOP, LEFT, ROOM = 760, 52, 18, 16, 16, 170
INK, LINE, PAPER, BLUE, RED, GREEN = "#1f2933", "#52606d", "#ffffff", "#e3f0f7", "#fbe9e7", "#e6f4ea"


@dataclass(frozen=True)
class Stop:
    """One box: which package works, what it does, and what it looks at."""

    room: str
    title: str
    detail: str
    fill: str


CALL = (
    Stop("your code", "dp_flash_attn_func(q, k, v, epsilon=…, delta=…)", "", PAPER),
    Stop("dpfa-core", "PrivacySpec and AttentionProblem", "shapes, masks and the promise; bad values stop here", BLUE),
    Stop("dpfa-mechanisms", "sensitivity", "how far one record can move the output, from public facts alone", BLUE),
    Stop(
        "dpfa-mechanisms",
        "calibrate, after the sampler's end is charged",
        "least noise for the delta that is left",
        BLUE,
    ),
    Stop("dpfa-accounting", "price the event again", "another package's number; above the promise: error", BLUE),
    Stop("dpfa-core", "select a backend", "reasons against every other one are kept", BLUE),
    Stop("dpfa-core", "ledger line", "event, mechanism, backend, versions; over budget: error", GREEN),
    Stop(
        "dpfa-kernels-torch",
        "clip, attention, noise in float32, one rounding",
        "the only stop that reads q, k and v",
        RED,
    ),
    Stop("your code", "output [B, S, H, D]", "from here on: post-processing", PAPER),
)

STEP = (
    Stop("dpfa-training", "Poisson draw", "every record decides by itself, from ChaCha20 bits", RED),
    Stop("your code", "forward in train() mode", "attention is torch's own; layers note their inputs", RED),
    Stop("your code", "loss.backward()", "one pass; no weight gradient is formed by autograd", RED),
    Stop("dpfa-kernels-torch", "squared norm of each sample, all layers", "an upper bound, summed in float64", RED),
    Stop("dpfa-training", "clip factors min(1, C / norm)", "a sample that is not finite gets 0", RED),
    Stop("dpfa-kernels-torch", "clipped sum of each parameter", "added up in float32 over physical batches", RED),
    Stop("your code", "optimizer.step()", "a hook stops every step that is not the engine's", PAPER),
    Stop("dpfa-core", "ledger line", "PoissonSampled(b / n, Gaussian(z)); over budget: error", GREEN),
    Stop("dpfa-kernels-torch", "noise once, then divide by b", "b is the expected batch size, a public constant", RED),
    Stop("torch", "the optimiser's own update", "sees noised gradients only: post-processing", PAPER),
)

LEGEND = (
    (BLUE, "public facts only"),
    (GREEN, "written down first"),
    (RED, "private data"),
    (PAPER, "yours, or after the noise"),
)


def draw(stops: tuple[Stop, ...], label: str) -> str:
    """The stops from top to bottom, joined by arrows, as one SVG."""
    height = TOP + len(stops) * (BOX + GAP) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(label)}" font-family="system-ui, sans-serif" font-size="14" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="{PAPER}"/>',
    ]
    x, width = LEFT + ROOM, WIDTH - ROOM - 2 * LEFT
    for index, stop in enumerate(stops):
        y = TOP + index * (BOX + GAP)
        middle = x + width / 2
        if index:
            parts.append(f'<path d="M{middle} {y - GAP}v{GAP - 5}" stroke="{LINE}" stroke-width="1.5"/>')
            parts.append(f'<path d="M{middle - 5} {y - 7}l5 7l5-7z" fill="{LINE}"/>')
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{BOX}" rx="6" fill="{stop.fill}" stroke="{LINE}"/>'
        )
        text = f'<text x="{LEFT + ROOM - 12}" y="{y + 31}" text-anchor="end" fill="{LINE}">{escape(stop.room)}</text>'
        parts.append(text)
        line = 22 if stop.detail else 31
        parts.append(f'<text x="{x + 14}" y="{y + line}" font-weight="600">{escape(stop.title)}</text>')
        if stop.detail:
            parts.append(f'<text x="{x + 14}" y="{y + 41}" fill="{LINE}">{escape(stop.detail)}</text>')
    y = height - 24
    used = [(fill, name) for fill, name in LEGEND if any(stop.fill == fill for stop in stops)]
    for index, (fill, name) in enumerate(used):
        at = LEFT + index * 185
        parts.append(f'<rect x="{at}" y="{y}" width="14" height="14" rx="3" fill="{fill}" stroke="{LINE}"/>')
        parts.append(f'<text x="{at + 20}" y="{y + 12}" font-size="12" fill="{LINE}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


PICTURES = {
    "call.svg": draw(CALL, "How a private attention call flows"),
    "step.svg": draw(STEP, "How a private training step flows"),
}

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "assets"
    for name, picture in PICTURES.items():
        (folder / name).write_text(picture, encoding="utf-8")
