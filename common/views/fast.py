"""The default view pipeline: torch's uint8 resize and OpenCV.

Each operation is the cheapest form of Pillow's that stays close to it, on uint8 in place. Pillow truncates where OpenCV
rounds (`_TRUNCATE`), and its blur is a kernel of three box filters (`_blur_kernel`).
tests/common/views/test_views_pipelines.py bounds the difference from the views of `pil.py`.
"""

import math
from functools import lru_cache

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from hvp.common.views.parameters import JITTER_ORDERS, ViewParameters, ViewTransform

Pixels = NDArray[np.uint8]

_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)
"""Weights of red, green and blue in Pillow's grey level (ITU-R 601-2)."""

_TRUNCATE = -0.499
"""Offset that makes OpenCV, which rounds to nearest, drop the fraction as Pillow's blends do."""


def render(image: Pixels, rows: NDArray[np.float32], transform: ViewTransform, out: Pixels) -> None:
    """Render the views of one slot.

    Args:
        image: [H, W, 3] uint8 RGB, the decoded source image.
        rows: [n, C] float32, one row of `COLUMNS` per view, all of one slot.
        transform: the slot's transform.
        out: [n, size, size, 3] uint8, each out[i] C-contiguous; overwritten with the views.
    """
    # Channels-last strides take torch's vectorised uint8 path, and a crop needs no copy.
    source = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    for row, view in zip(rows.tolist(), out, strict=True):
        parameters = ViewParameters(*row)
        _crop(source, parameters, transform, view)
        if parameters.jitter:
            _jitter(view, parameters)
        _finish(view, parameters, transform)


def _crop(source: torch.Tensor, p: ViewParameters, transform: ViewTransform, out: Pixels) -> None:
    top, left = int(p.top), int(p.left)
    crop = source[:, :, top : top + int(p.height), left : left + int(p.width)]
    view = interpolate(crop, (transform.size, transform.size), mode=transform.interpolation, antialias=True)
    pixels = view[0].permute(1, 2, 0).numpy()
    if p.flip:
        cv2.flip(pixels, 1, out)
    else:
        np.copyto(out, pixels)


def _jitter(view: Pixels, p: ViewParameters) -> None:
    # A neutral factor comes from a strength of 0, for which ColorJitter skips the operation.
    for operation in JITTER_ORDERS[int(p.order)]:
        if operation == "brightness" and p.brightness != 1:
            cv2.convertScaleAbs(view, view, p.brightness, _TRUNCATE)
        elif operation == "contrast" and p.contrast != 1:
            mean = round(sum(weight * level for weight, level in zip(_LUMA, cv2.mean(view), strict=False)))
            cv2.addWeighted(view, p.contrast, view, 0.0, (1 - p.contrast) * mean + _TRUNCATE, view)
        elif operation == "saturation" and p.saturation != 1:
            cv2.transform(view, _saturation_matrix(p.saturation), view)
        elif operation == "hue" and p.hue != 0:
            _shift_hue(view, p.hue)


def _saturation_matrix(factor: float) -> NDArray[np.float64]:
    """Matrix [3, 4] for factor * pixel + (1 - factor) * its grey level, with the offset that truncates."""
    red, green, blue = ((1 - factor) * weight for weight in _LUMA)
    return np.array(
        [
            (red + factor, green, blue, _TRUNCATE),
            (red, green + factor, blue, _TRUNCATE),
            (red, green, blue + factor, _TRUNCATE),
        ]
    )


def _shift_hue(view: Pixels, turns: float) -> None:
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
    rows = hsv.reshape(view.shape[0], -1)
    # Hue is a circle of 256 steps: uint8 wraps around. torchvision also truncates the shift to whole steps.
    np.add(rows, _hue_row(int(turns * 255) % 256, view.shape[1]), out=rows)
    cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, view)


@lru_cache(maxsize=1024)
def _hue_row(shift: int, width: int) -> Pixels:
    """(shift, 0, 0) for every pixel of a row: adding long rows is faster than adding to every third byte."""
    return np.tile(np.array([shift, 0, 0], dtype=np.uint8), width)


def _finish(view: Pixels, p: ViewParameters, transform: ViewTransform) -> None:
    """Apply grayscale, blur and solarize; a grey view stays in one channel until the end."""
    work = cv2.cvtColor(view, cv2.COLOR_RGB2GRAY) if p.grayscale else view
    if p.blur_sigma:
        kernel = _blur_kernel(p.blur_sigma)
        cv2.sepFilter2D(work, -1, kernel, kernel, work, borderType=cv2.BORDER_REPLICATE)
    if p.solarize:
        cv2.LUT(work, _solarize_table(transform.solarize_threshold), work)
    if p.grayscale:
        cv2.cvtColor(work, cv2.COLOR_GRAY2RGB, view)


def _blur_kernel(sigma: float) -> NDArray[np.float32]:
    """Taps of Pillow's GaussianBlur: three box filters whose borders have a fractional weight.

    Source: Gwosdek, Grewenig, Bruhn, Weickert, "Theoretical foundations of Gaussian convolution by extended box
        filtering" (SSVM 2011), with 3 passes, which is what Pillow implements.
    """
    variance = sigma * sigma / 3  # of one pass
    half = int((math.sqrt(12 * variance + 1) - 1) / 2)  # whole pixels on each side of the centre
    border = (2 * half + 1) * (half * (half + 1) - 3 * variance) / (6 * (variance - (half + 1) ** 2))
    weight = 1 / (2 * half + 1 + 2 * border)
    box = [border * weight, *[weight] * (2 * half + 1), border * weight]
    # OpenCV's 8-bit filter rounds taps to 1/256. Rounding them here keeps their sum at 1, and drops empty ends.
    steps = [round(256 * tap) for tap in _convolve(_convolve(box, box), box)]
    steps[len(steps) // 2] += 256 - sum(steps)
    while steps[0] == 0:
        steps = steps[1:-1]
    return np.array([step / 256 for step in steps], dtype=np.float32)


def _convolve(a: list[float], b: list[float]) -> list[float]:
    # For a dozen numbers, plain Python is several times faster than numpy.
    out = [0.0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            out[i + j] += x * y
    return out


@lru_cache
def _solarize_table(threshold: int) -> Pixels:
    levels = np.arange(256)
    return np.where(levels < threshold, levels, 255 - levels).astype(np.uint8)
