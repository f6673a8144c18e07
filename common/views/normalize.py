"""Conversion of uint8 pixels to network inputs, with ImageNet's mean and standard deviation."""

from functools import lru_cache

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue over ImageNet, in [0, 1]."""

STD = (0.229, 0.224, 0.225)
"""Standard deviation of red, green and blue over ImageNet."""


def normalize(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Compute `(pixels / 255 - MEAN) / STD` on the device of the pixels.

    Args:
        pixels: [..., H, W, 3] uint8, RGB.
        dtype: type of the result; computed in float32.

    Returns:
        [..., 3, H, W] of that dtype. The memory keeps the order of the pixels (channels last), which convolutions
        prefer; no data is transposed.

    Raises:
        ValueError: the pixels are not uint8, or their last dimension is not 3.
    """
    if pixels.dtype != torch.uint8 or pixels.shape[-1] != 3:
        raise ValueError(f"normalize: pixels are {pixels.dtype} {list(pixels.shape)}, expected uint8 [..., H, W, 3]")
    width = pixels.shape[-2]
    gain, offset = _row(width, pixels.device)
    rows = pixels.flatten(-2).float()  # [..., H, W * 3]
    torch.addcmul(offset, rows, gain, out=rows)
    return rows.to(dtype).unflatten(-1, (width, 3)).movedim(-1, -3)


@lru_cache
def _row(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Gain and offset for one row of pixels, [width * 3]: whole rows vectorise where three channels do not."""
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    return (1 / (255 * std)).repeat(width), (-mean / std).repeat(width)
