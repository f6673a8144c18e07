"""Top-1 and top-5 accuracy with ties decided once, the same way on every device."""

import torch
from torch import Tensor

# B images, C classes


def rank_of_target(scores: Tensor, targets: Tensor) -> Tensor:
    """How many classes are ranked before the right one.

    Equal scores are ranked by class index, the lower one first; a score that is NaN comes last. So top-n accuracy is
    `(rank < n).mean()`, and no sort of all the classes is needed.

    Args:
        scores: one score per class, higher is better, [B, C], any float dtype.
        targets: the right classes, [B] int64, in [0, C).

    Returns:
        [B] int64 in [0, C).

    Raises:
        ValueError: the shapes do not belong together; the message shows both.
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
        ranks: of the right class among all classes, 0 is best, [B] int64.
        num_classes: C.

    Returns:
        top1, and top5 or None with fewer than five classes, where it says nothing.
    """
    top1, top5 = (100 * int((ranks < n).sum()) / len(ranks) for n in (1, 5))
    return top1, top5 if num_classes >= 5 else None
