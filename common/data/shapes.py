"""The embedded dataset `shapes`: light figures on dark, cluttered backgrounds, drawn when they are read.

Classes differ in outline alone. Colour, fill, position, size, rotation, aspect, shear, background and clutter are
random, so neither raw pixels nor colour statistics tell the classes apart. A figure is always lighter than its
background: with both polarities, a network that compares views learns the polarity, which is easier than the outline,
and stays there.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import cv2
import numpy as np
import pydantic
from numpy.typing import NDArray

from hvp.common.config.resolving import Section

# Geometry is in units of the image's side, x to the right and y down, so the scene does not depend on its size in
# pixels: P corners, S pixels a side. Paint has its channels first, which NumPy broadcasts several times faster.
Contour = NDArray[np.float64]  # [P, 2], closed; several contours fill by the even-odd rule
Field = NDArray[np.float32]  # [S, S], in [0, 1]
Paint = NDArray[np.float32]  # [3, S, S] or, one colour, [3, 1, 1]; grey levels

FIGURE_LUMINANCE = (150.0, 210.0)
GROUND_LUMINANCE = (40.0, 100.0)
CLUTTER_LUMINANCE = (60.0, 170.0)

HALVINGS = 2  # coverage of a pixel is counted on 4 x 4 points
FRACTION_BITS = 4  # corners are given to OpenCV in 1/16 of such a point


class ShapesOptions(Section):
    """Options of the embedded dataset. Image i of a split does not depend on `train` and `val`."""

    size: int = pydantic.Field(64, ge=8, le=4096)
    """Side of the square images, pixels. The scenes are the same at every size; the noise is drawn per pixel."""

    train: int = pydantic.Field(6000, ge=1, le=2**24)
    """Images in the training split."""

    val: int = pydantic.Field(2000, ge=1, le=2**24)
    """Images in the validation split."""

    seed: int = pydantic.Field(0, ge=0, lt=2**32)
    """Random seed of the images. Independent of train.seed."""


class Shapes:
    """One split of the embedded dataset, an `ImageSource`.

    An image depends only on (seed, split, index) and the size, in any process and in any order. Classes take turns, so
    every split is balanced.

    Args:
        options: size, number of images, seed.
        split: train and val share no image.
    """

    def __init__(self, options: ShapesOptions, split: Literal["train", "val"]) -> None:
        self.options = options
        self.split = split
        self.classes = CLASSES
        self._len = options.train if split == "train" else options.val
        self.name = f"shapes ({split}, {self._len} images)"

    def __len__(self) -> int:
        return self._len

    def read(self, index: int) -> NDArray[np.uint8]:
        """Draw image `index`, uint8 [size, size, 3], RGB."""
        if not 0 <= index < self._len:
            raise IndexError(f"{self.name} has no image {index}")
        rng = np.random.default_rng((self.options.seed, int(self.split == "val"), index))
        return _draw(OUTLINES[CLASSES[index % len(CLASSES)]], self.options.size, rng)

    def labels(self) -> NDArray[np.int64]:
        """Return the class of every image, int64 [N]."""
        return np.arange(self._len, dtype=np.int64) % len(CLASSES)

    def describe(self, index: int) -> str:
        """Name image `index`, for example `shapes train 17`."""
        return f"shapes {self.split} {index}"


def _draw(outline: list[Contour], size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw background, clutter, figure and noise, from back to front; uint8 [size, size, 3]."""
    kind = ("plain", "gradient")[rng.integers(2)]
    image = _blend(_texture(kind, size, rng), *_two_colours(rng.random(), 0.15, GROUND_LUMINANCE, rng))

    for _ in range(rng.integers(3)):
        clutter = CLUTTER[rng.integers(len(CLUTTER))](rng)
        colour = _colour(rng.random(), rng.random(), rng.uniform(*CLUTTER_LUMINANCE))
        image = _over(image, colour, _coverage(clutter, size))

    kind = ("plain", "gradient", "stripes", "checker", "noise")[rng.integers(5)]
    fill = _blend(_texture(kind, size, rng), *_two_colours(rng.random(), 0.06, FIGURE_LUMINANCE, rng))
    image = _over(image, fill, _coverage(_pose(outline, rng), size))

    # Last, because only the noise needs more random numbers for a larger image.
    sigma = rng.uniform(2, 10)  # grey levels
    image += np.float32(sigma) * rng.standard_normal((size, size), dtype=np.float32)  # grey, like film grain
    return np.clip(np.rint(cv2.merge(list(image))), 0, 255).astype(np.uint8)


