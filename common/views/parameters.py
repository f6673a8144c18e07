"""The views of an image, and the random parameters of each.

A method declares its views as slots (`ViewSlot`), each with the distribution its views are drawn from
(`ViewTransform`). `sample_parameters` turns uniform random numbers into one row of numbers per view; the two pipelines
(`fast.py`, `pil.py`) only render rows. So both draw the same views, a recorded row says exactly how its view was made,
and the statistics can be tested without an image.

Dimensions: V views of an image (the candidates of all slots, slot by slot), C = len(COLUMNS).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hvp.common.errors import UserError

Floats = NDArray[np.float64]

CROP_ATTEMPTS = 10
"""Boxes that RandomResizedCrop tries before it falls back to the central crop."""

NUM_UNIFORMS = 2 * CROP_ATTEMPTS + 13
"""Uniform random numbers per view."""

JITTER_ORDERS = tuple(permutations(("brightness", "contrast", "saturation", "hue")))
"""The 24 orders of the colour operations; the `order` column is an index into it."""


class ViewParameters(NamedTuple):
    """Parameters of one view: one row of `ViewBatch.parameters`. Every value is exact in float32.

    An operation that was not applied has its neutral value: factors 1, hue 0, blur_sigma 0.
    """

    slot: float
    """Number of the view's slot."""
    source_height: float
    """Height of the image the view was cropped from, pixels."""
    source_width: float
    """Width of that image, pixels."""
    top: float
    """First row of the crop box, source pixels."""
    left: float
    """First column of the crop box, source pixels."""
    height: float
    """Height of the crop box, source pixels."""
    width: float
    """Width of the crop box, source pixels."""
    flip: float
    """1 if mirrored left to right, else 0."""
    jitter: float
    """1 if the four colour operations were applied, else 0."""
    brightness: float
    """Factor on the brightness."""
    contrast: float
    """Factor on the distance to the mean grey level."""
    saturation: float
    """Factor on the distance to the pixel's own grey level."""
    hue: float
    """Shift of the hue, in turns of the colour circle, -0.5 to 0.5."""
    order: float
    """Order of the colour operations, an index into `JITTER_ORDERS`."""
    grayscale: float
    """1 if converted to greyscale, else 0."""
    blur_sigma: float
    """Radius of Pillow's GaussianBlur (its standard deviation), view pixels."""
    solarize: float
    """1 if solarized, else 0."""


COLUMNS = ViewParameters._fields
"""Names of the columns of `ViewBatch.parameters`."""


@dataclass(frozen=True, kw_only=True)
class ViewTransform:
    """Distribution of a view. Applied in this order: crop and resize, flip, jitter, grayscale, blur, solarize.

    Defaults are those of DINO's `DataAugmentationDINO`; fields that differ between its three transforms have none.
    """

    size: int
    """Height and width of the view, pixels. Upstream: 224 (global), 96 (local)."""

    scale: tuple[float, float]
    """Crop area as a fraction of the image's area, (min, max). Upstream: (0.4, 1.0) global, (0.05, 0.4) local."""

    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop, (min, max), uniform in its logarithm. Upstream: torchvision's (3/4, 4/3)."""

    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter of the resize, always antialiased. Upstream: bicubic."""

    flip: float = 0.5
    """Probability of the horizontal flip. Upstream: 0.5."""

    jitter: float = 0.8
    """Probability of the four colour operations together. Upstream: 0.8."""

    brightness: float = 0.4
    """Factors are uniform in [max(0, 1 - brightness), 1 + brightness]. Upstream: 0.4."""

    contrast: float = 0.4
    """Same range as brightness, for the contrast. Upstream: 0.4."""

    saturation: float = 0.2
    """Same range as brightness, for the saturation. Upstream: 0.2."""

    hue: float = 0.1
    """Shifts are uniform in [-hue, hue], turns of the colour circle, at most 0.5. Upstream: 0.1."""

    grayscale: float = 0.2
    """Probability of conversion to greyscale. Upstream: 0.2."""

    blur: float
    """Probability of the Gaussian blur. Upstream: 1.0 (first global), 0.1 (second global), 0.5 (local)."""

    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Radius of Pillow's GaussianBlur, (min, max), view pixels. Upstream: (0.1, 2.0)."""

    solarize: float = 0.0
    """Probability of the solarization. Upstream: 0.2 for the second global crop, else 0."""

    solarize_threshold: int = 128
    """Grey levels from this one on are inverted. Upstream: 128."""

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise UserError(f"View transform: {name} = {getattr(self, name)}, but it must be {allowed}.")

        check("size", self.size >= 1, "at least 1 pixel")
        check("scale", 0 < self.scale[0] <= self.scale[1] <= 1, "(min, max) with 0 < min <= max <= 1")
        check("ratio", 0 < self.ratio[0] <= self.ratio[1], "(min, max) with 0 < min <= max")
        check("interpolation", self.interpolation in ("bicubic", "bilinear"), "bicubic or bilinear")
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            check(name, 0 <= getattr(self, name) <= 1, "a probability between 0 and 1")
        for name in ("brightness", "contrast", "saturation"):
            check(name, getattr(self, name) >= 0, "0 or more")
        check("hue", 0 <= self.hue <= 0.5, "between 0 and 0.5 turns")
        check("blur_sigma", 0 < self.blur_sigma[0] <= self.blur_sigma[1], "(min, max) with 0 < min <= max")
        check("solarize_threshold", 0 <= self.solarize_threshold <= 256, "between 0 and 256")


