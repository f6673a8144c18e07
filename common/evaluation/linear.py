"""Linear probing: a linear classifier on frozen features."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hvp.common.data import BadImage, ImageSource
from hvp.common.errors import UserError
from hvp.common.evaluation.features import (
    Precision,
    Progress,
    cached,
    extract,
    frozen,
    silent,
    source_digest,
    unusable,
    weights_digest,
)
from hvp.common.evaluation.metrics import percent, rank_of_target
from hvp.common.evaluation.results import Result, describe_source, labelled, versions
from hvp.common.training.optimizers import LARS
from hvp.common.views import MultiViewLoader, ViewSlot, ViewTransform, epoch_order, normalize

# N training images, M validation images, B images of a step, D features, C classes

log = logging.getLogger(__name__)

STAGE = "linear classifier"

OptimizerName = Literal["sgd", "lars"]


class LinearProtocol(TypedDict, total=False):
    """How a method's paper trains the classifier, and on which features; what is left out is as in LinearOptions, whose
    fields these are, and as `probe_defaults()` has it."""

    epochs: int
    optimizer: OptimizerName
    base_lr: float
    batch_size: int
    n_last_blocks: int
    avgpool: bool


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """How the linear classifier is trained, and on which features. The defaults are DINO's ("upstream").

    Raises:
        UserError: a value out of range.
    """

    epochs: int = 100
    """Passes over the training images. Upstream: 100."""

    optimizer: OptimizerName = "sgd"
    """Both with momentum 0.9 and without weight decay; LARS scales the bias, too. Upstream: SGD."""

    base_lr: float = 0.00075
    """Learning rate per 256 images; the run uses base_lr * batch_size / 256. HVP paper: 0.00075; upstream: 0.001."""

    batch_size: int = 1024
    """Images per step. Upstream: 128 on each of 8 GPUs."""

    n_last_blocks: int = 4
    """Blocks whose [CLS] tokens are concatenated. Upstream: 4 for ViT-S, 1 for ViT-B; a ResNet takes 1."""

    avgpool: bool = False
    """Adds the last block's mean patch token. Upstream: on for ViT-B."""

    augment: bool = False
    """Draws a random crop and flip of every image in every epoch, as upstream, and runs the encoder each time. Off,
    features of the centre crop are computed once and kept."""

    resolution: int = 224
    """Side of the images the encoder sees, in pixels. Upstream: 224."""

    precision: Precision = "fp32"
    """Of the encoder; the classifier is trained in float32."""

    workers: int = 0
    """Processes that read images."""

    seed: int = 0
    """Of the classifier's weights, the order of the images and the crops."""

    val_every: int = 1
    """Epochs between two validations; the last epoch always has one. Upstream: 1."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "n_last_blocks", "resolution", "val_every"):
            if getattr(self, name) < 1:
                raise UserError(f"linear probing: {name} = {getattr(self, name)}, but it must be at least 1.")
        if not (self.base_lr > 0 and math.isfinite(self.base_lr)):
            raise UserError(f"linear probing: base_lr = {self.base_lr}, but it must be above 0.")


def probe_defaults(encoder: nn.Module) -> tuple[int, bool]:
    """(n_last_blocks, avgpool) as DINO probes such a network: four [CLS] tokens of a ViT-S and smaller, the [CLS] and
    mean patch token of the last block of a ViT-B, and the pooled feature of a ResNet.

    Source: facebookresearch/dino eval_linear.py and README.
    """
    num_blocks, embed_dim = cast(int, encoder.num_blocks), cast(int, encoder.embed_dim)
    if num_blocks == 0:
        return 1, False
    return (1, True) if embed_dim >= 768 else (min(4, num_blocks), False)


@dataclass(frozen=True)
class Epoch:
    """One epoch that ended with a validation."""

    epoch: int
    """Epochs trained, from 1."""
    loss: float
    """Mean training loss of the epoch."""
    top1: float
    """Percent."""
    top5: float | None
    """Percent; None with fewer than five classes."""


def train_linear(
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    val_features: Tensor,
    val_labels: Tensor,
    num_classes: int,
    *,
    lr: float,
    epochs: int,
    seed: int,
    optimizer: OptimizerName = "sgd",
    val_every: int = 1,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> list[Epoch]:
    """Trains a linear classifier: momentum 0.9, no weight decay, a cosine from `lr` to 0 in steps of epochs.

    Weights start from N(0, 0.01), drawn from `seed` alone; the bias starts at 0.

    Args:
        batches: the training batches of an epoch (from 0): features [B, D] float32 and labels [B] int64.
        val_features: [M, D] float32.
        val_labels: [M] int64.
        num_classes: C.
        lr: of the first epoch.
        epochs: how many.
        seed: of the initial weights.
        optimizer: LARS scales weights and bias, by 0.001 of their own length.
        val_every: epochs between two validations; the first and the last epoch have one.
        device: where the classifier is trained.
        progress: called at the beginning and after each epoch.

    Returns:
        Every epoch with a validation, the last epoch last.

    Raises:
        UserError: the loss is not finite.

    Source: facebookresearch/dino eval_linear.py, eval_linear and train; facebookresearch/simsiam main_lincls.py.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(num_classes, val_features.shape[1]).normal_(0.0, 0.01, generator=generator).to(device)
    bias = torch.zeros(num_classes, device=device)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    stepper: torch.optim.Optimizer
    if optimizer == "lars":
        stepper = LARS(parameters, momentum=0.9, eta=0.001, exempt_vectors=False)
    else:
        stepper = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    history = []
    progress(STAGE, 0, epochs)
    for epoch in range(epochs):
        stepper.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        total, images = torch.zeros((), dtype=torch.float64, device=device), 0
        for features, labels in batches(epoch):
            loss = cross_entropy(torch.addmm(bias, features, weight.T), labels)
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            total += loss.detach() * len(labels)
            images += len(labels)
        mean = total.item() / images
        if not math.isfinite(mean):
            raise UserError(f"linear probing, epoch {epoch + 1}: the loss is {mean}. Lower base_lr.")
        if epoch % val_every == 0 or epoch == epochs - 1:
            history.append(Epoch(epoch + 1, mean, *_validate(weight.detach(), bias.detach(), val_features, val_labels)))
            log.info("linear probing, epoch %d: loss %.4f, top-1 %.2f", epoch + 1, mean, history[-1].top1)
        progress(STAGE, epoch + 1, epochs)
    return history


