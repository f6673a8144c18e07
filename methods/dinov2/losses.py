"""DINOv2's objective: [CLS] cross-entropy over pairs of different views, masked-patch cross-entropy of each global view
against itself, and KoLeo, which spreads features. The teacher's targets are centred or balanced.

# B images per process, L local views, R masked patches in both global views together, D embedding dim
# K and K2 prototypes ([CLS] and patches)
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hvp.common.losses.center import GlobalMean
from hvp.common.losses.cross_entropy import patch_weights, view_cross_entropies

NUM_GLOBAL_VIEWS = 2
SINKHORN_ITERATIONS = 3
KOLEO_EPS = 1e-8

Centering = Literal["centering", "sinkhorn_knopp"]


class Losses(NamedTuple):
    """Scalar losses, float32, each multiplied by its weight."""

    loss: Tensor
    """Sum of the others."""
    dino_global: Tensor
    """[CLS] cross-entropy of the global views against each other, nats; plus `dino_local`, a mean over all pairs."""
    dino_local: Tensor
    """[CLS] cross-entropy of the local views against both global ones, nats."""
    koleo: Tensor
    """Minus the mean log distance to the nearest other image, summed over both global views."""
    ibot: Tensor
    """Masked-patch cross-entropy, nats."""


class TeacherCenter(nn.Module):
    """Centre of the teacher's logits, which keeps the targets from collapsing.

    Targets are softmax((t - c) / temperature) with a centre c. With `centering`, c is the EMA of the mean logits in the
    buffer `center`. With `sinkhorn_knopp`, c is computed from the logits themselves, see `sinkhorn_center()`, and the
    buffer does not change.

    Args:
        shape: shape of the buffer; its last dimension is the prototypes.
        centering: one of the two.
        momentum: momentum of the EMA.

    Source: facebookresearch/dinov2 dinov2/loss/dino_clstoken_loss.py DINOLoss, ibot_patch_loss.py iBOTPatchLoss, which
        delay each update until the next targets are computed. Here it happens at the end of the step, so a checkpoint
        contains it.
    """

    center: Tensor

    def __init__(self, *shape: int, centering: Centering, momentum: float) -> None:
        super().__init__()
        self.centering, self.momentum = centering, momentum
        self.register_buffer("center", torch.zeros(shape))
        self._mean = GlobalMean()

    @torch.no_grad()
    def center_for(self, logits: Tensor, temp: float) -> Tensor:
        """Return the centre, [K] float32, for teacher logits [n, K] at a temperature.

        With Sinkhorn-Knopp, all processes must call it together, each with its own rows.
        """
        if self.centering == "centering":
            return self.center.reshape(-1)
        return sinkhorn_center(logits, temp)

    @torch.no_grad()
    def targets(self, logits: Tensor, temp: float) -> Tensor:
        """Return the teacher's probabilities, [n, K] float32, for its logits [n, K] in any float dtype."""
        return ((logits.float() - self.center_for(logits, temp)) / temp).softmax(dim=-1)

    @torch.no_grad()
    def step(self, logits: Tensor) -> None:
        """Add a micro-batch's logits, [n, K], to the next update."""
        if self.centering == "centering":
            self._mean.add(logits)

    @torch.no_grad()
    def update(self) -> None:
        """Move the centre towards the mean of all logits added since the last update, over all processes."""
        if self.centering == "centering":
            mean = self._mean.take()
            # Without a masked patch in any process there is no mean, and the centre stays.
            moved = self.center.lerp(mean.reshape(self.center.shape), 1 - self.momentum)
            self.center.copy_(torch.where(mean.isnan().any(), self.center, moved))


@torch.no_grad()
def sinkhorn_center(logits: Tensor, temp: float, iterations: int = SINKHORN_ITERATIONS) -> Tensor:
    """Sinkhorn-Knopp as a centre: the assignments are softmax((logits - centre) / temp).

    The algorithm alternately scales Q = exp(logits / temp) so that all prototypes, then all rows, have equal sums. The
    result is Q times a factor u for each prototype, with rows that sum to 1: the softmax of the logits minus the centre
    -temp * log(u). Factors common to all prototypes, such as the number of rows, cancel in the softmax. The computation
    uses logarithms, so large logits do not overflow.

    Args:
        logits: [n, K], any float dtype; n may differ between processes, and be 0.
        temp: greater than 0.
        iterations: number of scalings of prototypes and rows; the last scaling of the rows is the softmax.

    Returns:
        [K] float32, the same in all processes.

    Source: SwAV (arXiv:2006.09882) Appendix A; facebookresearch/dinov2 sinkhorn_knopp_teacher.
    """
    scaled = logits.float() / temp
    prototypes = _global_logsumexp(scaled)  # minus log(u), [K]
    for _ in range(iterations - 1):
        rows = (scaled - prototypes).logsumexp(dim=1, keepdim=True)
        prototypes = _global_logsumexp(scaled - rows)
    return temp * prototypes


def _global_logsumexp(x: Tensor) -> Tensor:
    """Compute logsumexp over the rows of all processes, [n, K] to [K]."""
    total = x.logsumexp(dim=0) if len(x) else x.new_full(x.shape[1:], -torch.inf)
    if not (dist.is_available() and dist.is_initialized()):
        return total
    largest = total.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    total = (total - largest).exp()
    dist.all_reduce(total)
    return total.log() + largest


