"""Linear probing of a frozen encoder."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn

from hvp.common.data import ImageSource
from hvp.common.errors import UserError
from hvp.common.evaluation.features import (
    Precision,
    Progress,
    bad_images_refused,
    cached,
    extract,
    frozen,
    silent,
    source_digest,
    weights_digest,
)
from hvp.common.evaluation.linear_classifier import Batches, OptimizerName, train_linear
from hvp.common.evaluation.results import Result, describe_source, labelled, versions
from hvp.common.views import MultiViewLoader, ViewSlot, ViewTransform, epoch_order, normalize

# N training images, M validation images, B images of a step, D features, C classes


class LinearProtocol(TypedDict, total=False):
    """Linear probing protocol of a method's paper: some fields of LinearOptions.

    Missing fields take the defaults of LinearOptions and `probe_defaults()`.
    """

    epochs: int
    optimizer: OptimizerName
    base_lr: float
    batch_size: int
    n_last_blocks: int
    avgpool: bool


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """Training of the linear classifier, and the features it reads. "Upstream" is DINO.

    Raises:
        UserError: a value is out of range.
    """

    epochs: int = 100
    """Passes over the training images. Upstream: 100."""

    optimizer: OptimizerName = "sgd"
    """Both use momentum 0.9 and no weight decay; LARS also scales the bias. Upstream: SGD."""

    base_lr: float = 0.00075
    """Learning rate per 256 images; the run uses base_lr * batch_size / 256. HVP paper: 0.00075; upstream: 0.001."""

    batch_size: int = 1024
    """Images per step. Upstream: 128 on each of 8 GPUs."""

    n_last_blocks: int = 4
    """Blocks whose [CLS] tokens are concatenated. Upstream: 4 for ViT-S, 1 for ViT-B; a ResNet takes 1."""

    avgpool: bool = False
    """Add the last block's mean patch token. Upstream: on for ViT-B."""

    augment: bool = False
    """Run the encoder on a new random crop and flip of every image in every epoch, like upstream. Without it, features
    of the centre crop are computed once."""

    resolution: int = 224
    """Side of the images the encoder sees, in pixels. Upstream: 224."""

    precision: Precision = "fp32"
    """Precision of the encoder; the classifier is trained in float32."""

    workers: int = 0
    """Processes that read images."""

    seed: int = 0
    """Random seed for the classifier's weights, the order of the images and the crops."""

    val_every: int = 1
    """Epochs between two validations; the last epoch is always validated. Upstream: 1."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "n_last_blocks", "resolution", "val_every"):
            if getattr(self, name) < 1:
                raise UserError(f"linear probing: {name} = {getattr(self, name)}, but it must be at least 1.")
        if not (self.base_lr > 0 and math.isfinite(self.base_lr)):
            raise UserError(f"linear probing: base_lr = {self.base_lr}, but it must be above 0.")


def probe_defaults(encoder: nn.Module) -> tuple[int, bool]:
    """Return DINO's (n_last_blocks, avgpool) for an encoder.

    That is four [CLS] tokens for a ViT-S or smaller, the last block's [CLS] and mean patch token for a ViT-B, and the
    pooled feature for a ResNet.

    Source: facebookresearch/dino eval_linear.py and README.
    """
    num_blocks, embed_dim = cast(int, encoder.num_blocks), cast(int, encoder.embed_dim)
    if num_blocks == 0:
        return 1, False
    return (1, True) if embed_dim >= 768 else (min(4, num_blocks), False)


def evaluate_linear(
    encoder: nn.Module,
    train: ImageSource,
    val: ImageSource,
    options: LinearOptions = LinearOptions(),
    *,
    device: torch.device | str = "cpu",
    checkpoint: Mapping[str, Any] | None = None,
    cache_folder: Path | None = None,
    progress: Progress = silent,
) -> Result:
    """Evaluate a frozen encoder by linear probing: train a classifier on `train`, test it on `val`.

    The same seed gives the same result; the global random state is not used. A batch larger than the training set is
    reduced to it, and lr with it. The last images of an epoch that do not fill a batch form a smaller one, or are left
    out with `augment`.

    Args:
        encoder: has `probe_features(x, n_last_blocks, avgpool) -> [B, D]`; moved to `device`.
        train: labelled images to train on.
        val: labelled images with the same classes.
        options: all other settings.
        device: device of the encoder and the classifier.
        checkpoint: origin of the encoder (`BackboneMeta.summary()`), copied into the result.
        cache_folder: folder that keeps features of centre crops for the next evaluation; None keeps none.
        progress: called after each batch of images and each epoch.

    Returns:
        The result with every setting, ready for `write_result()`. `last` is the accuracy after the last epoch. `best`
        is the best epoch, selected on the validation images themselves, as upstream prints it.

    Raises:
        UserError: a source has no labels, the sources have different classes, an image cannot be read, the encoder
            lacks the requested blocks, or a loss or features are not finite.
    """
    classes, train_labels, val_labels = labelled(train, val)
    batch_size = min(options.batch_size, len(train))
    lr = options.base_lr * batch_size / 256
    notes = []
    if batch_size < options.batch_size:
        notes.append(
            f"batch_size = {options.batch_size} is more than the {len(train)} training images: {batch_size} is used"
        )

    def features_of(source: ImageSource) -> Tensor:
        return _centre_crop_features(encoder, source, options, device, cache_folder, progress)

    started = time.perf_counter()
    val_features = features_of(val)
    if options.augment:
        batches = _augmented(encoder, train, train_labels, batch_size, options, device)
    else:
        batches = _shuffled(features_of(train), train_labels, batch_size, options.seed, device)
    extracted = time.perf_counter()
    history = train_linear(
        batches,
        val_features,
        val_labels,
        len(classes),
        lr=lr,
        epochs=options.epochs,
        seed=options.seed,
        optimizer=options.optimizer,
        val_every=options.val_every,
        device=device,
        progress=progress,
    )
    best = max(history, key=lambda entry: entry.top1)  # the first of equals
    return {
        "evaluation": "linear",
        "checkpoint": checkpoint,
        "train": describe_source(train),
        "val": describe_source(val),
        "settings": {**asdict(options), "lr": lr, "device": str(device)},
        "last": asdict(history[-1]),
        "best": {**asdict(best), "selected_on": "val"},
        "history": [asdict(entry) for entry in history],
        "notes": notes,
        "versions": versions(),
        "seconds": {"features": extracted - started, "classifier": time.perf_counter() - extracted},
    }


def _probe(encoder: nn.Module, options: LinearOptions) -> Callable[[Tensor], Tensor]:
    """Map normalised images to the features that the classifier reads."""
    probe_features = cast(Callable[[Tensor, int, bool], Tensor], encoder.probe_features)
    return lambda images: probe_features(images, options.n_last_blocks, options.avgpool)


def _centre_crop_features(
    encoder: nn.Module,
    source: ImageSource,
    options: LinearOptions,
    device: torch.device | str,
    cache_folder: Path | None,
    progress: Progress,
) -> Tensor:
    """Features of every image's centre crop, from the cache if it has them."""
    key: dict[str, Any] = {
        "source": source_digest(source),
        "encoder": type(encoder).__qualname__,
        "weights": weights_digest(encoder),
        "resolution": options.resolution,
        "n_last_blocks": options.n_last_blocks,
        "avgpool": options.avgpool,
        "precision": options.precision,
    }
    return cached(
        cache_folder,
        key,
        lambda: extract(
            encoder,
            source,
            resolution=options.resolution,
            device=device,
            precision=options.precision,
            batch_size=min(options.batch_size, 256),
            workers=options.workers,
            features=_probe(encoder, options),
            progress=progress,
        ),
    )