def _pose(outline: list[Contour], rng: np.random.Generator) -> list[Contour]:
    """Scale, shear, rotate and place an outline of radius 1, at most 4 % of the side outside the frame."""
    half_size = rng.uniform(0.26, 0.40)
    aspect = math.exp(rng.uniform(-0.18, 0.18) / 2)
    shear = rng.uniform(-0.25, 0.25)
    angle = rng.uniform(-math.pi, math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = half_size * np.array([[cos, -sin], [sin, cos]]) @ [[aspect, shear], [0, 1 / aspect]]
    contours = [contour @ matrix.T for contour in outline]
    corners = np.concatenate(contours)
    low, high = -0.04 - corners.min(axis=0), 1.04 - corners.max(axis=0)
    centre = low + rng.random(2) * (high - low)
    return [contour + centre for contour in contours]


def _coverage(contours: list[Contour], size: int) -> Field:
    """Fraction of each pixel's area inside the contours."""
    side = size << HALVINGS
    canvas: NDArray[Any] = np.zeros((side, side), dtype=np.uint8)
    # OpenCV's integer coordinates are the centres of points, hence the half.
    scaled = [np.rint((contour * side - 0.5) * 2**FRACTION_BITS).astype(np.int32) for contour in contours]
    cv2.fillPoly(canvas, scaled, (255,), shift=FRACTION_BITS)
    for k in reversed(range(HALVINGS)):  # OpenCV halves much faster than it shrinks to a quarter
        canvas = cv2.resize(canvas, (size << k, size << k), interpolation=cv2.INTER_AREA)
    return canvas * np.float32(1 / 255)


def _texture(kind: str, size: int, rng: np.random.Generator) -> Field:
    """Weight of the second colour at each pixel."""
    x = (np.arange(size, dtype=np.float32) + 0.5) / size
    y = x[:, None]
    angle = rng.uniform(0, 2 * math.pi)
    along = x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle))  # [S, S]
    if kind == "plain":
        return np.zeros((size, size), dtype=np.float32)
    if kind == "gradient":
        return (along - along.min()) / (along.max() - along.min())
    if kind == "noise":
        cells = rng.random((16, 16), dtype=np.float32)
        return np.clip(cv2.resize(cells, (size, size), interpolation=cv2.INTER_LINEAR), 0, 1)
    across = y * np.float32(math.cos(angle)) - x * np.float32(math.sin(angle))
    frequency = np.float32(2 * math.pi * rng.uniform(4, 8))  # periods a side
    phases = rng.uniform(0, 2 * math.pi, size=2).astype(np.float32)
    wave = np.sin(frequency * along + phases[0])
    if kind == "checker":
        wave = wave * np.sin(frequency * across + phases[1])
    return np.clip(0.5 + 2 * wave, 0, 1)  # steep, not hard: a hard edge would show the pixel grid


def _two_colours(
    hue: float, spread: float, luminance: tuple[float, float], rng: np.random.Generator
) -> tuple[Paint, Paint]:
    """Draw two neighbouring hues of one saturation, each with its own luminance from the range."""
    saturation = rng.uniform(0.2, 1)
    other_hue = hue + rng.uniform(-spread, spread)
    first, second = rng.uniform(*luminance, size=2)
    return _colour(hue, saturation, first), _colour(other_hue, saturation, second)


def _colour(hue: float, saturation: float, luminance: float) -> Paint:
    """Make a colour [3, 1, 1] of this luminance (ITU-R BT.601, grey levels); saturation 1 is the RGB cube's limit."""
    red, green, blue = (min(max(abs((hue + shift) % 1 * 6 - 3) - 1, 0), 1) for shift in (0, 2 / 3, 1 / 3))
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    # Walk from the grey of that luminance towards the hue until a channel reaches 0 or 255.
    chroma = (red - grey, green - grey, blue - grey)
    limit = min((255 - luminance if c > 0 else luminance) / abs(c) for c in chroma if c)
    channels = [luminance + saturation * limit * c for c in chroma]
    return np.array(channels, dtype=np.float32).reshape(3, 1, 1)