@dataclass(frozen=True)
class ViewSlot:
    """One kind of view that the objective takes, and the numbers of views to sample and to keep."""

    name: str
    """Name in pictures and messages, for example "local"."""

    transform: ViewTransform
    """Distribution of its views."""

    candidates: int
    """Views sampled per image."""

    kept: int
    """Views per image to train on, at most `candidates`. If equal, all are kept."""

    def __post_init__(self) -> None:
        if not self.candidates >= self.kept >= 1:
            raise UserError(
                f"View slot {self.name}: {self.candidates} candidates, of which {self.kept} are kept. "
                "At least one view must be kept, and no more than are sampled."
            )


def view_slots(slots: Sequence[ViewSlot]) -> list[int]:
    """Return the slot number of each of the V views, in their order: all candidates of slot 0, then of slot 1, ..."""
    return [number for number, slot in enumerate(slots) for _ in range(slot.candidates)]


def resolutions(slots: Sequence[ViewSlot]) -> list[int]:
    """Return the distinct sizes of the views, pixels, in order of first appearance among the slots."""
    return list(dict.fromkeys(slot.transform.size for slot in slots))


def view_layout(slots: Sequence[ViewSlot]) -> list[tuple[int, int]]:
    """Locate each of the V views in `ViewBatch.pixels`: (number of its resolution, position among those views)."""
    sizes = resolutions(slots)
    filled = [0] * len(sizes)
    places = []
    for slot in slots:
        resolution = sizes.index(slot.transform.size)
        for _ in range(slot.candidates):
            places.append((resolution, filled[resolution]))
            filled[resolution] += 1
    return places


def first_views(slots: Sequence[ViewSlot]) -> Iterator[int]:
    """Yield the views to train on without selection: the first `kept` of every slot."""
    start = 0
    for slot in slots:
        yield from range(start, start + slot.kept)
        start += slot.candidates


@lru_cache(maxsize=16)
def _limits(slots: tuple[ViewSlot, ...]) -> dict[str, Floats]:
    """The transforms' values, one [V] array per quantity, so that the views of all slots are drawn at once."""
    transforms = [slot.transform for slot in slots for _ in range(slot.candidates)]
    limits = {"slot": np.array(view_slots(slots), dtype=np.float64)}
    for name in ("flip", "jitter", "hue", "grayscale", "blur", "solarize"):
        limits[name] = np.array([getattr(transform, name) for transform in transforms])
    for name in ("scale", "ratio", "blur_sigma"):
        low, high = zip(*(getattr(transform, name) for transform in transforms), strict=True)
        limits[f"{name}_min"], limits[f"{name}_max"] = np.array(low), np.array(high)
    for name in ("brightness", "contrast", "saturation"):
        strength = np.array([getattr(transform, name) for transform in transforms])
        limits[f"{name}_min"], limits[f"{name}_max"] = np.maximum(0.0, 1.0 - strength), 1.0 + strength
    return limits


