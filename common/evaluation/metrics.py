"""Top-1 and top-5 accuracy, with ties broken the same way on every device."""

import torch
from torch import Tensor

# B images, C classes


def rank_of_target(scores: Tensor, targets: Tensor) -> Tensor:
    """Rank of the correct class: the number of classes ranked before it.

    Equal scores are ranked by class index, the lower one first; a NaN score ranks last. Top-n accuracy is then
    `(rank < n).mean()`, without sorting the classes.

    Args:
        scores: one score per class, higher is better, [B, C], any float dtype.
        targets: the correct classes, [B] int64, in [0, C).

    Returns:
        [B] int64 in [0, C).

    Raises:
        ValueError: the shapes do not fit each other; the message shows both.
    """
    if scores.ndim != 2 or targets.shape != scores.shape[:1]:
        raise ValueError(f"rank_of_target: scores are {list(scores.shape)} but targets {list(targets.shape)}")
    num_classes = scores.shape[1]
    classes = torch.arange(num_classes, device=scores.device)
    of_target = scores.gather(1, targets[:, None])  # [B, 1]
    behind = (scores < of_target) | ((scores == of_target) & (classes > targets[:, None]))
    return num_classes - 1 - behind.sum(dim=1)


def percent(ranks: Tensor, num_classes: int) -> tuple[float, float | None]:
    """Top-1 and top-5 accuracy in percent.

    Args:
        ranks: rank of the correct class, 0 is best, [B] int64.
        num_classes: C.

    Returns:
        top1 and top5; top5 is None with fewer than five classes, where it is meaningless.
    """
    top1, top5 = (100 * int((ranks < n).sum()) / len(ranks) for n in (1, 5))
    return top1, top5 if num_classes >= 5 else None