def _shuffled(
    features: Tensor, labels: Tensor, batch_size: int, seed: int, device: torch.device | str
) -> Callable[[int], Batches]:
    """Batches of precomputed features [N, D], in a new order every epoch."""

    def batches(epoch: int) -> Batches:
        order = torch.from_numpy(epoch_order(len(features), seed, epoch))
        for chosen in order.split(batch_size):
            yield features[chosen].to(device), labels[chosen].to(device)

    return batches


def _augmented(
    encoder: nn.Module,
    source: ImageSource,
    labels: Tensor,
    batch_size: int,
    options: LinearOptions,
    device: torch.device | str,
) -> Callable[[int], Batches]:
    """Batches of features of random crops and flips, drawn anew every epoch.

    Source: eval_linear.py: RandomResizedCrop and RandomHorizontalFlip with torchvision's defaults, bilinear.
    """
    crop = ViewTransform(
        size=options.resolution, scale=(0.08, 1.0), interpolation="bilinear", jitter=0.0, grayscale=0.0, blur=0.0
    )
    loader = MultiViewLoader(
        source,
        [ViewSlot("crop", crop, candidates=1, kept=1)],
        batch_size=batch_size,
        seed=options.seed,
        workers=options.workers,
        pin_memory=torch.device(device).type == "cuda",
    )
    probe = _probe(encoder, options)

    def batches(epoch: int) -> Batches:
        with bad_images_refused():
            for (batch,) in loader.epoch(epoch):
                pixels = batch.pixels[0][0].to(device, non_blocking=True)  # [B, H, W, 3]
                with frozen(encoder, device, options.precision):
                    features = probe(normalize(pixels)).float()
                yield features, labels[batch.index].to(device)

    return batches
