"""Similarity of an image's views to an encoder: of two common ones, and of a common and a strong one of Rescue.

# N images, B of them in a forward pass, D features
"""

from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hvp.common.config.sections import RunConfig
from hvp.common.data import ImageSource
from hvp.common.errors import UserError
from hvp.common.evaluation.features import Precision, Progress, frozen, silent
from hvp.common.evaluation.results import Result, describe_source, versions
from hvp.common.rescue import cosines
from hvp.common.training.rescuing import strong_transform
from hvp.common.views import MultiViewLoader, ViewSlot, normalize
from hvp.common.views.strong import StrongViews


def measure_diversity(
    encoder: nn.Module,
    source: ImageSource,
    config: RunConfig,
    *,
    images: int = 2048,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    workers: int = 0,
    threads: int = 1,
    progress: Progress = silent,
) -> Result:
    """Measure the mean cosine similarity of two common views of an image, and of a common and a strong one.

    The strong view should be less similar than the common one. If it hardly is, Rescue's augmentation is too weak for
    this encoder and data; if its cosine is near 0, the image can no longer be recognised.

    Args:
        encoder: the network; left unchanged.
        source: the images.
        config: the run's configuration: how to make common views (its first two) and strong ones.
        images: number of images, drawn at random from the source; all of them if it has fewer.
        batch_size: images per forward pass.
        seed: seed of the image order and the views.
        device: device of the encoder.
        precision: precision of its forward pass.
        workers: processes that make common views.
        threads: threads that make strong views.
        progress: called after each batch.

    Returns:
        Mean and standard deviation of both cosines over the images, the share of images whose strong view is less
        similar than the common one, and the settings.

    Raises:
        UserError: there are no images, one does not decode, or features are not finite.

    Source: Rescue reports 0.7069 for common and 0.6690 for strong views.
    """
    total = min(images, len(source))
    if total == 0:
        raise UserError(f"{source.name}: there are no images")
    batch_size = min(batch_size, total)
    steps = total // batch_size
    slots = _first_two(config)
    strong = StrongViews(source, strong_transform(config), seed=seed, threads=threads)
    loader = MultiViewLoader(
        source, slots, batch_size=batch_size, seed=seed, workers=workers, pipeline=config.data.loader
    )
    common_cosines: list[Tensor] = []
    strong_cosines: list[Tensor] = []
    with closing(strong), closing(loader), frozen(encoder, device, precision):
        batches = loader.epoch(0)
        for done in range(1, steps + 1):
            (batch,) = next(batches)
            first, second = batch.pixels[0]
            three = torch.cat((first, second, strong([(0, index) for index in batch.index.tolist()])))
            features = encoder(normalize(three.to(device)))  # [3 B, D]
            if not features.isfinite().all():
                raise UserError("the encoder's features are not finite. The weights may come from a diverged run")
            a, b, c = features.chunk(3)
            common_cosines.append(cosines(a, b).cpu())
            strong_cosines.append(cosines(a, c).cpu())
            progress(f"views of {source.name}", done * batch_size, steps * batch_size)
    common, against = torch.cat(common_cosines), torch.cat(strong_cosines)
    return {
        "evaluation": "diversity",
        "train": describe_source(source),
        "common": _moments(common),
        "strong": _moments(against),
        "harder": (against < common).float().mean().item(),
        "images": len(common),
        "views": [slot.name for slot in slots],
        "num_ops": config.rescue.num_ops,
        "cutout": config.rescue.cutout,
        "settings": {
            "images": images,
            "batch_size": batch_size,
            "seed": seed,
            "precision": precision,
            "views": config.model_dump(mode="json")["views"],
            "rescue": {"num_ops": config.rescue.num_ops, "cutout": config.rescue.cutout},
            "device": str(device),
        },
        "versions": versions(),
    }


def _first_two(config: RunConfig) -> tuple[ViewSlot, ...]:
    """Return the slot, or the two slots, of the first two views that a run trains on."""
    slots: list[ViewSlot] = []
    for slot in config.view_slots():
        count = min(slot.kept, 2 - sum(taken.kept for taken in slots))
        if count:
            slots.append(replace(slot, candidates=count, kept=count))
    return tuple(slots)


def _moments(values: Tensor) -> dict[str, Any]:
    return {"mean": values.mean().item(), "std": values.std(correction=0).item()}
