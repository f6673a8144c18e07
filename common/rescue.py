"""Rescue: give the images whose two views are most alike a strongly augmented view to learn from.

A pair of views that is already alike teaches nothing. Rescue (*Rescuing Easy Samples in Self-Supervised Pretraining*,
Wang, Krajsek, Scharr; VISAPP 2025) takes the k most alike pairs of a batch, makes a strongly augmented view of each of
those images, and adds a loss that pulls it towards the image's common view.

With several processes, the k easiest images are chosen among the images of all processes. Their strong views are
shared out evenly, whichever process an image belongs to: every process encodes ceil(k / W). Views beyond k have no
weight in the loss, though batch norm sees them.

Dimensions:
    B images per process, W processes, D width of the feature, k rescued images
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
    """The Rescue loss and the rescued images."""

    loss: Tensor
    """Scalar float32, to be weighted and added. Its mean over the processes is the loss of all k images."""

    index: Tensor
    """[k] int64, the images that got a strong view, easiest first: rows of all processes' images, rank by rank."""

    similarity: Tensor
    """[k] float32, cosine of their two common views, descending; without gradient."""

    strong_similarity: Tensor
    """Float32, cosine of the first common view and the strong one, for the images whose strong views this process
    encoded: every W-th of the k. Without gradient."""


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
    """Compute the Rescue loss of a batch.

    Gradient flows through the strong views and, unless `stop_gradient`, through the common ones. The choice of images
    has no gradient.

    Args:
        z_a, z_b: features of the two views of every image of this process, [B, D], any float dtype; cosines are
            computed in float32.
        strong: returns strongly augmented views of given images, in the form `encode` takes. Called with index [n]
            int64, on z_a's device, into the images of all processes, rank by rank. n is k, or with several processes
            ceil(k / W).
        encode: computes the features [n, D] of such views, in the same way as z_a.
        k: number of images to rescue, over all processes, 1 to W B.
        stop_gradient: detach the common views' features.
        direction: `pull` makes the strong view similar to the common one (section 3 of the paper: the loss is the
            negative cosine similarity); `push` is Equation 1 as printed, the mean of the cosines.
        world: the processes whose images to choose from. All of them call this together.

    Returns:
        The loss: the mean over the k images of -cos(z_a, z_strong) (+cos with `push`), in [-1, 1]; and its images.

    Raises:
        ValueError: the shapes do not fit, or k is out of range; the message shows them.

    Source: Rescue, Algorithm 1 and Equation 1.
    """
    padded = -(-k // world.size) * world.size  # equal work for all; views beyond k have no weight
    index, similarity = easiest(z_a, z_b, k, world, padded)
    z_a = _rows(z_a.detach() if stop_gradient else z_a, index, world)[world.rank :: world.size]
    z_strong = encode(strong(index[world.rank :: world.size]))
    if z_strong.shape != z_a.shape:
        raise ValueError(
            f"rescue: encode made {list(z_strong.shape)} of {len(z_a)} views, but z_a is [B, {z_a.shape[1]}]"
        )
    strong_similarity = cosines(z_a, z_strong)[: len(range(world.rank, k, world.size))]
    loss = strong_similarity.sum() / k * world.size
    return Rescued(loss if direction == "push" else -loss, index[:k], similarity[:k], strong_similarity.detach())


@torch.no_grad()
def easiest(
    z_a: Tensor, z_b: Tensor, k: int, world: World = World(), count: int | None = None
) -> tuple[Tensor, Tensor]:
    """Find the images whose two views are most alike.

    Args:
        z_a, z_b: [B, D], any float dtype.
        k: number of images to rescue, 1 to W B.
        world: the processes whose images to choose from.
        count: number of images to return, at least k; None: k.

    Returns:
        index [count] int64, into the images of all processes, rank by rank, and cosine similarity [count] float32,
        descending. Equal similarities keep the order of the batch; non-finite ones come last.

    Raises:
        ValueError: the shapes do not fit, or k is out of range; the message shows them.
    """
    if z_a.dim() != 2 or z_a.shape != z_b.shape:
        raise ValueError(f"rescue: z_a is {list(z_a.shape)} and z_b {list(z_b.shape)}, expected [B, D] twice")
    if not 1 <= k <= len(z_a) * world.size:
        raise ValueError(f"rescue: k = {k} of {len(z_a) * world.size} images")
    similarity = cosines(z_a, z_b)
    if world.size > 1:
        similarity = gathered(similarity)
    rank = torch.where(similarity.isfinite(), similarity, -torch.inf)
    index = rank.argsort(descending=True, stable=True)[: count or k]  # topk() does not define the order of equal ones
    return index, similarity[index]


def _rows(z: Tensor, index: Tensor, world: World) -> Tensor:
    """Gather rows of all processes' features [B, D], each with gradient to the process it comes from."""
    if world.size == 1:
        return z[index]
    row = index - world.rank * len(z)
    is_own = (row >= 0) & (row < len(z))
    own = z[row.clamp(0, len(z) - 1)]
    return summed(torch.where(is_own[:, None], own, torch.zeros_like(own)))


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosine similarity of each row of x with the same row of y, both [n, D]: [n] float32, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return cosine_similarity(x.float(), y.float(), dim=-1)
