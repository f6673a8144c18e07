"""Weighted k-NN classification of images by frozen features, without training."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from hvp.common.data import ImageSource
from hvp.common.errors import UserError
from hvp.common.evaluation.features import Precision, Progress, extract, silent
from hvp.common.evaluation.metrics import percent, rank_of_target
from hvp.common.evaluation.results import Result, describe_source, labelled, versions

# N training images, M test images, D features, K the largest number of neighbours, C classes

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07


@dataclass(frozen=True)
class KnnScore:
    """Accuracy with one number of neighbours."""

    top1: float
    """Percent."""
    top5: float | None
    """Percent; None with fewer than five classes, where it is meaningless."""
    neighbours: int
    """Neighbours that voted: k, or the whole training set if that is smaller."""


def nearest_neighbours(
    train: Tensor,
    test: Tensor,
    k: int,
    *,
    device: torch.device | str = "cpu",
    chunk_test: int = 500,
    chunk_train: int = 20_000,
    progress: Progress = silent,
) -> tuple[Tensor, Tensor]:
    """Find the k training images most similar to each test image, best first.

    Equal similarities are ordered by training index, so the result does not depend on the chunk sizes. Each chunk of
    the training set moves to the device once and is compared with all test images there. Whatever the size of the
    training set, the device holds one chunk, the test features, the neighbours so far and one block of similarities.

    Args:
        train: features, [N, D], any float dtype; normalised to length 1 and compared in float32.
        test: features, [M, D].
        k: neighbours of each test image, 1 to N.
        device: device on which similarities are computed.
        chunk_test: test images in a block of similarities.
        chunk_train: training images in a block of similarities.
        progress: called after each chunk of training images.

    Returns:
        similarities: cosines, [M, k] float32 on the CPU.
        indices: rows of `train`, [M, k] int64 on the CPU.

    Raises:
        ValueError: train and test differ in D, or k is not between 1 and N.
    """
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1]:
        raise ValueError(f"nearest_neighbours: train is {list(train.shape)} but test is {list(test.shape)}")
    if not 1 <= k <= len(train):
        raise ValueError(f"nearest_neighbours: k is {k} but train has {len(train)} rows")
    test = normalize(test.to(device, torch.float32), dim=1)
    similarities = torch.full((len(test), k), -torch.inf, device=device)
    indices = torch.zeros((len(test), k), dtype=torch.int64, device=device)
    for start in range(0, len(train), chunk_train):
        bank = normalize(train[start : start + chunk_train].to(device, torch.float32), dim=1)
        for first in range(0, len(test), chunk_test):
            rows = slice(first, first + chunk_test)
            nearest, index = _largest(test[rows] @ bank.T, min(k, len(bank)))  # both [chunk_test, <= k]
            # Earlier neighbours have lower training indices and come first; the stable sort keeps them first.
            merged, order = torch.cat([similarities[rows], nearest], dim=1).sort(dim=1, descending=True, stable=True)
            similarities[rows] = merged[:, :k]
            indices[rows] = torch.cat([indices[rows], index + start], dim=1).gather(1, order[:, :k])
        progress("nearest neighbours", start + len(bank), len(train))
    return similarities.cpu(), indices.cpu()


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row, in column order; of equal values the first, unlike `topk`, which takes any."""
    top, index = values.topk(k, dim=1)
    tied = (values >= top[:, -1:]).sum(dim=1) > k
    if tied.any():
        index[tied] = values[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    index = index.sort(dim=1).values
    return values.gather(1, index), index


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    *,
    num_classes: int,
    device: torch.device | str = "cpu",
    chunk_test: int = 500,
    chunk_train: int = 20_000,
    progress: Progress = silent,
) -> dict[int, KnnScore]:
    """Weighted k-NN accuracy for several k from one search.

    Each of the k nearest training images votes for its class with weight exp(similarity / temperature); classes with
    equal votes are ranked by index. A k above N uses all N neighbours.

    There are two differences from the upstream function, neither of which changes top-1. A class without votes never
    counts as a top-5 hit; upstream fills the five with voteless classes in the order of an unstable sort, which raises
    its top-5 when the neighbours have fewer than five classes. And the number of test images is arbitrary, while
    upstream needs 100. For k < 5 both count the first k classes only.

    Args:
        train_features: [N, D], any float dtype; normalised here.
        train_labels: [N] int64, in [0, num_classes).
        test_features: [M, D], M >= 1.
        test_labels: [M] int64, in [0, num_classes).
        ks: numbers of neighbours, each at least 1.
        temperature: temperature of the votes, above 0.
        num_classes: C.
        device, chunk_test, chunk_train, progress: as for `nearest_neighbours()`; votes are counted on the CPU.

    Returns:
        The score for each requested k.

    Raises:
        ValueError: shapes do not fit each other, labels are out of range, there is no test image, or k or the
            temperature is too small.

    Source: eval_knn.py, knn_classifier.
    """
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if len(features) == 0 or labels.shape != (len(features),):
            raise ValueError(f"knn_classify: {name} features are {list(features.shape)}, labels {list(labels.shape)}")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"knn_classify: {name} labels are not in [0, {num_classes})")
    if not ks or min(ks) < 1 or temperature <= 0:
        raise ValueError(f"knn_classify: ks are {list(ks)}, temperature {temperature}")
    train_labels, test_labels = train_labels.cpu(), test_labels.cpu()
    similarities, indices = nearest_neighbours(
        train_features,
        test_features,
        min(max(ks), len(train_features)),
        device=device,
        chunk_test=chunk_test,
        chunk_train=chunk_train,
        progress=progress,
    )
    ranks: dict[int, list[Tensor]] = {k: [] for k in ks}
    for similarity, index, target in zip(
        similarities.split(chunk_test), indices.split(chunk_test), test_labels.split(chunk_test), strict=True
    ):
        labels = train_labels[index]  # [chunk_test, K]
        # Relative to the nearest neighbour, so a small temperature does not overflow; the ranking is the same.
        votes = ((similarity - similarity[:, :1]).double() / temperature).exp()
        for k in ks:
            tally = torch.zeros(len(target), num_classes, dtype=torch.float64)
            tally.scatter_add_(1, labels[:, :k], votes[:, :k])
            voted_for = (labels[:, :k] == target[:, None]).any(dim=1)
            ranks[k].append(torch.where(voted_for, rank_of_target(tally, target), num_classes))
    return {
        k: KnnScore(*percent(torch.cat(parts), num_classes), neighbours=min(k, len(train_features)))
        for k, parts in ranks.items()
    }


