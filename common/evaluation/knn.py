"""Weighted k-NN: how well an image's nearest training images tell its class, without training anything."""

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
    """Percent; None with fewer than five classes, where it says nothing about the features."""
    neighbours: int
    """How many neighbours voted: k, or the whole training set where that is smaller."""


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
    """The k training images most similar to each test image, best first.

    Equal similarities are ordered by training index, so the chunk sizes do not decide who is a neighbour. A chunk of
    the training set moves to the device once and meets all test images there; the device holds one chunk, the test
    features, the neighbours found so far and one block of similarities, however large the training set is.

    Args:
        train: features, [N, D], any float dtype; normalised to length 1 and compared in float32.
        test: features, [M, D].
        k: neighbours of each test image, 1 to N.
        device: where similarities are computed.
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
            # What was found before has the lower training indices and stands first: the stable sort keeps it first.
            merged, order = torch.cat([similarities[rows], nearest], dim=1).sort(dim=1, descending=True, stable=True)
            similarities[rows] = merged[:, :k]
            indices[rows] = torch.cat([indices[rows], index + start], dim=1).gather(1, order[:, :k])
        progress("nearest neighbours", start + len(bank), len(train))
    return similarities.cpu(), indices.cpu()


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row, in column order; of equal values the first. `topk` takes any of them."""
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
    equal votes are ranked by index. A k above N takes all N neighbours.

    Two differences from the upstream function, neither of which moves top-1: a class that got no vote never counts as
    a top-5 hit (upstream fills the five with voteless classes in the order of an unstable sort, which raises its
    top-5 when fewer than five classes are among the neighbours), and any number of test images will do (upstream
    needs 100). For k < 5 both count the first k classes only.

    Args:
        train_features: [N, D], any float dtype; normalised here.
        train_labels: [N] int64, in [0, num_classes).
        test_features: [M, D], M >= 1.
        test_labels: [M] int64, in [0, num_classes).
        ks: numbers of neighbours, each at least 1.
        temperature: of the votes, above 0.
        num_classes: C.
        device: where similarities are computed; the votes are counted on the CPU.
        chunk_test: test images in a block of similarities.
        chunk_train: training images in a block of similarities.
        progress: called after each chunk of training images.

    Returns:
        The score of each k in `ks`, under the k asked for.

    Raises:
        ValueError: shapes that do not belong together, labels out of range, no test image, k or temperature too small.

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
        # Relative to the nearest neighbour: the ranking is the same, and no temperature overflows.
        votes = ((similarity - similarity[:, :1]).double() / temperature).exp()
        for k in ks:
            tally = torch.zeros(len(target), num_classes, dtype=torch.float64)
            tally.scatter_add_(1, labels[:, :k], votes[:, :k])
            voted_for = (labels[:, :k] == target[:, None]).any(dim=1)
            ranks[k].append(torch.where(voted_for, rank_of_target(tally, target), num_classes))
    return {
        k: KnnScore(*percent(torch.cat(of_k), num_classes), neighbours=min(k, len(train_features)))
        for k, of_k in ranks.items()
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
    """Weighted k-NN of an encoder's features: `train` votes on the classes of `val`.

    Args:
        encoder: maps [B, 3, resolution, resolution] normalised images to [B, D] features; moved to `device`.
        train: labelled images that vote.
        val: labelled images with the same classes.
        ks: numbers of neighbours.
        temperature: of the votes.
        resolution: side of the centre crop, in pixels.
        device: where the encoder runs and similarities are computed.
        precision: of the encoder's forward pass.
        batch_size: images per forward pass; does not change the result.
        workers: processes that read images.
        checkpoint: where the encoder came from (`BackboneMeta.summary()`), copied into the result.
        progress: called with a stage's name, what is done and what there is to do.

    Returns:
        The result with every setting, ready for `write_result`.

    Raises:
        UserError: a source without labels, sources with different classes, an image that cannot be read, features
            that are not finite, a k or temperature that makes no sense.
    """
    if not ks or min(ks) < 1:
        raise UserError(f"k-NN: k = {', '.join(map(str, ks)) or 'nothing'}, but each must be at least 1.")
    if temperature <= 0:
        raise UserError(f"k-NN: temperature = {temperature}, but it must be above 0; {TEMPERATURE} is usual.")
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
