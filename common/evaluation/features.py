"""Features of a frozen encoder for a whole dataset, and a cache for them."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hvp.common.data import BadImage, ImageSource
from hvp.common.data.workers import Batches, WatchedSource, shared_empty
from hvp.common.errors import UserError
from hvp.common.evaluation.centre_crop import evaluation_view
from hvp.common.training.archive import read_archive, save_sealed
from hvp.common.training.checkpoint import write_atomically
from hvp.common.views import normalize

# N images, B images per forward pass, D features

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total) reports progress."""


def silent(stage: str, done: int, total: int) -> None:
    """Report no progress."""


class _Views:
    """Read images of a source and crop them for evaluation."""

    def __init__(self, source: ImageSource, resolution: int) -> None:
        self.source, self.resolution = source, resolution

    def __call__(self, indices: range) -> Tensor:
        """[B, resolution, resolution, 3] uint8."""
        views = shared_empty((len(indices), self.resolution, self.resolution, 3), torch.uint8)
        rows = views.numpy()
        for row, index in zip(rows, indices, strict=True):
            row[:] = evaluation_view(self.source.read(index), self.resolution)
        return views


@contextmanager
def bad_images_refused() -> Iterator[None]:
    """Turn a bad image into an error for the user: skipping it would make the result incomparable."""
    try:
        yield
    except BadImage as error:
        raise UserError(
            f"{error.where}: {error.reason}.\n    An evaluation uses every image: replace or remove the file."
        ) from error


@contextmanager
def frozen(encoder: nn.Module, device: torch.device | str, precision: Precision) -> Iterator[None]:
    """Use evaluation mode, no gradients and the precision's autocast; restore every module's mode afterwards."""
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
    """Compute the features of every image, in the dataset's order.

    Workers send pixels as uint8; they are normalised on the device. The encoder stays on `device`; the modes of its
    modules are restored. No random numbers are drawn.

    Args:
        encoder: the network.
        source: the images.
        resolution: side of the centre crop, in pixels.
        device: device of the encoder.
        precision: precision of the forward pass.
        batch_size: images per forward pass.
        workers: processes that read images; 0 reads in this one.
        features: maps normalised images [B, 3, resolution, resolution] to [B, D]; by default the encoder itself.
        progress: called after each batch.

    Returns:
        [N, D] float32 on the CPU.

    Raises:
        UserError: there are no images, an image cannot be read, its features are not finite, or a worker died or hangs.
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
    with frozen(encoder, device, precision), closing(batches), bad_images_refused():
        for pixels in batches.one_pass():
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
    """SHA-256 of a module's state: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def source_digest(source: ImageSource) -> str:
    """SHA-256 of a dataset's name, every image's description, and the pixels of three images.

    The pixels distinguish generated datasets with different options, whose descriptions are equal. A file overwritten
    under its old name goes unnoticed unless it is the first, the middle or the last.
    """
    digest = hashlib.sha256(source.name.encode())
    for index in range(len(source)):
        digest.update(b"\0" + source.describe(index).encode())
    with bad_images_refused():
        for index in (0, len(source) // 2, len(source) - 1):
            image = source.read(index)
            digest.update(f"{image.shape}".encode() + image.tobytes())
    return digest.hexdigest()


def cached(folder: Path | None, key: Mapping[str, Any], compute: Callable[[], Tensor]) -> Tensor:
    """Read features from a file in `folder`, or compute them and save them there.

    A damaged file is replaced; a file that cannot be written is skipped. Both are logged.

    Args:
        folder: folder of the cache; None computes without one.
        key: everything that the features depend on.
        compute: computes the features.

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
        log.warning("the features cannot be kept: %s", error)
    return features
