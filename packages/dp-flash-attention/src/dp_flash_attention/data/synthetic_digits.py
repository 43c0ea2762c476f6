"""Public digits: drawn from matplotlib's fonts and from pen strokes, then counted into 8x8 blocks like the real ones.

The real digits were scanned, fitted into 32x32 bitmaps and reduced to the number of inked pixels in each 4x4 block.
The drawn ones go the same way. Nothing here was fitted to a real digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dp_flash_attention.data.cache import Progress, cache_folder, write_atomically
from dp_flash_attention.data.pen_strokes import STROKES, Stroke, curve_matrix
from dp_flash_attention.data.task import Records

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Oblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10", "cmmi10"),
)
COUNT = 12_000
VERSION = 1
_SIDE = 32
_BLOCK = 4
_GLYPH_SIDE = 128
_PEN_SHARE = 0.67

Style = tuple[Stroke, ...] | str
"""Pen strokes of one digit, or the name of a font."""


def synthetic_digits(*, folder: Path | None = None, progress: Progress | None = None) -> Records:
    """The public digits that the default model is pre-trained on, drawn once and then read from the cache.

    Guarantee: tested. A second call returns the same records; a damaged cache file is drawn anew.

    Args:
        folder: where to keep them; default `cache_folder()`.
        progress: called while they are drawn, not when they are read.

    Returns:
        12,000 images (N, 1, 8, 8), float32 in [0, 1], with labels 0 to 9.
    """
    path = (folder or cache_folder()) / f"synthetic-digits-v{VERSION}-{COUNT}.safetensors"
    try:
        kept = load(path.read_bytes())
        return Records(kept["images"].float() / _BLOCK**2, kept["labels"].long())
    except (OSError, SafetensorError, KeyError):
        drawn = draw_digits(COUNT, seed=0, progress=progress)
    counts = (drawn.images * _BLOCK**2).round().to(torch.uint8)
    write_atomically(path, save({"images": counts, "labels": drawn.labels.to(torch.uint8)}))
    return drawn


def draw_digits(
    count: int,
    *,
    seed: int,
    fonts: Sequence[str] = FONTS,
    pens: Callable[[int, int], bool] = lambda digit, style: True,
    progress: Progress | None = None,
) -> Records:
    """Draws digits, as many of each class, two thirds with a pen and the rest from fonts.

    Guarantee: tested. The same arguments draw the same digits; every pixel is a count of 0 to 16 inked dots.

    Args:
        count: number of images, a multiple of 10.
        seed: of position, slant, width, thickness and wobble.
        fonts: names of matplotlib's own fonts; may be empty.
        pens: which pen styles of `pen_strokes.STROKES` to use, by digit and number.
        progress: called with (images drawn, count).

    Returns:
        Shuffled images (count, 1, 8, 8), float32 in [0, 1], with labels 0 to 9.
    """
    generator = torch.Generator().manual_seed(seed)
    images: list[Tensor] = []
    labels: list[int] = []
    for digit in range(10):
        strokes = [strokes for style, strokes in enumerate(STROKES[digit]) if pens(digit, style)]
        written = round(count // 10 * (_PEN_SHARE if fonts else 1.0)) if strokes else 0
        for style, number in [*_spread(strokes, written), *_spread(fonts, count // 10 - written)]:
            ink = (
                _typed(digit, style, number, generator)
                if isinstance(style, str)
                else _written(style, number, generator)
            )
            images.append(F.avg_pool2d(ink[:, None].float(), _BLOCK))
            labels += [digit] * number
            if progress:
                progress(len(labels), count)
    order = torch.randperm(len(labels), generator=generator)
    return Records(torch.cat(images)[order], torch.tensor(labels)[order])


def _spread(styles: Sequence[Style], number: int) -> list[tuple[Style, int]]:
    shares = [(style, number * (i + 1) // len(styles) - number * i // len(styles)) for i, style in enumerate(styles)]
    return [(style, share) for style, share in shares if share]


def _uniform(number: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(number, 1, 1, generator=generator)


def _paper(number: int, wobble: float, generator: torch.Generator) -> Tensor:
    """The bitmap's pixel centres (number, 32, 32, 2), (x, y), smoothly displaced."""
    centre = torch.arange(_SIDE) + 0.5
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    coarse = wobble * torch.randn(number, 2, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(_SIDE, _SIDE), mode="bicubic", align_corners=True)
    return torch.stack([x, y], dim=-1) + smooth.permute(0, 2, 3, 1)


