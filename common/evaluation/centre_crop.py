"""The view of an image for evaluation: the shorter side resized, then the centre cropped."""

import numpy as np
from PIL import Image

LARGEST_ENLARGEMENT = 2**24
"""Most pixels of an enlarged image that is made whole, 64 MiB; of a larger one only the crop is computed."""


def evaluation_view(image: np.ndarray, resolution: int) -> np.ndarray:
    """Resize the shorter side of an image to 256 / 224 of the resolution (256 pixels at 224) and crop the centre.

    Args:
        image: [H, W, 3] uint8.
        resolution: side of the result, in pixels.

    Returns:
        [resolution, resolution, 3] uint8.

    Source: eval_knn.py, extract_feature_pipeline: Resize(256, bicubic) and CenterCrop(224).
    """
    shape = image.shape[:2]
    shorter = round(resolution * 256 / 224)
    # torchvision's rounding: the longer side down, the crop's corner to the nearest integer, halves to even.
    height, width = (shorter * side // min(shape) for side in shape)
    top, left = round((height - resolution) / 2), round((width - resolution) / 2)
    if height * width > max(shape[0] * shape[1], LARGEST_ENLARGEMENT):
        return _enlarged(image, (height, width), (top, left), resolution)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + resolution, top + resolution)))


def _enlarged(image: np.ndarray, size: tuple[int, int], corner: tuple[int, int], side: int) -> np.ndarray:
    """Compute a square of an enlarged image without computing the rest.

    An image of 1 x 30 000 pixels would become one of 256 x 7 680 000. Pillow's `resize(box=...)` is no help: it stores
    the box in float32, which shifts it, and one pixel in a thousand would differ by a grey level.

    Args:
        image: [H, W, 3] uint8.
        size: height and width of the whole enlargement, neither smaller than the image's.
        corner: top and left of the square in it.
        side: side of the square.

    Returns:
        [side, side, 3] uint8, equal to Pillow's bicubic resize: columns first, rounded to uint8, then rows.
    """
    (rows, down), (columns, across) = (
        _bicubic(length, enlarged, first, side)
        for length, enlarged, first in zip(image.shape[:2], size, corner, strict=True)
    )
    pixels = image[rows, columns].astype(np.int64)  # [R, C, 3]
    pixels = _fixed_to_uint8(np.einsum("xc,rcd->rxd", across, pixels))
    pixels = _fixed_to_uint8(np.einsum("yr,rxd->yxd", down, pixels))
    return pixels.astype(np.uint8)


def _bicubic(length: int, enlarged: int, first: int, count: int) -> tuple[slice, np.ndarray]:
    """Pillow's bicubic weights for `count` pixels of a line enlarged from `length` to `enlarged` pixels.

    Returns:
        The slice of the line that these pixels depend on, R pixels, and weights [count, R] int64 in units of 2 ** -22.

    Source: Pillow Resample.c, precompute_coeffs and normalize_coeffs_8bpc.
    """
    centre = (np.arange(first, first + count) + 0.5) * (length / enlarged)
    start = np.maximum((centre - 2 + 0.5).astype(int), 0)
    stop = np.minimum((centre + 2 + 0.5).astype(int), length)
    part = slice(int(start[0]), int(stop[-1]))
    place = np.arange(part.start, part.stop)
    x = np.abs(place - centre[:, None] + 0.5)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5)
    weights[(place < start[:, None]) | (place >= stop[:, None]) | (x >= 2)] = 0
    weights /= weights.cumsum(axis=1)[:, -1:]  # summed from first to last, like Pillow
    scaled = weights * 2**22
    return part, np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int64)


def _fixed_to_uint8(values: np.ndarray) -> np.ndarray:
    """Round sums in units of 2 ** -22 and clip them to 0 ... 255."""
    return np.clip((values + (1 << 21)) >> 22, 0, 255)
