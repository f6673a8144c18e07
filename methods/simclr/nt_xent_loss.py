"""NT-Xent, SimCLR's objective.

# B images of this process, M images of all processes, D embedding dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hvp.common.training.collectives import gathered
from hvp.common.training.distributed import World


def nt_xent_loss(z: Tensor, temperature: float, world: World = World()) -> Tensor:
    """NT-Xent: cross-entropy of identifying each view's partner among all other views, mean over the 2 B views.

    With view i, its partner p(i), s = cos / temperature, and k over the 2 M views of all processes except i:
    mean over i of logsumexp_k s(i, k) - s(i, p(i)). The loss at chance is ln(2 M - 1).

    Rows are this process's views, columns those of all processes. A column's gradient is the sum over the processes, so
    the mean over processes that `data_parallel()` takes equals the gradient of one process with the whole batch.

    Args:
        z: projections of both views, [2, B, D], any float dtype; computed in float32.
        temperature: greater than 0.
        world: the processes, all with the same number of images.

    Returns:
        Scalar float32 in nats, 0 or more.

    Raises:
        ValueError: z is not [2, B, D]; the message shows its shape.

    Source: SimCLR (arXiv:2002.05709) Eq. 1; automl/hvp, branch simclr, losses/nt_xent_loss.py. The loss of
        google-research/simclr tf2/objective.py sums over the two views of an image and is exactly twice this one.
    """
    if z.dim() != 3 or len(z) != 2:
        raise ValueError(f"nt_xent_loss: z is {list(z.shape)}, expected [2, B, D]")
    num_images = z.shape[1]
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z.float(), dim=-1)
        everyone = gathered(z.transpose(0, 1)).transpose(0, 1)  # [2, M, D]
        similarity = z.flatten(0, 1) @ everyone.flatten(0, 1).T / temperature  # [2 B, 2 M]
        first, second = own_columns(2, num_images, world, z.device).unflatten(0, (2, num_images))
        itself, other = torch.cat([first, second]), torch.cat([second, first])
        similarity[torch.arange(2 * num_images, device=z.device), itself] = -torch.inf
        return F.cross_entropy(similarity, other)


def own_columns(num_views: int, num_images: int, world: World, device: torch.device) -> Tensor:
    """Columns of this process's views among those of all processes: v M + rank B + b for view v of image b.

    Returns:
        [num_views * num_images] int64, view after view.
    """
    images = torch.arange(num_images, device=device) + world.rank * num_images
    views = torch.arange(num_views, device=device) * world.size * num_images
    return (views[:, None] + images).flatten()
