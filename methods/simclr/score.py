"""Pair-loss matrix of SimCLR: the loss of every pair of candidate views, per image.

# B images of this process, M images of all processes, N candidate views, D embedding dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hvp.common.training.collectives import gathered
from hvp.common.training.distributed import World
from hvp.methods.simclr.model import SimCLR
from hvp.methods.simclr.nt_xent_loss import own_columns

# Float32 similarities that exist at the same time, at least one row: 4 MB on a CPU, near its cache; a GPU needs more
# work per launch. The passes over them take twice as much memory again.
SIMILARITIES_AT_ONCE_CPU = 2**20
SIMILARITIES_AT_ONCE_CUDA = 2**24


def pair_losses(model: SimCLR, views: list[Tensor], temperature: float, world: World = World()) -> Tensor:
    """Forward all candidates as one batch, as HVP's released code does, and score all pairs. Call it without gradient.

    Args:
        model: in the mode to score in.
        views: one tensor [N, B, 3, H, W] of normalised candidates.
        temperature, world: as for `pair_nt_xent()`.

    Returns:
        [B, N, N] float32, as `pair_nt_xent()`.
    """
    (candidates,) = views
    z = model(candidates.flatten(0, 1)).projection.unflatten(0, candidates.shape[:2])  # [N, B, D]
    return pair_nt_xent(z, temperature, world)


@torch.no_grad()
def pair_nt_xent(
    z: Tensor, temperature: float, world: World = World(), similarities_at_once: int | None = None
) -> Tensor:
    """NT-Xent of every ordered pair of candidate views, per image.

    The anchor (n, i), view n of image i, with partner (m, i) has the negatives (n, j) and (m, j) of all other images j
    of all processes. With s = cos / temperature and L(n, i, m) = logsumexp over images j of s((n, i), (m, j)), except
    the anchor itself, its loss is

        logaddexp(L(n, i, n), L(n, i, m)) - s((n, i), (m, i)),

    so one matrix of similarities, [N B, N M], serves all pairs. Only a slice of its rows exists at a time.

    Args:
        z: projections of the candidates, [N, B, D], any float dtype; computed in float32.
        temperature: greater than 0.
        world: the processes, all with the same number of images.
        similarities_at_once: largest number of similarities in a slice; SIMILARITIES_AT_ONCE_* when left out.

    Returns:
        [B, N, N] float32 in nats, entry [b, t, v] for anchor v with partner t; higher is harder. The mean of a pair's
        two entries is the image's contribution to `nt_xent_loss()` of a batch whose images all keep that pair. The
        diagonal, which is no pair, is 0. A view that is not finite is a negative of all images: it spoils the entries
        of its view number, and no others.

    Raises:
        ValueError: z is not [N, B, D]; the message shows its shape.

    Source: SimCLR (arXiv:2002.05709) Eq. 1, before the mean; automl/hvp, branch simclr, losses/nt_xent_loss.py acs_fwd
        (which sums the two orders).
    """
    if z.dim() != 3:
        raise ValueError(f"pair_nt_xent: z is {list(z.shape)}, expected [N, B, D]")
    num_views, num_images, _ = z.shape
    device = z.device
    with torch.autocast(device.type, enabled=False):
        z = F.normalize(z.float(), dim=-1)
        everyone = gathered(z.transpose(0, 1)).transpose(0, 1)  # [N, M, D]
        columns = everyone.flatten(0, 1).T  # [D, N M]
        rows = z.flatten(0, 1) / temperature  # [N B, D]
        itself = own_columns(num_views, num_images, world, device)

        at_once = SIMILARITIES_AT_ONCE_CUDA if device.type == "cuda" else SIMILARITIES_AT_ONCE_CPU
        step = max((similarities_at_once or at_once) // columns.shape[1], 1)
        sums = torch.empty(len(rows), num_views, device=device)  # L: [N B, N]
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            similarity = rows[part] @ columns  # [n, N M]
            similarity.scatter_(1, itself[part, None], -torch.inf)
            sums[part] = similarity.unflatten(1, (num_views, -1)).logsumexp(dim=2)

        with_partner = sums.unflatten(0, (num_views, num_images)).transpose(0, 1)  # [B, N anchors, N partners]
        with_own = with_partner.diagonal(dim1=1, dim2=2)[:, :, None]  # [B, N anchors, 1]
        positive = rows.unflatten(0, (num_views, num_images)).transpose(0, 1) @ z.permute(1, 2, 0)  # [B, N, N]
        losses = torch.logaddexp(with_own, with_partner) - positive
        losses.diagonal(dim1=1, dim2=2).zero_()
        return losses.mT