def sample_parameters(
    uniforms: Floats, source_size: tuple[int, int] | NDArray[np.int64], slots: Sequence[ViewSlot]
) -> NDArray[np.float32]:
    """Turn uniform random numbers into view parameters: a pure function, row by row.

    Args:
        uniforms: [..., V, NUM_UNIFORMS] float64 in [0, 1).
        source_size: (height, width) of the images, pixels; an array broadcasts as [..., 2].
        slots: the views' slots, whose candidates add up to V.

    Returns:
        [..., V, C] float32, the columns of `COLUMNS`.

    Raises:
        ValueError: the last dimensions of `uniforms` are not V and NUM_UNIFORMS.

    Source: the distributions of torchvision's RandomResizedCrop (with its rounding and its central crop after ten
        attempts), ColorJitter, RandomHorizontalFlip and RandomGrayscale, of Pillow's GaussianBlur with a uniform
        radius, and of ImageOps.solarize, as DINO's `DataAugmentationDINO` composes them.
    """
    limits = _limits(tuple(slots))
    num_views = len(limits["slot"])
    if uniforms.shape[-2:] != (num_views, NUM_UNIFORMS):
        raise ValueError(
            f"sample_parameters: uniforms are {list(uniforms.shape)}, expected [..., {num_views}, {NUM_UNIFORMS}]"
        )
    areas, ratios = uniforms[..., :CROP_ATTEMPTS], uniforms[..., CROP_ATTEMPTS : 2 * CROP_ATTEMPTS]
    rest = np.moveaxis(uniforms[..., 2 * CROP_ATTEMPTS :], -1, 0)  # 13 arrays [..., V]
    top, left, flip, jitter, brightness, contrast, saturation, hue, order, grayscale, blur, blur_sigma, solarize = rest
    size = np.asarray(source_size, dtype=np.float64)
    source_height, source_width = size[..., 0, None], size[..., 1, None]  # [..., 1]

    def between(name: str, uniform: Floats) -> Floats:
        return limits[f"{name}_min"] + (limits[f"{name}_max"] - limits[f"{name}_min"]) * uniform

    found, height, width = _crop_sizes(areas, ratios, source_height, source_width, limits)
    free_rows, free_columns = source_height - height, source_width - width
    jittered = jitter < limits["jitter"]
    columns: dict[str, Floats | NDArray[np.bool_]] = {
        "slot": limits["slot"],
        "source_height": source_height,
        "source_width": source_width,
        "top": np.floor(np.where(found, top * (free_rows + 1), free_rows / 2)),
        "left": np.floor(np.where(found, left * (free_columns + 1), free_columns / 2)),
        "height": height,
        "width": width,
        "flip": flip < limits["flip"],
        "jitter": jittered,
        "brightness": np.where(jittered, between("brightness", brightness), 1.0),
        "contrast": np.where(jittered, between("contrast", contrast), 1.0),
        "saturation": np.where(jittered, between("saturation", saturation), 1.0),
        "hue": np.where(jittered, limits["hue"] * (2.0 * hue - 1.0), 0.0),
        "order": np.floor(order * math.factorial(4)),
        "grayscale": grayscale < limits["grayscale"],
        "blur_sigma": np.where(blur < limits["blur"], between("blur_sigma", blur_sigma), 0.0),
        "solarize": solarize < limits["solarize"],
    }
    parameters = np.empty((*uniforms.shape[:-1], len(COLUMNS)), dtype=np.float32)
    for number, name in enumerate(COLUMNS):
        parameters[..., number] = columns[name]
    return parameters


def _crop_sizes(
    areas: Floats, ratios: Floats, source_height: Floats, source_width: Floats, limits: dict[str, Floats]
) -> tuple[NDArray[np.bool_], Floats, Floats]:
    """Choose the crop box of each view: whether one of its ten attempts fits into the image, its height and its width.

    `areas` and `ratios` are uniform numbers [..., V, attempts]; the source's sides are [..., 1]; results are [..., V].
    """
    # The first attempt that fits.
    scale_min, scale_max = limits["scale_min"][:, None], limits["scale_max"][:, None]
    log_min, log_max = np.log(limits["ratio_min"])[:, None], np.log(limits["ratio_max"])[:, None]
    area = (source_height * source_width)[..., None] * (scale_min + (scale_max - scale_min) * areas)
    ratio = np.exp(log_min + (log_max - log_min) * ratios)
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths > 0) & (widths <= source_width[..., None]) & (heights > 0) & (heights <= source_height[..., None])
    found, first = np.asarray(fits.any(-1)), fits.argmax(-1)[..., None]

    # Or else the largest central box with an allowed ratio.
    source_ratio = source_width / source_height
    central_width = np.where(
        source_ratio > limits["ratio_max"], np.rint(source_height * limits["ratio_max"]), source_width
    )
    central_height = np.where(
        source_ratio < limits["ratio_min"], np.rint(source_width / limits["ratio_min"]), source_height
    )
    width = np.where(found, np.take_along_axis(widths, first, -1)[..., 0], central_width)
    height = np.where(found, np.take_along_axis(heights, first, -1)[..., 0], central_height)
    return found, height, width
