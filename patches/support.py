"""Helpers that the patched originals import besides `select()` and `rescue()`.

They sample more views of an image with the original's own transforms, seed the random choices of a step, make strong
views of chosen images, and collect a module's outputs during a forward pass. They work in any trainer that reads a
torchvision dataset.

# k rescued images
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
    """Image transform that returns a list of views, transform after transform.

    Args:
        groups: transforms of one image, each with its number of views.
    """

    def __init__(self, *groups: tuple[Transform, int]) -> None:
        self.groups = groups

    def __call__(self, image: Any) -> list[Any]:
        """Return the views, in order."""
        return [transform(image) for transform, count in self.groups for _ in range(count)]


def candidate_crops(transform: Any, num_global: int, num_local: int) -> Views:
    """Return a transform that samples candidates for the crops of DINO's augmentation class, in the crops' order.

    Args:
        transform: an instance of DINO's or iBOT's class, with `global_transfo1`, `global_transfo2`, `local_transfo`.
        num_global: candidates for each of the two global crops.
        num_local: candidates for all local crops together.
    """
    counts = num_global, num_global, num_local
    transforms = transform.global_transfo1, transform.global_transfo2, transform.local_transfo
    return Views(*zip(transforms, counts, strict=True))


def allow_plain_checkpoints() -> None:
    """Allow `torch.load()` to read checkpoints that hold command line arguments and NumPy numbers besides tensors.

    DINO's and iBOT's checkpoints do, and PyTorch after 2.5 refuses them. Loading still executes nothing from the file.
    """
    torch.serialization.add_safe_globals(PLAIN_TYPES)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator from which `select()` draws a step's combinations.

    It is the same in all processes, after a resume, and in our trainers.

    Args:
        seed: seed of the run, 0 or more.
        step: optimiser step, counted from 0.
    """
    return torch.Generator().manual_seed(mix(seed, step))


class Rescuable(Dataset[tuple[Any, int]]):
    """Dataset that also makes strong views of its images. Its items are (views, index) in place of (views, label).

    Args:
        dataset: a torchvision dataset of Pillow images, with its transforms.
        size: height and width of a strong view, pixels.
        crop_scale: area of a strong view's crop, as a fraction of the image's area, (min, max).
        interpolation: interpolation of the resize; the original's.
        seed: seed of the strong views, 0 or more.
        normalized: normalise strong views by ImageNet's mean and standard deviation; otherwise they are in [0, 1].
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
        """Make strong views of images at once, in a few threads.

        Args:
            epoch: epoch or step; together with the index it determines a view.
            index: indices of images in the dataset, [k] int64.

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
        # torchvision's own datasets call the first of these, other subclasses of VisionDataset the second
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
    """Collate function that adds the images' indices in a `Rescuable` to the dict that another one returns."""

    def __init__(self, collate: Callable[[Any], Mapping[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[tuple[Any, int]]) -> dict[str, Any]:
        """Return the dict of `collate`, with `index` [B] int64 added."""
        return {**self.collate(samples), "index": torch.tensor([index for _, index in samples])}


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect a module's outputs inside the block, call by call, with gradient."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
