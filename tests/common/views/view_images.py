"""Image source of photograph-like pictures, generated and compressed in memory."""

import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hvp.benchmarks import loading as benchmark
from hvp.common.data import BadImage


@lru_cache(maxsize=64)
def photograph(index: int, height: int, width: int) -> NDArray[np.uint8]:
    """Generate a JPEG-compressed picture, [height, width, 3] uint8."""
    return np.array(Image.open(io.BytesIO(benchmark.photograph(index, height, width))))


class Photographs:
    """An ImageSource in memory; images whose index is in `bad` do not decode."""

    classes = None

    def __init__(self, count: int, bad: tuple[int, ...] = (), size: tuple[int, int] = (60, 80)) -> None:
        self.count, self.bad, self.size = count, bad, size
        self.name = f"photographs ({count} images)"

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> NDArray[np.uint8]:
        if index in self.bad:
            raise BadImage(self.describe(index), "made bad for a test")
        height, width = self.size
        return photograph(index, height + index % 3, width - index % 5).copy()

    def labels(self) -> None:
        return None

    def describe(self, index: int) -> str:
        return f"photograph {index}"
