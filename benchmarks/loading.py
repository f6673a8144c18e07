"""Speed of the loader's fast pipeline against the upstreams' way of making views, on one core; cost of strong views.

The loader's reference is the plain procedure, written out below: each image decoded once, each view made by
torchvision's v1 transforms on PIL images and turned into a normalised float tensor. Both start from the same JPEG files
in memory.
"""

import io
import random
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms

from hvp.benchmarks.timing import Row, benchmark_settings, interleaved, ratio, threads
from hvp.common.training.rescuing import IMAGES_FOR_ONE
from hvp.common.views.loader import MultiViewLoader, ViewBatch
from hvp.common.views.normalize import MEAN, STD
from hvp.common.views.parameters import ViewSlot, ViewTransform
from hvp.common.views.strong import StrongTransform, StrongViews

IMAGES, ROUNDS = 8, 5
IMAGE_SIZE = (375, 500)
"""Height and width in pixels, ImageNet's most frequent."""

GLOBAL_1 = ViewTransform(size=224, scale=(0.4, 1.0), blur=1.0)
GLOBAL_2 = ViewTransform(size=224, scale=(0.4, 1.0), blur=0.1, solarize=0.2)
LOCAL = ViewTransform(size=96, scale=(0.05, 0.4), blur=0.5)
SLOTS = (
    ViewSlot("global1", GLOBAL_1, candidates=2, kept=1),
    ViewSlot("global2", GLOBAL_2, candidates=2, kept=1),
    ViewSlot("local", LOCAL, candidates=16, kept=8),
)
"""The 4 global and 16 local views that DINO with HVP samples."""


def loader_rows(rounds: int = 7) -> list[Row]:
    """Times the loader against the plain procedure, on one thread.

    Returns:
        The gain at 4 + 16 crops; the gain over the upstream's vanilla 2 + 8; and the traffic from a worker, MB per
        image. The rows' `memory_mb` is that traffic, their seconds are for `IMAGES` images.
    """
    source = Jpegs(IMAGES)
    loader = MultiViewLoader(source, SLOTS, batch_size=IMAGES, seed=0, workers=0)
    epochs = iter(range(rounds + 1))
    batches: list[ViewBatch] = []

    def ours() -> None:
        batches[:] = next(loader.epoch(next(epochs)))

    hard, vanilla = _plain_views(2, 2, 16), _plain_views(1, 1, 8)
    with threads(1), torch.random.fork_rng(devices=[]):
        seconds, hard_seconds, vanilla_seconds = interleaved(
            [
                ours,
                lambda: [hard(source.open(index)) for index in range(IMAGES)],
                lambda: [vanilla(source.open(index)) for index in range(IMAGES)],
            ],
            rounds,
        )
    tensors = [*batches[0].pixels, batches[0].parameters, batches[0].index]
    traffic = sum(tensor.nbytes for tensor in tensors) / IMAGES / 1e6

    def gain(case: str, reference: list[float], target: float) -> Row:
        gained = ratio(reference, seconds)
        return Row("loader", case, gained, target, False, traffic, median(seconds), median(reference))

    return [
        gain("4 + 16 crops: Pillow's time over the fast pipeline's", hard_seconds, 4.5),
        gain("Pillow's time for 2 + 8 crops over the fast pipeline's for 4 + 16", vanilla_seconds, 2.0),
        Row(
            "loader",
            "MB an image from a worker, 4 + 16 crops",
            traffic,
            1.1,
            True,
            traffic,
            median(seconds),
            median(hard_seconds),
        ),
    ]


