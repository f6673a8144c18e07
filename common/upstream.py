"""What the patched originals need besides `select()`: more views of an image from the upstream's own transforms, and
random choices that are a step's own.

The lines in patches/ import this; it works as well in any trainer over a torchvision dataset.
"""

from collections.abc import Callable
from typing import Any

import torch

from hvp.common.engine.run import mix

Transform = Callable[[Any], Any]


class Views:
    """An image transform that gives a list of views: so many of the first transform, then of the second, and so on.

    Args:
        groups: transforms of one image, each with the number of its views.
    """

    def __init__(self, *groups: tuple[Transform, int]) -> None:
        self.groups = groups

    def __call__(self, image: Any) -> list[Any]:
        """The views, in order."""
        return [transform(image) for transform, count in self.groups for _ in range(count)]


def step_generator(seed: int, step: int) -> torch.Generator:
    """What `select()` draws a step's combinations from: the same in all processes, after a resume, and in our trainers.

    Args:
        seed: of the run, 0 or more.
        step: optimiser step, counted from 0.
    """
    return torch.Generator().manual_seed(mix(seed, step))
