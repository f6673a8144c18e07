"""Rescue: the images whose two views the network finds most alike get a strongly augmented view to learn from.

A pair of views that is already alike teaches nothing. Rescue (*Rescuing Easy Samples in Self-Supervised Pretraining*,
Wang, Krajsek, Scharr; VISAPP 2025) takes the k most alike pairs of a batch, makes a strongly augmented view of each of
those images, and adds to the objective that it should look like the image's common view.

Dimensions:
    B images, D width of the feature, k images that are rescued
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

Direction = Literal["pull", "push"]


@dataclass(frozen=True)
class Rescued:
    """What `rescue()` adds to the objective, and whom it helped."""

    loss: Tensor
    """Scalar float32, to be weighted and added."""

    index: Tensor
    """[k] int64, the images that got a strong view, the easiest first."""

    similarity: Tensor
    """[k] float32, cosine of their two common views, descending; without gradient."""

    strong_similarity: Tensor
    """[k] float32, cosine of their first common view and the strong one; without gradient."""


def rescue(
    z_a: Tensor,
    z_b: Tensor,
    strong: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], Tensor],
    k: int,
    *,
    stop_gradient: bool = False,
    direction: Direction = "pull",
) -> Rescued:
    """The Rescue loss of a batch.

    Gradient flows through the strong views and, unless `stop_gradient`, through the common ones; which images are
    chosen has none.

    Args:
        z_a, z_b: features of the two views of every image, [B, D], any float dtype; cosines are computed in float32.
        strong: index [k] int64, on z_a's device, to strongly augmented views of these images, as `encode` takes them.
        encode: such views to their features [k, D], as z_a was made.
        k: how many images, 1 to B.
        stop_gradient: take the common views' features as given.
        direction: `pull` makes the strong view alike to the common one (section 3 of the paper: the loss is the
            negative cosine similarity); `push` is Equation 1 as printed, the mean of the cosines.

    Returns:
        The loss, mean over the k images of -cos(z_a, z_strong), in [-1, 1] ([with `push` of +cos]), and what it is of.

    Raises:
        ValueError: shapes that do not fit, or k out of its range; the message shows them.

    Source: Rescue, Algorithm 1 and Equation 1.
    """
    index, similarity = easiest(z_a, z_b, k)
    z_a = z_a[index].detach() if stop_gradient else z_a[index]
    z_strong = encode(strong(index))
    if z_strong.shape != z_a.shape:
        raise ValueError(f"rescue: encode made {list(z_strong.shape)} of {k} views, but z_a is [B, {z_a.shape[1]}]")
    towards = cosines(z_a, z_strong)
    loss = towards.mean() if direction == "push" else -towards.mean()
    return Rescued(loss, index, similarity, towards.detach())


@torch.no_grad()
def easiest(z_a: Tensor, z_b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The images whose two views are most alike.

    Args:
        z_a, z_b: [B, D], any float dtype.
        k: how many, 1 to B.

    Returns:
        index [k] int64 and cosine similarity [k] float32, descending. Of equal ones the first of the batch comes first.
        An image whose similarity is not finite is taken after all others.

    Raises:
        ValueError: shapes that do not fit, or k out of its range; the message shows them.
    """
    if z_a.dim() != 2 or z_a.shape != z_b.shape:
        raise ValueError(f"rescue: z_a is {list(z_a.shape)} and z_b {list(z_b.shape)}, expected [B, D] twice")
    if not 1 <= k <= len(z_a):
        raise ValueError(f"rescue: k = {k} of {len(z_a)} images")
    similarity = cosines(z_a, z_b)
    rank = torch.where(similarity.isfinite(), similarity, -torch.inf)
    index = rank.argsort(descending=True, stable=True)[:k]  # topk() leaves open which of equal ones it takes
    return index, similarity[index]


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of every row of x [n, D] with that of y, [n] float32, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return cosine_similarity(x.float(), y.float(), dim=-1)
