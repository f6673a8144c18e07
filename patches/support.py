"""What the patched originals need besides `select()` and `rescue()`: more views of an image from the original's own
transforms, random choices that are a step's own, strong views of chosen images, and what a network made on its way.

The lines in patches/ import this; it works as well in any trainer over a torchvision dataset.

# k images that are rescued
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from hvp.common.evaluation.checkpoints import PLAIN_TYPES
from hvp.common.views import ViewTransform, normalize
from hvp.common.views.randomness import mix
from hvp.common.views.strong import StrongTransform, StrongViews

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


def candidate_crops(transform: Any, num_global: int, num_local: int) -> Views:
    """Candidates by the transforms of DINO's augmentation class, in the order of the crops that they may become.

    Args:
        transform: has `global_transfo1`, `global_transfo2` and `local_transfo`, as DINO's and iBOT's.
        num_global: candidates for each of the two global crops.
        num_local: candidates for the local crops, all together.
    """
    counts = num_global, num_global, num_local
    transforms = transform.global_transfo1, transform.global_transfo2, transform.local_transfo
    return Views(*zip(transforms, counts, strict=True))


def allow_plain_checkpoints() -> None:
    """Lets `torch.load()` read checkpoints that hold arguments and NumPy's numbers besides tensors.

    DINO's and iBOT's do, and PyTorch after 2.5 refuses them. Nothing from a file is executed all the same.
    """
    torch.serialization.add_safe_globals(PLAIN_TYPES)


def step_generator(seed: int, step: int) -> torch.Generator:
    """What `select()` draws a step's combinations from: the same in all processes, after a resume, and in our trainers.

    Args:
        seed: of the run, 0 or more.
        step: optimiser step, counted from 0.
    """
    return torch.Generator().manual_seed(mix(seed, step))


class Rescuable(Dataset[tuple[Any, int]]):
    """A dataset whose images can be asked for again, as strong views: it gives (views, index) for (views, label).

    Args:
        dataset: a torchvision dataset of Pillow images, with its transforms.
        size: height and width of a strong view, pixels.
        crop_scale: area of its crop, as a fraction of the image's, (min, max).
        interpolation: of its resize, as the original's.
        seed: of the strong views, 0 or more.
        normalized: by ImageNet's mean and standard deviation; otherwise in [0, 1].
    """

    def __init__(
        self,
        dataset: Any,
        size: int,
        crop_scale: Sequence[float],
        *,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        seed: int = 0,
        normalized: bool = True,
    ) -> None:
        self.dataset = dataset
        self.normalized = normalized
        scale = (crop_scale[0], crop_scale[1])
        self._transform = StrongTransform(ViewTransform(size=size, scale=scale, interpolation=interpolation, blur=0.0))
        self._seed = seed
        self._strong: StrongViews | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        views, _ = self.dataset[index]
        return views, int(index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_strong": None}  # threads do not travel to loader workers

    def strong_views(self, epoch: int, index: Tensor) -> Tensor:
        """Strong views of images, made here and now by a few threads.

        Args:
            epoch: or step; with the index it says what a view looks like.
            index: [k] int64, of images of the dataset.

        Returns:
            [k, 3, size, size] float32 on the CPU.
        """
        if self._strong is None:
            threads = min(8, os.cpu_count() or 1)
            self._strong = StrongViews(_Images(self.dataset), self._transform, seed=self._seed, threads=threads)
        pixels = self._strong([(epoch, number) for number in index.tolist()])
        return normalize(pixels) if self.normalized else pixels.movedim(-1, 1).float() / 255


class _Images:
    """The untransformed images of a torchvision dataset, an `ImageSource`."""

    name = "the original's dataset"
    classes = None

    def __init__(self, dataset: Any) -> None:
        self.dataset = copy.copy(dataset)
        # torchvision's own call the first of these, a VisionDataset of one's own the second
        self.dataset.transform = self.dataset.transforms = None

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> NDArray[np.uint8]:
        return np.array(self.dataset[index][0].convert("RGB"))

    def labels(self) -> None:
        return None

    def describe(self, index: int) -> str:
        return f"{self.name}, image {index}"


class IndexedCollate:
    """A collate function that makes a dict, and adds to it, as `index`, which images of a `Rescuable` these are."""

    def __init__(self, collate: Callable[[Any], Mapping[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[tuple[Any, int]]) -> dict[str, Any]:
        """What `collate` makes of the samples, and `index` [B] int64."""
        return {**self.collate(samples), "index": torch.tensor([index for _, index in samples])}


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what a module makes while this is open, call by call, with gradient."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
