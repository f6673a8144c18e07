"""Rows that compare our scoring with the plain procedure."""

from collections.abc import Callable
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from hvp.benchmarks.timing import Row, interleaved, peak_memory_mb, ratio

CPU = torch.device("cpu")
"""Scoring is timed on one thread of the CPU."""

T = TypeVar("T")


def scoring_row(
    case: str,
    ours: Callable[[], T],
    plain: Callable[[], T],
    rounds: int,
    *,
    target: float | None = None,
    same: Callable[[T, T], bool] = torch.equal,  # type: ignore[assignment]
) -> Row:
    """Time our procedure against the plain one.

    Args:
        case: name of the row.
        ours, plain: the two procedures.
        rounds: measurements of each.
        target: smallest speed-up allowed; None: none is set.
        same: whether two results agree.
    """
    equal = same(ours(), plain())
    memory = peak_memory_mb(ours)
    seconds, reference = interleaved([ours, plain], rounds)
    return Row(
        "scoring", case, ratio(reference, seconds), target, False, memory, median(seconds), median(reference), equal
    )


def memory_rows(case: str, procedure: Callable[[], Tensor], gigabytes: float) -> list[Row]:
    """Return a row with a procedure's peak memory in gigabytes, or no row if the system does not report it.

    Args:
        case: name of the row.
        procedure: the procedure.
        gigabytes: largest peak allowed.
    """
    memory = peak_memory_mb(procedure)
    if memory is None:
        return []
    (seconds,) = interleaved([procedure], 1)
    return [Row("scoring", case, memory / 1e3, gigabytes, True, memory, seconds[0], seconds[0])]


def plain_selection(combinations: Tensor, num_images: int, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Select as the papers describe it: compute the loss of one combination at a time, and keep the largest.

    Args:
        combinations: [C, S] view numbers.
        num_images: B.
        loss_of: maps a combination [S] to its losses [B].

    Returns:
        [B, S], the hardest combination of each image.
    """
    best = torch.full((num_images,), -torch.inf)
    kept = combinations[0].expand(num_images, -1).clone()
    for combination in combinations:
        loss = loss_of(combination)
        harder = loss > best
        best = torch.where(harder, loss, best)
        kept[harder] = combination
    return kept
