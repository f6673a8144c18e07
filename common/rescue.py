"""Rescue: the images whose two views the network finds most alike get a strongly augmented view to learn from.

A pair of views that is already alike teaches nothing. Rescue (*Rescuing Easy Samples in Self-Supervised Pretraining*,
Wang, Krajsek, Scharr; VISAPP 2025) takes the k most alike pairs of a batch, makes a strongly augmented view of each of
those images, and adds to the objective that it should look like the image's common view.

With several processes the k easiest images are those of all of them. Their strong views are shared out evenly, whoever
the images belong to: every process encodes ceil(k / W), of which those beyond k weigh nothing, though
batch norm sees them.

Dimensions:
    B images of a process, W processes, D width of the feature, k images that are rescued
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hvp.common.training.collectives import gathered, summed
from hvp.common.training.distributed import World

Direction = Literal["pull", "push"]


@dataclass(frozen=True)
class Rescued:
    """What `rescue()` adds to the objective, and whom it helped."""

    loss: Tensor
    """Scalar float32, to be weighted and added. The mean over the processes is the loss of all k images."""

    index: Tensor
    """[k] int64, the images that got a strong view, the easiest first: rows of all processes' images, rank by rank."""

    similarity: Tensor
    """[k] float32, cosine of their two common views, descending; without gradient."""

    strong_similarity: Tensor
    """Float32, cosine of the first common view and the strong one, of the images whose strong views this process has
    encoded, every W-th of the k; without gradient."""


def rescue(
    z_a: Tensor,
    z_b: Tensor,
    strong: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], Tensor],
    k: int,
    *,
    stop_gradient: bool = False,
    direction: Direction = "pull",
    world: World = World(),
) -> Rescued:
    """The Rescue loss of a batch.

    Gradient flows through the strong views and, unless `stop_gradient`, through the common ones; which images are
    chosen has none.

    Args:
        z_a, z_b: features of the two views of every image of this process, [B, D], any float dtype; cosines are
            computed in float32.
        strong: index [n] int64, on z_a's device, into the images of all processes, rank by rank, to strongly augmented
            views of these images, as `encode` takes them. n is k, or with several processes ceil(k / W).
        encode: such views to their features [n, D], as z_a was made.
        k: how many images of all processes, 1 to W B.
        stop_gradient: take the common views' features as given.
        direction: `pull` makes the strong view alike to the common one (section 3 of the paper: the loss is the
            negative cosine similarity); `push` is Equation 1 as printed, the mean of the cosines.
        world: the processes among whose images to choose. All of them call this together.

    Returns:
        The loss, mean over the k images of -cos(z_a, z_strong), in [-1, 1] ([with `push` of +cos]), and what it is of.

    Raises:
        ValueError: shapes that do not fit, or k out of its range; the message shows them.

    Source: Rescue, Algorithm 1 and Equation 1.
    """
    padded = -(-k // world.size) * world.size  # equal work for all; what is more than k weighs nothing
    index, similarity = easiest(z_a, z_b, k, world, padded)
    z_a = _rows(z_a.detach() if stop_gradient else z_a, index, world)[world.rank :: world.size]
    z_strong = encode(strong(index[world.rank :: world.size]))
    if z_strong.shape != z_a.shape:
        raise ValueError(
            f"rescue: encode made {list(z_strong.shape)} of {len(z_a)} views, but z_a is [B, {z_a.shape[1]}]"
        )
    towards = cosines(z_a, z_strong)[: len(range(world.rank, k, world.size))]
    loss = towards.sum() / k * world.size
    return Rescued(loss if direction == "push" else -loss, index[:k], similarity[:k], towards.detach())


@torch.no_grad()
def easiest(
    z_a: Tensor, z_b: Tensor, k: int, world: World = World(), count: int | None = None
) -> tuple[Tensor, Tensor]:
    """The images whose two views are most alike.

    Args:
        z_a, z_b: [B, D], any float dtype.
        k: how many, 1 to W B.
        world: the processes among whose images to choose.
        count: give so many of them, at least k; None: k.

    Returns:
        index [count] int64, into the images of all processes, rank by rank, and cosine similarity [count] float32,
        descending. Of equal ones the first of the batch comes first. An image whose similarity is not finite is taken
        after all others.

    Raises:
        ValueError: shapes that do not fit, or k out of its range; the message shows them.
    """
    if z_a.dim() != 2 or z_a.shape != z_b.shape:
        raise ValueError(f"rescue: z_a is {list(z_a.shape)} and z_b {list(z_b.shape)}, expected [B, D] twice")
    if not 1 <= k <= len(z_a) * world.size:
        raise ValueError(f"rescue: k = {k} of {len(z_a) * world.size} images")
    similarity = cosines(z_a, z_b)
    if world.size > 1:
        similarity = gathered(similarity)
    rank = torch.where(similarity.isfinite(), similarity, -torch.inf)
    index = rank.argsort(descending=True, stable=True)[: count or k]  # topk() leaves open which of equal ones it takes
    return index, similarity[index]


def _rows(z: Tensor, index: Tensor, world: World) -> Tensor:
    """Rows of all processes' features [B, D], with gradient to the process that each comes from."""
    if world.size == 1:
        return z[index]
    place = index - world.rank * len(z)
    is_own = (place >= 0) & (place < len(z))
    own = z[place.clamp(0, len(z) - 1)]
    return summed(torch.where(is_own[:, None], own, torch.zeros_like(own)))


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of every row of x [n, D] with that of y, [n] float32, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return cosine_similarity(x.float(), y.float(), dim=-1)