def _written(strokes: tuple[Stroke, ...], number: int, generator: torch.Generator) -> Tensor:
    """Ink (number, 32, 32) of a pen that follows the strokes."""
    points = [point for stroke in strokes for point in stroke]
    joints = {point: i for i, point in enumerate(dict.fromkeys(points))}
    jitter = 0.06 * torch.randn(number, len(joints), 2, generator=generator)
    control = torch.tensor(points) + jitter[:, [joints[point] for point in points]]
    path = torch.from_numpy(curve_matrix(strokes, 48)).float() @ control - 0.5
    x, y = path[..., :1] * _uniform(number, 0.55, 1.0, generator), path[..., 1:]
    x, y = _turned(x - _uniform(number, -0.25, 0.25, generator) * y, y, generator)
    radius = _uniform(number, 1.4, 3.6, generator)
    y_low, y_high = y.amin(1, keepdim=True), y.amax(1, keepdim=True)
    x_low, x_high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    stretch = (_uniform(number, 28, 32, generator) - 2 * radius) / (y_high - y_low).clamp_min(0.3)
    width = torch.minimum(
        (x_high - x_low) * stretch * _uniform(number, 0.9, 1.25, generator),
        _uniform(number, 18, 26, generator) - 2 * radius,
    )
    x = (x - (x_low + x_high) / 2) * width / (x_high - x_low).clamp_min(1e-3) + _uniform(number, -1, 1, generator)
    y = (y - (y_low + y_high) / 2) * stretch
    paper = _paper(number, 0.8, generator) - _SIDE / 2
    distance = torch.cdist(paper.flatten(1, 2), torch.cat([x, y], dim=-1)).amin(dim=2)
    return distance.view(number, _SIDE, _SIDE) < radius


def _typed(digit: int, font: str, number: int, generator: torch.Generator) -> Tensor:
    """Ink (number, 32, 32) of a font's digit, thickened or thinned by its distance to the outline."""
    inside, height, width = _glyph(digit, font)
    scale = _uniform(number, 28, 32, generator) / height
    scale_x = torch.minimum(scale * _uniform(number, 0.75, 1.2, generator), _uniform(number, 18, 26, generator) / width)
    paper = _paper(number, 1.2, generator) - _SIDE / 2
    x, y = _turned(paper[..., 0] - _uniform(number, -1, 1, generator), paper[..., 1], generator)
    x = x + _uniform(number, -0.25, 0.25, generator) * y
    where = torch.stack([x / scale_x, y / scale], dim=-1) / (_GLYPH_SIDE / 2)
    depth = F.grid_sample(inside.expand(number, 1, -1, -1), where, padding_mode="border", align_corners=False)[:, 0]
    deepest = inside.max() * scale
    # Thinning by more than a quarter of the thickest stroke would break the thin ones.
    edge = torch.minimum(deepest - _uniform(number, 1.4, 3.6, generator), 0.25 * deepest)
    return depth * scale > edge


def _turned(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    angle = _uniform(len(x), -math.pi / 15, math.pi / 15, generator)
    return x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()


def _glyph(digit: int, font: str) -> tuple[Tensor, int, int]:
    """Distance to the outline, positive inside, (128, 128) with the glyph in the middle; its height and width."""
    import matplotlib
    from matplotlib.ft2font import FT2Font
    from scipy.ndimage import distance_transform_edt

    face = FT2Font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"))
    face.set_size(80, 72)
    face.set_text(str(digit), 0.0)
    face.draw_glyphs_to_bitmap()
    ink = np.asarray(face.get_image()) > 127
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = ink.shape
    top, left = (_GLYPH_SIDE - height) // 2, (_GLYPH_SIDE - width) // 2
    ink = np.pad(ink, ((top, _GLYPH_SIDE - height - top), (left, _GLYPH_SIDE - width - left)))
    return torch.from_numpy(distance_transform_edt(ink) - distance_transform_edt(~ink)).float(), height, width
