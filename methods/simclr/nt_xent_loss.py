"""NT-Xent, SimCLR's objective.

# B images of this process, M images of all processes, D embedding dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hvp.common.training.collectives import gathered
from hvp.common.training.distributed import World


def nt_xent_loss(z: Tensor, temperature: float, world: World = World()) -> Tensor:
    """How badly each view finds the other view of its image among all views of the batch, mean over the 2 B views.

    With i's other view p(i), s = cos / temperature, and k over the 2 M views of all processes without i itself:
    mean over i of logsumexp_k s(i, k) - s(i, p(i)). A view that is worth no more than chance costs ln(2 M - 1).

    Rows are this process's, columns everybody's. The gradient of a column is the sum over the processes, so that the
    mean over processes, which `data_parallel()` takes, is the gradient of one process with the whole batch.

    Args:
        z: projections of both views, [2, B, D], any float dtype; computed in float32.
        temperature: greater than 0.
        world: the processes, each with as many images.

    Returns:
        Scalar in nats, 0 or more.

    Raises:
        ValueError: z is no [2, B, D]; the message shows its shape.

    Source: SimCLR (arXiv:2002.05709) Eq. 1; automl/hvp, branch simclr, losses/nt_xent_loss.py. The loss of
        google-research/simclr tf2/objective.py adds the two views of an image, and is exactly twice this one.
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
    """Where this process's views stand among everybody's: view v of image b is column v M + rank B + b.

    Returns:
        [num_views * num_images] int64, view after view.
    """
    images = torch.arange(num_images, device=device) + world.rank * num_images
    views = torch.arange(num_views, device=device) * world.size * num_images
    return (views[:, None] + images).flatten()
