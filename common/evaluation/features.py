"""Frozen features: the evaluation's view of an image, the encoder over a whole dataset, and a cache of what it gave."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hvp.common.data import BadImage, ImageSource
from hvp.common.data.workers import Batches, WatchedSource, shared_empty
from hvp.common.errors import UserError
from hvp.common.training.archive import read_archive, save_sealed
from hvp.common.training.checkpoint import write_atomically
from hvp.common.views import normalize

# N images, B images per forward pass, D features

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

LARGEST_ENLARGEMENT = 2**24
"""Pixels of an enlarged picture that is made as a whole, 64 MiB; of a larger one only the part that is seen."""

Progress = Callable[[str, int, int], None]
"""Told what is going on: the stage's name, what is done, what there is to do."""


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that tells nobody."""


def evaluation_view(image: np.ndarray, resolution: int) -> np.ndarray:
    """The one view of an image that evaluation sees: the shorter side resized, then the centre cut out.

    The shorter side becomes 256 / 224 of the resolution, 256 pixels at 224.

    Args:
        image: [H, W, 3] uint8.
        resolution: side of the result, in pixels.

    Returns:
        [resolution, resolution, 3] uint8.

    Source: eval_knn.py, extract_feature_pipeline: Resize(256, bicubic) and CenterCrop(224).
    """
    shape = image.shape[:2]
    shorter = round(resolution * 256 / 224)
    # As torchvision rounds: the longer side down, the crop's corner to the nearest, halves to even.
    height, width = (shorter * side // min(shape) for side in shape)
    top, left = round((height - resolution) / 2), round((width - resolution) / 2)
    if height * width > max(shape[0] * shape[1], LARGEST_ENLARGEMENT):
        return _enlarged(image, (height, width), (top, left), resolution)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + resolution, top + resolution)))


def _enlarged(image: np.ndarray, size: tuple[int, int], corner: tuple[int, int], side: int) -> np.ndarray:
    """A square out of an enlarged image, without the rest of it.

    A picture of 1 x 30 000 pixels would become one of 256 x 7 680 000. Pillow's `resize(box=...)` holds the box in
    float32, which moves it: one pixel in a thousand would differ by a grey level.

    Args:
        image: [H, W, 3] uint8.
        size: height and width of the whole enlargement, neither smaller than the image's.
        corner: top and left of the square in it.
        side: of the square.

    Returns:
        [side, side, 3] uint8, equal to what Pillow's bicubic resize gives: columns first, rounded to uint8, then rows.
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
    """Pillow's weights for `count` pixels of a line that grows from `length` to `enlarged` pixels.

    Returns:
        The part of the line that these pixels are made of, R pixels, and [count, R] int64 in units of 2 ** -22.

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
    weights /= weights.cumsum(axis=1)[:, -1:]  # adds up from the first to the last, as Pillow does
    scaled = weights * 2**22
    return part, np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int64)


def _fixed_to_uint8(values: np.ndarray) -> np.ndarray:
    """Sums in units of 2 ** -22, rounded and clipped to 0 ... 255."""
    return np.clip((values + (1 << 21)) >> 22, 0, 255)


class _Views:
    """The evaluation views of some images of a source."""

    def __init__(self, source: ImageSource, resolution: int) -> None:
        self.source, self.resolution = source, resolution

    def __call__(self, indices: range) -> Tensor:
        """[B, resolution, resolution, 3] uint8."""
        views = shared_empty((len(indices), self.resolution, self.resolution, 3), torch.uint8)
        rows = views.numpy()
        for row, index in zip(rows, indices, strict=True):
            row[:] = evaluation_view(self.source.read(index), self.resolution)
        return views


def _read(batches: Batches[Tensor]) -> Iterator[Tensor]:
    try:
        yield from batches.one_pass()
    except BadImage as error:
        raise unusable(error) from error


def unusable(error: BadImage) -> UserError:
    """What to say of a bad image where leaving it out is no choice."""
    return UserError(f"{error.where}: {error.reason}.\n    An evaluation uses every image: replace or remove the file.")


@contextmanager
def frozen(encoder: nn.Module, device: torch.device | str, precision: Precision) -> Iterator[None]:
    """Evaluation mode, no gradients and the precision's autocast; every module's mode is put back afterwards."""
    dtype = AUTOCAST[precision]
    training = [module for module in encoder.modules() if module.training]
    encoder.to(device).eval()
    try:
        with torch.no_grad(), torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
            yield
    finally:
        for module in training:
            module.training = True


def extract(
    encoder: nn.Module,
    source: ImageSource,
    *,
    resolution: int,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    batch_size: int = 256,
    workers: int = 0,
    features: Callable[[Tensor], Tensor] | None = None,
    progress: Progress = silent,
) -> Tensor:
    """Features of every image, in the dataset's order.

    Pixels travel from the workers as uint8 and are normalised on the device. The encoder ends on `device`, and its
    modules in the modes they were in. Nothing random is drawn.

    Args:
        encoder: the network.
        source: the images.
        resolution: side of the centre crop, in pixels.
        device: where the encoder runs.
        precision: of the forward pass.
        batch_size: images per forward pass.
        workers: processes that read images; 0 reads in this one.
        features: maps normalised images [B, 3, resolution, resolution] to [B, D]; the encoder itself if not given.
        progress: called after each batch.

    Returns:
        [N, D] float32 on the CPU.

    Raises:
        UserError: an image cannot be read (an evaluation over fewer images would not be comparable), or its features
            are not finite; or a worker died or hangs.
    """
    features = features or encoder
    total = len(source)
    watched = WatchedSource(source, workers)
    batches = Batches(
        _Views(watched, resolution),
        [range(start, min(start + batch_size, total)) for start in range(0, total, batch_size)],
        watched,
        workers=workers,
        pin_memory=torch.device(device).type == "cuda",
    )
    table: Tensor | None = None
    done = 0
    with frozen(encoder, device, precision), closing(batches):
        for pixels in _read(batches):
            output = features(normalize(pixels.to(device, non_blocking=True))).float()  # [B, D]
            bad = ~output.isfinite().all(dim=1)
            if bad.any():
                raise UserError(
                    f"{source.describe(done + int(bad.int().argmax()))}: the encoder's features are not finite."
                    + (" Try precision fp32." if precision != "fp32" else " The weights may come from a diverged run.")
                )
            if table is None:
                table = torch.empty(total, output.shape[1])
            table[done : done + len(output)] = output.cpu()
            done += len(output)
            progress(f"features of {source.name}", done, total)
    if table is None:
        raise UserError(f"{source.name}: there are no images.")
    return table


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of a module's state: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def source_digest(source: ImageSource) -> str:
    """SHA-256 that tells datasets apart: the name, every image's description, and the pixels of three images.

    The pixels tell generated datasets with different options apart, whose descriptions are equal. A file that was
    overwritten under its old name is not noticed, unless it is the first, the middle or the last.
    """
    digest = hashlib.sha256(source.name.encode())
    for index in range(len(source)):
        digest.update(b"\0" + source.describe(index).encode())
    for index in (0, len(source) // 2, len(source) - 1):
        try:
            image = source.read(index)
        except BadImage as error:
            raise unusable(error) from error
        digest.update(f"{image.shape}".encode() + image.tobytes())
    return digest.hexdigest()


def cached(folder: Path | None, key: Mapping[str, Any], compute: Callable[[], Tensor]) -> Tensor:
    """Features from a file in `folder`, or computed and kept there for the next time.

    A file that is damaged is computed again, and one that cannot be written is left out; both are logged.

    Args:
        folder: where the files are; None computes without a cache.
        key: everything the features depend on.
        compute: makes them.

    Returns:
        [N, D] float32 on the CPU.
    """
    if folder is None:
        return compute()
    path = folder / f"features-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.pt"
    if path.exists():
        try:
            features = read_archive(path)["features"]
        except (UserError, KeyError, TypeError) as error:
            log.warning("%s: the feature cache is damaged and computed again (%s)", path, type(error).__name__)
        else:
            log.info("features read from %s", path)
            return features
    features = compute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: save_sealed({"key": dict(key), "features": features}, file))
    except (OSError, UserError) as error:
        log.warning("the features cannot be kept for the next time: %s", error)
    return features