def strong_rows(rounds: int = 7) -> list[Row]:
    """Time strong views of a 64th of a batch: images read again, against keeping all decoded images in shared memory.

    `memory_mb` is that memory, which reading again does not need.
    """
    batch = 128
    source = Jpegs(batch)
    decoded = [source.read(index) for index in range(batch)]
    kept = [torch.empty((*IMAGE_SIZE, 3), dtype=torch.uint8).share_memory_() for _ in range(batch)]
    transform = StrongTransform(GLOBAL_1)
    again = StrongViews(source, transform, seed=0, threads=1)
    from_kept = StrongViews(_Arrays([tensor.numpy() for tensor in kept]), transform, seed=0, threads=1)
    keys = [(0, index) for index in range(0, batch, IMAGES_FOR_ONE)]
    views: list[Tensor] = []

    def read_again() -> None:
        views[:] = [again(keys)]

    def keep_all() -> None:
        for tensor, image in zip(kept, decoded, strict=True):
            tensor.numpy()[:] = image
        views[1:] = [from_kept(keys)]

    try:
        with benchmark_settings(torch.device("cpu")):
            seconds, reference = interleaved([read_again, keep_all], rounds)
    finally:
        again.close()
        from_kept.close()
    case = f"strong views of {len(keys)} of {batch} images, read again, over keeping the decoded images of the batch"
    memory = sum(tensor.nbytes for tensor in kept) / 1e6
    equal = torch.equal(*views)
    return [
        Row("rescue", case, ratio(seconds, reference), 1.0, True, memory, median(seconds), median(reference), equal)
    ]


def photograph(index: int, height: int, width: int) -> bytes:
    """Make a JPEG file (quality 90) of a picture with gradients, textures, edges and noise, as in a photograph."""
    rng = np.random.default_rng([index, height, width])
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    picture = np.empty((height, width, 3))
    for channel in range(3):
        a, b, c, d = rng.uniform(1, 9, 4)
        picture[..., channel] = rng.uniform(80, 170) + 50 * np.sin(a * x + b * y) + 35 * np.cos(c * x - d * y)
    texture = 18 * np.sin(rng.uniform(60, 140) * x + rng.uniform(20, 90) * y)
    picture += (texture * (y > rng.uniform(0.3, 0.6)))[..., None]
    for _ in range(6):
        inside = (y - rng.uniform(0, 0.8)) ** 2 + (x - rng.uniform(0, 1)) ** 2 < rng.uniform(0.05, 0.2) ** 2
        picture[inside] = 0.4 * picture[inside] + 0.6 * rng.uniform(0, 255, 3)
    picture += rng.normal(0, 5, picture.shape)
    file = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


class Jpegs:
    """Image source of made photographs, as JPEG files in memory."""

    classes = None

    def __init__(self, count: int) -> None:
        self.name = f"made photographs ({count} images)"
        self.files = [photograph(index, *IMAGE_SIZE) for index in range(count)]

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.files[index])).convert("RGB")

    def read(self, index: int) -> NDArray[np.uint8]:
        return np.array(self.open(index))

    def labels(self) -> None:
        return None

    def describe(self, index: int) -> str:
        return f"made photograph {index}"


class _Arrays:
    """Image source of decoded images."""

    name, classes = "decoded images", None

    def __init__(self, images: list[NDArray[np.uint8]]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> NDArray[np.uint8]:
        return self.images[index]

    def labels(self) -> None:
        return None

    def describe(self, index: int) -> str:
        return f"decoded image {index}"


def _plain_views(num_global1: int, num_global2: int, num_local: int) -> Callable[[Image.Image], list[Tensor]]:
    """Augment as upstream: a chain of torchvision transforms for each kind of view, applied to the PIL image."""
    rng = random.Random(0)

    def sometimes(p: float, change: Callable[[Image.Image], Image.Image]) -> Callable[[Image.Image], Image.Image]:
        return lambda image: change(image) if rng.random() < p else image

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))

    def chain(size: int, scale: tuple[float, float], blur_p: float, solarize_p: float = 0.0) -> transforms.Compose:
        bicubic = transforms.InterpolationMode.BICUBIC
        jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=scale, interpolation=bicubic),
                transforms.RandomHorizontalFlip(0.5),
                transforms.RandomApply([jitter], 0.8),
                transforms.RandomGrayscale(0.2),
                sometimes(blur_p, blur),
                sometimes(solarize_p, ImageOps.solarize),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    global1, global2 = chain(224, (0.4, 1.0), 1.0), chain(224, (0.4, 1.0), 0.1, 0.2)
    chains = [global1] * num_global1 + [global2] * num_global2 + [chain(96, (0.05, 0.4), 0.5)] * num_local
    return lambda image: [make(image) for make in chains]