def koleo_loss(features: Tensor) -> Tensor:
    """KoLeo: minus the mean log distance of every L2-normalised feature to its nearest neighbour.

    It is small when the features of a batch are spread evenly. As upstream, only this process's images are compared.

    Args:
        features: [B, D], any float dtype; computed in float32. One view of each image, at least 2 images.

    Returns:
        Scalar float32.

    Raises:
        ValueError: there are fewer than 2 images.

    Source: Sablayrolles et al. (arXiv:1806.03198) Eq. 2; facebookresearch/dinov2 dinov2/loss/koleo_loss.py KoLeoLoss.
    """
    if len(features) < 2:
        raise ValueError(f"koleo_loss: features {list(features.shape)}, but a nearest neighbour needs at least 2")
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), eps=KOLEO_EPS, dim=-1)
        with torch.no_grad():
            similarity = x @ x.mT
            nearest = similarity.fill_diagonal_(-1).argmax(dim=1)
        return -(F.pairwise_distance(x, x[nearest], eps=KOLEO_EPS) + KOLEO_EPS).log().mean()


class DINOv2Loss(nn.Module):
    """All terms of the objective, with the two centres `dino_loss.center` and `ibot_patch_loss.center`.

    Call `center_step` after each micro-batch's loss and `update_center` once per optimiser step. Neither the loss nor a
    selection moves a centre.

    Args:
        out_dim, patch_out_dim: numbers of prototypes, K and K2.
        ncrops: number of student views, 2 + L, including the two global ones, which come first.
        centering: how the teacher's targets are kept from collapsing, as in `TeacherCenter`.
        dino_weight, koleo_weight, ibot_weight: weights of the three terms. KoLeo applies to each of the two global
            views, so it counts twice.
        student_temp: the student's temperature.
        center_momentum: EMA momentum of the centres.

    Source: DINOv2 (arXiv:2304.07193) section 4; facebookresearch/dinov2 dinov2/train/ssl_meta_arch.py.
    """

    def __init__(
        self,
        out_dim: int,
        patch_out_dim: int,
        ncrops: int,
        *,
        centering: Centering,
        dino_weight: float = 1.0,
        koleo_weight: float = 0.1,
        ibot_weight: float = 1.0,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.ncrops = ncrops
        self.dino_weight, self.koleo_weight, self.ibot_weight = dino_weight, koleo_weight, ibot_weight
        self.student_temp = student_temp
        self.dino_loss = TeacherCenter(1, out_dim, centering=centering, momentum=center_momentum)
        self.ibot_patch_loss = TeacherCenter(1, 1, patch_out_dim, centering=centering, momentum=center_momentum)

    def forward(
        self,
        student_cls: Tensor,
        student_patch: Tensor,
        student_features: Tensor,
        teacher_cls: Tensor,
        teacher_patch: Tensor,
        masks: Tensor,
        teacher_temp: float,
    ) -> Losses:
        """Compute all terms and their sum.

        The two [CLS] terms add up to the mean over the pairs of different views. The patch term is the mean over an
        image's masked patches (0 for an image without any), then over the images, then over the two global views.

        Args:
            student_cls: logits [(2 + L) * B, K], view after view; any float dtype, like all; computed in float32.
            student_patch: logits [R, K2] of the patches that `masks` marks, in its order.
            student_features: the backbone's [CLS] tokens of the two global views, [2 * B, D], for KoLeo.
            teacher_cls: logits [2 * B, K] of the two global views.
            teacher_patch: logits [R, K2] of the same patches, which the teacher sees unmasked.
            masks: [2 * B, N] bool, True for a masked patch.
            teacher_temp: the teacher's temperature.

        Raises:
            ValueError: shapes do not match; the message shows them.
        """
        if student_patch.shape != teacher_patch.shape or len(masks) != len(teacher_cls):
            raise ValueError(
                f"DINOv2Loss: patches {list(student_patch.shape)} of the student, {list(teacher_patch.shape)} of the "
                f"teacher, masks {list(masks.shape)}, teacher's [CLS] {list(teacher_cls.shape)}"
            )
        targets = self.dino_loss.targets(teacher_cls, teacher_temp).chunk(NUM_GLOBAL_VIEWS)
        views = (student_cls.float() / self.student_temp).chunk(self.ncrops)
        per_view = view_cross_entropies(targets, views)
        num_pairs = NUM_GLOBAL_VIEWS * (self.ncrops - 1)
        zero = per_view[0].new_zeros(())
        dino_global = self.dino_weight * sum(per_view[:NUM_GLOBAL_VIEWS], zero) / num_pairs
        dino_local = self.dino_weight * sum(per_view[NUM_GLOBAL_VIEWS:], zero) / num_pairs

        target = self.ibot_patch_loss.targets(teacher_patch, teacher_temp)
        online = student_patch.float() / self.student_temp
        # Product and sum rather than a matrix product, which autocast would compute in half precision.
        per_patch = online.logsumexp(dim=-1) - (target * online).sum(dim=-1)  # [R]
        ibot = self.ibot_weight * (per_patch * patch_weights(masks)).sum() / len(masks)

        koleo = zero
        if self.koleo_weight:
            koleo = self.koleo_weight * sum(map(koleo_loss, student_features.chunk(NUM_GLOBAL_VIEWS)), zero)
        return Losses(dino_global + dino_local + koleo + ibot, dino_global, dino_local, koleo, ibot)

    def center_step(self, teacher_cls: Tensor, teacher_patch: Tensor) -> None:
        """Add a micro-batch's teacher logits, [n, K] and of the masked patches [R, K2], to the next update."""
        self.dino_loss.step(teacher_cls)
        self.ibot_patch_loss.step(teacher_patch)

    def update_center(self) -> None:
        """Move the centres towards the means of all logits added since the last update, over all processes."""
        self.dino_loss.update()
        self.ibot_patch_loss.update()
