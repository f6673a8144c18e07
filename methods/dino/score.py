"""Pair-loss matrix of DINO: the loss of every candidate crop against every target, per image.

# B images, G global and V candidate crops in all, K prototypes
"""

from torch import Tensor

from hvp.common.losses.cross_entropy import pair_cross_entropies
from hvp.methods.dino.dino_loss import DINOLoss
from hvp.methods.dino.multi_crop import MultiCropWrapper


def pair_losses(
    student: MultiCropWrapper, teacher: MultiCropWrapper, crops: list[Tensor], dino_loss: DINOLoss, epoch: int
) -> tuple[Tensor, Tensor]:
    """Forward every candidate once and score all pairs. Call it without gradient; it moves neither centre nor teacher.

    Args:
        student, teacher: in the mode to score in.
        crops: [G, B, 3, H, W] global and [V - G, B, 3, h, w] local candidates, normalised.
        dino_loss: provides the centre and the temperatures.
        epoch: counted from 0; sets the teacher's temperature.

    Returns:
        [B, G, V] float32 in nats, entry [b, t, v] the cross-entropy of crop v against target crop t; and the teacher's
        logits of the global crops, [G, B, K].

    Source: DINO (arXiv:2104.14294) Eq. 3, before the sum over the pairs; automl/hvp, branch dino, utils/dino.py.
    """
    num_global, batch = crops[0].shape[:2]
    views = [crop.flatten(0, 1) for crop in crops]
    teacher_logits = teacher(views[:1])[0].unflatten(0, (num_global, batch))  # [G, B, K]
    student_embeddings = student.embed(views).unflatten(0, (-1, batch))  # [V, B, bottleneck]
    losses = pair_cross_entropies(
        teacher_logits,
        student_embeddings,
        dino_loss.center,
        dino_loss.teacher_temp(epoch),
        dino_loss.student_temp,
        prototypes=student.head.last_layer.frozen(),
    )
    return losses, teacher_logits
