"""The reference view pipeline: Pillow and torchvision, operation by operation as in the upstreams.

Given the same parameters, views equal those of torchvision's own transforms (v1) on PIL images, pixel by pixel.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from hvp.common.views.parameters import JITTER_ORDERS, ViewParameters, ViewTransform


def render(
    image: NDArray[np.uint8], rows: NDArray[np.float32], transform: ViewTransform, out: NDArray[np.uint8]
) -> None:
    """Render the views of one slot; same arguments as `fast.render`.

    Args:
        image: [H, W, 3] uint8 RGB, the decoded source image.
        rows: [n, C] float32, one row of `COLUMNS` per view, all of one slot.
        transform: the slot's transform.
        out: [n, size, size, 3] uint8; overwritten with the views.
    """
    source = Image.fromarray(image)
    for row, view in zip(rows.tolist(), out, strict=True):
        view[:] = np.asarray(_view(source, ViewParameters(*row), transform))


def _view(source: Image.Image, p: ViewParameters, transform: ViewTransform) -> Image.Image:
    view = TF.resized_crop(
        source,
        int(p.top),
        int(p.left),
        int(p.height),
        int(p.width),
        [transform.size, transform.size],
        InterpolationMode(transform.interpolation),
    )
    if p.flip:
        view = TF.hflip(view)
    if p.jitter:
        view = _jitter(view, p)
    if p.grayscale:
        view = TF.to_grayscale(view, num_output_channels=3)
    if p.blur_sigma:
        view = view.filter(ImageFilter.GaussianBlur(radius=p.blur_sigma))
    if p.solarize:
        view = ImageOps.solarize(view, transform.solarize_threshold)
    return view


def _jitter(view: Image.Image, p: ViewParameters) -> Image.Image:
    # A neutral factor comes from a strength of 0, for which ColorJitter skips the operation.
    for operation in JITTER_ORDERS[int(p.order)]:
        if operation == "brightness" and p.brightness != 1:
            view = TF.adjust_brightness(view, p.brightness)
        elif operation == "contrast" and p.contrast != 1:
            view = TF.adjust_contrast(view, p.contrast)
        elif operation == "saturation" and p.saturation != 1:
            view = TF.adjust_saturation(view, p.saturation)
        elif operation == "hue" and p.hue != 0:
            view = TF.adjust_hue(view, p.hue)
    return view
