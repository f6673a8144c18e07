"""Picture of a selection: images, the crops sampled from them, and the ones chosen to train on.

Like Figures 1b and 5 of the HVP paper (arXiv:2310.03940).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from hvp.common.views.parameters import COLUMNS, ViewParameters, ViewSlot, resolutions, view_layout, view_slots

# Sizes in points; the picture has SCALE pixels per point, so that it stays sharp on dense screens.
SCALE = 2
MARGIN = 24
GAP = 7  # between two views
ROW_GAP = 22  # between two images
COLUMN_GAP = 24  # between the image and its views
HEADER = 78
SOURCE_WIDTH = 360  # at most
LARGE, SMALL = 131, 62  # views of the highest resolution, and all others: 4 or 8 per line
VIEWS_WIDTH = 8 * SMALL + 7 * GAP
FRAME, MEDIUM, THIN = 3.0, 2.0, 0.5  # line widths: chosen views, boxes of chosen small views, other views

PAPER, INK, QUIET = (255, 255, 255), (34, 38, 46), (112, 118, 128)
COLOURS = ((230, 57, 70), (37, 110, 235), (247, 174, 0), (16, 160, 120), (150, 80, 200), (0, 170, 200))
"""Colours of the slots, in turn."""


def draw_selection(
    images: Sequence[NDArray[np.uint8]],
    parameters: ArrayLike,
    pixels: Sequence[ArrayLike],
    index: ArrayLike,
    slots: Sequence[ViewSlot],
) -> Image.Image:
    """Draw each image with the boxes of its crops, and its views beside it.

    Chosen views are framed in the colour of their slot; the others are dimmed, their boxes thin.

    Args:
        images: N source images, uint8 [H, W, 3], of any size.
        parameters: [N, V, C], the columns of `COLUMNS`; tensor or array.
        pixels: the views as in `ViewBatch.pixels`, one tensor per resolution, uint8 [n_views, N, size, size, 3], on the
            CPU.
        index: [N, S], the numbers of the chosen views, as in `Selection.index`.
        slots: the slots the views were sampled for.

    Returns:
        An RGB picture, 2 pixels per point, about 1900 pixels wide.

    Raises:
        ValueError: there is no image, or the shapes do not fit together.
    """
    rows, chosen = np.asarray(parameters), np.asarray(index)
    arrays = [np.asarray(views) for views in pixels]
    if not images or rows.shape != (len(images), len(view_slots(slots)), len(COLUMNS)) or len(chosen) != len(images):
        raise ValueError(
            f"draw_selection: {len(images)} images, parameters {list(rows.shape)}, index {list(chosen.shape)}, "
            f"{len(view_slots(slots))} views in the slots"
        )
    tiles = _tiles(slots)
    height = max(top + size for _, top, size in tiles)
    scales = [min(SOURCE_WIDTH / image.shape[1], height / image.shape[0]) for image in images]
    source_width = max(image.shape[1] * scale for image, scale in zip(images, scales, strict=True))
    views_left = MARGIN + source_width + COLUMN_GAP
    width = views_left + max(left + size for left, _, size in tiles) + MARGIN
    canvas = _Canvas(width, HEADER + len(images) * height + (len(images) - 1) * ROW_GAP + MARGIN)
    _header(canvas, slots, width)

    for n, image in enumerate(images):
        top = HEADER + n * (height + ROW_GAP)
        image_left = MARGIN + (source_width - image.shape[1] * scales[n]) / 2
        image_top = top + (height - image.shape[0] * scales[n]) / 2
        kept = set(chosen[n].tolist())
        _source(canvas, image, rows[n], kept, (image_left, image_top), scales[n], slots)
        for view, (resolution, place) in enumerate(view_layout(slots)):
            left, down, size = tiles[view]
            colour = COLOURS[view_slots(slots)[view] % len(COLOURS)]
            box = (views_left + left, top + down, size, size)
            canvas.paste(arrays[resolution][place, n], box, dim=0.0 if view in kept else 0.6)
            canvas.frame(box, colour, FRAME if view in kept else THIN)
    return canvas.image


def _tiles(slots: Sequence[ViewSlot]) -> list[tuple[float, float, float]]:
    """Left, top and size of each view, in points from the corner of its image's views: one block per resolution."""
    largest = max(resolutions(slots))
    tiles: dict[int, tuple[float, float, float]] = {}
    top = 0.0
    for number, resolution in enumerate(resolutions(slots)):
        size = LARGE if resolution == largest else SMALL
        views = [view for view, (its, _) in enumerate(view_layout(slots)) if its == number]
        per_line = (VIEWS_WIDTH + GAP) // (size + GAP)
        for position, view in enumerate(views):
            line, column = divmod(position, per_line)
            tiles[view] = (column * (size + GAP), top + line * (size + GAP), size)
        top += -(-len(views) // per_line) * (size + GAP)
    return [tiles[view] for view in range(len(tiles))]


def _header(canvas: "_Canvas", slots: Sequence[ViewSlot], width: float) -> None:
    sampled, kept = len(view_slots(slots)), sum(slot.kept for slot in slots)
    canvas.text((MARGIN, 18), f"{sampled} views sampled per image, {kept} chosen to train on", 19, INK)
    left = float(MARGIN)
    for number, slot in enumerate(slots):
        canvas.frame((left + 2, 49, 12, 12), COLOURS[number % len(COLOURS)], FRAME)
        left = canvas.text((left + 22, 47), f"{slot.name}: {slot.kept} of {slot.candidates}", 13, INK) + 22
    note = "framed: chosen     thin box or dimmed: sampled only"
    canvas.text((width - MARGIN - canvas.length(note, 13), 47), note, 13, QUIET)


def _source(
    canvas: "_Canvas",
    image: NDArray[np.uint8],
    rows: NDArray[Any],
    kept: set[int],
    corner: tuple[float, float],
    scale: float,
    slots: Sequence[ViewSlot],
) -> None:
    """Draw the source image with its crop boxes, the most important boxes last, on top."""
    left, top = corner
    canvas.paste(image, (left, top, image.shape[1] * scale, image.shape[0] * scale))
    largest = max(slot.transform.size for slot in slots)
    parameters = [ViewParameters(*row) for row in rows.tolist()]
    large = [slots[int(p.slot)].transform.size == largest for p in parameters]
    for view in sorted(range(len(rows)), key=lambda view: (view in kept, large[view])):
        p = parameters[view]
        box = (left + p.left * scale, top + p.top * scale, p.width * scale, p.height * scale)
        colour = COLOURS[int(p.slot) % len(COLOURS)]
        if view in kept:
            line = FRAME if large[view] else MEDIUM
            canvas.frame(box, (0, 0, 0), line + 1, alpha=0.35, inset=-0.5)  # a dark rim, for pale images
            canvas.frame(box, colour, line)
        else:
            canvas.frame(box, colour, THIN)


class _Canvas:
    """An RGB image to draw on, in points; boxes are (left, top, width, height)."""

    def __init__(self, width: float, height: float) -> None:
        self.image = Image.new("RGB", (round(width * SCALE), round(height * SCALE)), PAPER)

    def paste(self, pixels: NDArray[np.uint8], box: tuple[float, float, float, float], dim: float = 0.0) -> None:
        """Draw an image, resized to the box and blended with the paper."""
        left, top, right, bottom = _pixels(box)
        tile = Image.fromarray(np.ascontiguousarray(pixels)).resize(
            (right - left, bottom - top), Image.Resampling.BICUBIC
        )
        self.image.paste(Image.blend(tile, Image.new("RGB", tile.size, PAPER), dim), (left, top))

    def frame(
        self,
        box: tuple[float, float, float, float],
        colour: tuple[int, int, int],
        line: float,
        *,
        alpha: float = 1.0,
        inset: float = 0.0,
    ) -> None:
        """Draw a line along the inside of the box."""
        left, top, right, bottom = _pixels((box[0] + inset, box[1] + inset, box[2] - 2 * inset, box[3] - 2 * inset))
        mask = Image.new("L", (right - left, bottom - top), 0)
        ImageDraw.Draw(mask).rectangle(
            (0, 0, mask.width - 1, mask.height - 1), outline=round(255 * alpha), width=round(line * SCALE)
        )
        self.image.paste(colour, (left, top), mask)

    def text(self, corner: tuple[float, float], text: str, size: float, colour: tuple[int, int, int]) -> float:
        """Draw a line of text; return its right end."""
        at = (corner[0] * SCALE, corner[1] * SCALE)
        ImageDraw.Draw(self.image).text(at, text, fill=colour, font=ImageFont.load_default(size * SCALE))
        return corner[0] + self.length(text, size)

    def length(self, text: str, size: float) -> float:
        return ImageDraw.Draw(self.image).textlength(text, font=ImageFont.load_default(size * SCALE)) / SCALE


def _pixels(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in pixels, at least one pixel wide and high."""
    left, top = round(box[0] * SCALE), round(box[1] * SCALE)
    right, bottom = round((box[0] + box[2]) * SCALE), round((box[1] + box[3]) * SCALE)
    return left, top, max(right, left + 1), max(bottom, top + 1)
