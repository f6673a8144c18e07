"""Strong views: RandAugment and Cutout on the source image, then the crop of an ordinary view.

Only the few images that Rescue chooses get one, so they are read again when chosen, by a few threads: Pillow lets other
threads run while it decodes and transforms. A view depends only on (seed, epoch, image index).

Source: Rescue, section 3; FixMatch (arXiv:2001.07685), Table 12, for the operations and their ranges; Cutout
    (arXiv:1708.04552).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from hvp.common.data import ImageSource
from hvp.common.views.loader import Key
from hvp.common.views.parameters import NUM_UNIFORMS, ViewParameters, ViewSlot, ViewTransform, sample_parameters
from hvp.common.views.randomness import uniform_stream

GREY = (127, 127, 127)
"""Colour of Cutout's square."""


@dataclass(frozen=True)
class Operation:
    """One of RandAugment's operations; its magnitude is uniform between `first` and `last`."""

    apply: Callable[[Image.Image, float], Image.Image]
    first: float = 0.0
    last: float = 0.0

    def __call__(self, image: Image.Image, uniform: float) -> Image.Image:
        """Apply the operation, with its magnitude scaled from a number in [0, 1)."""
        return self.apply(image, self.first + (self.last - self.first) * uniform)


def _shear(image: Image.Image, x: float, y: float) -> Any:
    """Shear from the upper left corner; uncovered pixels are black."""
    degrees = [math.degrees(math.atan(ratio)) for ratio in (x, y)]
    return TF.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])


def _translate(image: Image.Image, x: float, y: float) -> Any:
    """Translate by fractions of the sides; uncovered pixels are black."""
    pixels = [round(x * image.width), round(y * image.height)]
    return TF.affine(image, angle=0.0, translate=pixels, scale=1.0, shear=[0.0, 0.0])


OPERATIONS: dict[str, Operation] = {
    "identity": Operation(lambda image, _: image),
    "autocontrast": Operation(lambda image, _: TF.autocontrast(image)),
    "brightness": Operation(TF.adjust_brightness, 0.05, 0.95),
    "color": Operation(TF.adjust_saturation, 0.05, 0.95),
    "contrast": Operation(TF.adjust_contrast, 0.05, 0.95),
    "equalize": Operation(lambda image, _: TF.equalize(image)),
    "posterize": Operation(lambda image, bits: TF.posterize(image, math.floor(bits)), 4, 9),  # whole bits, 4 to 8
    "rotate": Operation(lambda image, degrees: TF.rotate(image, degrees), -30, 30),
    "sharpness": Operation(TF.adjust_sharpness, 0.05, 0.95),
    "shear_x": Operation(lambda image, ratio: _shear(image, ratio, 0.0), -0.3, 0.3),
    "shear_y": Operation(lambda image, ratio: _shear(image, 0.0, ratio), -0.3, 0.3),
    "solarize": Operation(lambda image, level: TF.solarize(image, math.floor(level)), 0, 257),  # none at 256
    "translate_x": Operation(lambda image, share: _translate(image, share, 0.0), -0.3, 0.3),
    "translate_y": Operation(lambda image, share: _translate(image, 0.0, share), -0.3, 0.3),
}
"""FixMatch's 14 operations. Magnitudes are factors, bits, degrees, ratios, grey levels and fractions of the side."""


@dataclass(frozen=True)
class StrongTransform:
    """Distribution of a strong view. Applied in this order: operations, Cutout, crop and resize, flip."""

    view: ViewTransform
    """The method's own view, which gives the crop, size and flip; its colour augmentation and blur are not used."""

    num_ops: int = 2
    """Number of operations, each drawn independently from all 14."""

    cutout: float = 0.5
    """Side of the grey square, as a fraction of the image's shorter side; 0: none. Its centre is anywhere inside."""


def strong_view(image: NDArray[np.uint8], uniforms: Iterator[float], transform: StrongTransform) -> NDArray[np.uint8]:
    """Make a strong view.

    Args:
        image: [H, W, 3] uint8 RGB, the decoded source image; it is not changed.
        uniforms: independent random numbers in [0, 1).
        transform: the distribution of the view.

    Returns:
        [size, size, 3] uint8 RGB.
    """
    picture = Image.fromarray(image)
    names = list(OPERATIONS)
    for _ in range(transform.num_ops):
        operation = OPERATIONS[names[int(next(uniforms) * len(names))]]
        picture = operation(picture, next(uniforms))
    if transform.cutout:
        picture = _cut_out(picture, transform.cutout, next(uniforms), next(uniforms))
    crop = replace(transform.view, jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0)
    slot = ViewSlot("strong", crop, candidates=1, kept=1)
    numbers = np.array([[next(uniforms) for _ in range(NUM_UNIFORMS)]])
    p = ViewParameters(*sample_parameters(numbers, image.shape[:2], (slot,))[0].tolist())
    box = int(p.top), int(p.left), int(p.height), int(p.width)
    picture = TF.resized_crop(picture, *box, [crop.size, crop.size], InterpolationMode(crop.interpolation))
    return np.asarray(TF.hflip(picture) if p.flip else picture)


def _cut_out(image: Image.Image, side: float, x: float, y: float) -> Image.Image:
    """Paste a grey square around a point into a copy; x and y in [0, 1) are fractions of width and height."""
    half = side * min(image.size) / 2
    left, top = x * image.width, y * image.height
    box = (
        max(0, round(left - half)),
        max(0, round(top - half)),
        min(image.width, round(left + half)),
        min(image.height, round(top + half)),
    )
    image = image.copy()
    image.paste(GREY, box)
    return image


class StrongViews:
    """Pool of threads that make strong views of given images; must be closed.

    Args:
        source: the images.
        transform: the distribution of a view.
        seed: the run's seed, 0 or more.
        threads: number of threads that read and transform.
    """

    def __init__(self, source: ImageSource, transform: StrongTransform, *, seed: int, threads: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="hvp-strong")

    def __call__(self, keys: Sequence[Key]) -> Tensor:
        """Make the strong view of each image.

        Args:
            keys: (epoch, image index) of k images, which also determines their views.

        Returns:
            [k, size, size, 3] uint8 RGB.

        Raises:
            BadImage: an image does not decode (any more).
        """
        views = list(self._threads.map(self._make, keys))
        return torch.from_numpy(np.stack(views))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _make(self, key: Key) -> NDArray[np.uint8]:
        epoch, index = key
        uniforms = uniform_stream("strong", self.seed, epoch, index, 0)
        return strong_view(self.source.read(index), uniforms, self.transform)