def evaluate_knn(
    encoder: nn.Module,
    train: ImageSource,
    val: ImageSource,
    *,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    resolution: int = 224,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    batch_size: int = 256,
    workers: int = 0,
    checkpoint: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Result:
    """Evaluate an encoder by weighted k-NN: the images of `train` vote on the classes of `val`.

    Args:
        encoder: maps [B, 3, resolution, resolution] normalised images to [B, D] features; moved to `device`.
        train: labelled images that vote.
        val: labelled images with the same classes.
        ks: numbers of neighbours.
        temperature: temperature of the votes.
        device: device for the encoder and the similarities.
        resolution, precision, batch_size, workers: as for `extract()`.
        checkpoint: origin of the encoder (`BackboneMeta.summary()`), copied into the result.
        progress: called after each batch of images and each chunk of neighbours.

    Returns:
        The result with every setting, ready for `write_result()`.

    Raises:
        UserError: a source has no labels, the sources have different classes, an image cannot be read, features are
            not finite, or k or the temperature is too small.
    """
    if not ks or min(ks) < 1:
        raise UserError(f"k-NN: k = {', '.join(map(str, ks)) or 'nothing'}, but each must be at least 1.")
    if temperature <= 0:
        raise UserError(f"k-NN: temperature = {temperature}, but it must be above 0; the usual value is {TEMPERATURE}.")
    classes, train_labels, val_labels = labelled(train, val)
    notes = [f"k = {k} is more than the {len(train)} training images: all of them voted" for k in ks if k > len(train)]

    started = time.perf_counter()
    train_features, val_features = (
        extract(
            encoder,
            source,
            resolution=resolution,
            device=device,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            progress=progress,
        )
        for source in (train, val)
    )
    extracted = time.perf_counter()
    scores = knn_classify(
        train_features,
        train_labels,
        val_features,
        val_labels,
        ks,
        temperature,
        num_classes=len(classes),
        device=device,
        progress=progress,
    )
    return {
        "evaluation": "knn",
        "checkpoint": checkpoint,
        "train": describe_source(train),
        "val": describe_source(val),
        "settings": {
            "k": list(ks),
            "temperature": temperature,
            "resolution": resolution,
            "precision": precision,
            "batch_size": batch_size,
            "device": str(device),
        },
        "results": [{"k": k, **asdict(score)} for k, score in scores.items()],
        "notes": notes,
        "versions": versions(),
        "seconds": {"features": extracted - started, "classification": time.perf_counter() - extracted},
    }