def _blend(weight: Field, first: Paint, second: Paint) -> Paint:
    """Blend two paints to [3, S, S]: `first` at weight 0, `second` at weight 1."""
    return first + weight * (second - first)


def _over(image: Paint, paint: Paint, coverage: Field) -> Paint:
    """Lay a paint over the image [3, S, S] by its coverage."""
    return image + coverage * (paint - image)


def _arc(centre: tuple[float, float], radius: float, start: float, stop: float, corners: int = 48) -> Contour:
    """Points on a circle; angles in degrees, clockwise on the screen."""
    angle = np.radians(np.linspace(start, stop, corners))
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)], axis=1)


def _star() -> Contour:
    radius = np.tile([1.0, 0.42], 5)
    angle = np.radians(np.arange(10) * 36 - 90)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _cross() -> Contour:
    arm = 0.3
    quarter = np.array([[arm, -1], [arm, -arm], [1, -arm]])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])  # row vectors, by 90 degrees
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


def _crescent() -> Contour:
    shift, radius = 0.5, 0.8  # of the disc that is cut out
    x = (1 - radius**2 + shift**2) / (2 * shift)  # where the two circles meet
    y = math.sqrt(1 - x**2)
    outer, inner = math.degrees(math.atan2(y, x)), math.degrees(math.atan2(y, x - shift))
    return np.concatenate([_arc((0, 0), 1, outer, 360 - outer), _arc((shift, 0), radius, 360 - inner, inner)])


def _heart() -> Contour:
    t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=1)


def _arrow() -> Contour:
    half = np.array([[-1, 0.22], [0.1, 0.22], [0.1, 0.7], [1, 0]])
    return np.concatenate([half, half[-2::-1] * [1, -1]])


def _s_curve() -> Contour:
    r, half_width = 0.4, 0.19
    outside, inside = r + half_width, r - half_width
    # An upper arc over the top and a lower arc under the bottom, along each side of the stroke.
    there = [_arc((0, -r), outside, -10, -270), _arc((0, r), inside, -90, 170)]
    back = [_arc((0, r), outside, 170, -90), _arc((0, -r), inside, -270, -10)]
    return np.concatenate(there + back)


def _centred(*contours: Contour) -> list[Contour]:
    """Move and scale contours into the unit circle."""
    corners = np.concatenate(contours)
    centre = (corners.min(axis=0) + corners.max(axis=0)) / 2
    radius = np.linalg.norm(corners - centre, axis=1).max()
    return [(contour - centre) / radius for contour in contours]


OUTLINES: dict[str, list[Contour]] = {
    "disc": _centred(_arc((0, 0), 1, 0, 360)),
    "ring": _centred(_arc((0, 0), 1, 0, 360), _arc((0, 0), 0.55, 0, 360)),
    "square": _centred(_arc((0, 0), 1, 45, 405, corners=5)),
    "triangle": _centred(_arc((0, 0), 1, -90, 270, corners=4)),
    "star": _centred(_star()),
    "cross": _centred(_cross()),
    "crescent": _centred(_crescent()),
    "heart": _centred(_heart()),
    "arrow": _centred(_arrow()),
    "s-curve": _centred(_s_curve()),
}
CLASSES = tuple(OUTLINES)


def _line(rng: np.random.Generator) -> list[Contour]:
    angle = rng.uniform(0, math.pi)
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    long, wide = along * rng.uniform(0.05, 0.12), across * rng.uniform(0.006, 0.015)
    return [rng.random(2) + np.array([long + wide, long - wide, -long - wide, wide - long])]


def _dots(rng: np.random.Generator) -> list[Contour]:
    centre = rng.random(2)
    places = centre + rng.uniform(-0.09, 0.09, size=(rng.integers(2, 5), 2))
    return [_arc((x, y), rng.uniform(0.012, 0.022), 0, 360, corners=13) for x, y in places]


def _blob(rng: np.random.Generator) -> list[Contour]:
    angle = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    phases = rng.uniform(0, 2 * math.pi, size=2)
    radius = rng.uniform(0.03, 0.055) * (
        1 + 0.25 * np.cos(2 * angle + phases[0]) + 0.15 * np.cos(5 * angle + phases[1])
    )
    return [rng.random(2) + np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)]


# Objects that belong to no class: short lines, groups of dots, shapeless blobs.
CLUTTER: tuple[Callable[[np.random.Generator], list[Contour]], ...] = (_line, _dots, _blob)