def _validate(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> tuple[float, float | None]:
    ranks = [
        rank_of_target(torch.addmm(bias, x.to(weight.device), weight.T), y.to(weight.device)).cpu()
        for x, y in zip(features.split(8192), labels.split(8192), strict=True)
    ]
    return percent(torch.cat(ranks), len(bias))


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
    """Linear probing of a frozen encoder: a classifier trained on `train`, tested on `val`.

    Same seed, same result; the global random state is not touched. A batch larger than the training set is cut down
    to it, and lr with it. What does not fill a batch is a smaller batch without `augment`, and left out with it.

    Args:
        encoder: has `probe_features(x, n_last_blocks, avgpool) -> [B, D]`; moved to `device`.
        train: labelled images to train on.
        val: labelled images with the same classes.
        options: everything else.
        device: where the encoder and the classifier run.
        checkpoint: where the encoder came from (`BackboneMeta.summary()`), copied into the result.
        cache_folder: keeps features of centre crops for the next time; None keeps nothing.
        progress: called with a stage's name, what is done and what there is to do.

    Returns:
        The result with every setting, ready for `write_result`. `last` is the accuracy after the last epoch; `best` is
        the best of all epochs, selected on the validation images themselves, as upstream prints it.

    Raises:
        UserError: a source without labels, sources with different classes, an image that cannot be read, blocks that
            the encoder does not have, a loss or features that are not finite.
    """
    classes, train_labels, val_labels = labelled(train, val)
    batch_size = min(options.batch_size, len(train))
    lr = options.base_lr * batch_size / 256
    notes = []
    if batch_size < options.batch_size:
        notes.append(
            f"batch_size = {options.batch_size} is more than the {len(train)} training images: {batch_size} is used"
        )

    probe_features = cast(Callable[[Tensor, int, bool], Tensor], encoder.probe_features)

    def probe(images: Tensor) -> Tensor:
        return probe_features(images, options.n_last_blocks, options.avgpool)

    def features_of(source: ImageSource) -> Tensor:
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
                features=probe,
                progress=progress,
            ),
        )

    started = time.perf_counter()
    val_features = features_of(val)
    if options.augment:
        batches = _augmented(encoder, probe, train, train_labels, batch_size, options, device)
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


def _shuffled(
    features: Tensor, labels: Tensor, batch_size: int, seed: int, device: torch.device | str
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    """Batches of features [N, D] that were computed once, in another order every epoch."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(epoch_order(len(features), seed, epoch))
        for chosen in order.split(batch_size):
            yield features[chosen].to(device), labels[chosen].to(device)

    return batches


def _augmented(
    encoder: nn.Module,
    probe: Callable[[Tensor], Tensor],
    source: ImageSource,
    labels: Tensor,
    batch_size: int,
    options: LinearOptions,
    device: torch.device | str,
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
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

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            for (batch,) in loader.epoch(epoch):
                pixels = batch.pixels[0][0].to(device, non_blocking=True)  # [B, H, W, 3]
                with frozen(encoder, device, options.precision):
                    features = probe(normalize(pixels)).float()
                yield features, labels[batch.index].to(device)
        except BadImage as error:
            raise unusable(error) from error

    return batches
