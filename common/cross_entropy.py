"""The cross-entropy of methods with prototypes: the objective over the views that are trained on, and the pair-loss
matrix of all candidates, every view against every target, per image.

# B images, T target views (teacher), V online views (student), D bottleneck dim, K prototypes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Logits [n, V, K] in float32 that exist at the same time: 5 MB on a CPU, so that the passes over them stay in its cache
# (an image of 20 views and 65 536 prototypes); a GPU wants more work for a launch.
LOGITS_AT_ONCE_CPU = 20 * 65_536
LOGITS_AT_ONCE_CUDA = 16 * LOGITS_AT_ONCE_CPU


def logits_at_once(device: torch.device) -> int:
    """How many logits in float32 should exist at the same time."""
    return LOGITS_AT_ONCE_CUDA if device.type == "cuda" else LOGITS_AT_ONCE_CPU


def view_cross_entropy(targets: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
    """The objective of methods with prototypes: the mean over the pairs of different views of the batch's mean
    cross-entropy.

    The targets of a view are summed first, so it costs one product, not one a pair: with n targets P_v,
    sum_t H(p_t, v) = n logsumexp(v) - <P_v, v>.

    Args:
        targets: the teacher's probabilities of the two global views, [B, K] each, float32.
        views: the student's logits over its temperature, [B, K] each, float32; the two global views first.

    Returns:
        Scalar float32, in nats.
    """
    first, second = targets
    others = second, first, first + second
    total = views[0].new_zeros(())
    for v, view in enumerate(views):
        num_targets, target = (1, others[v]) if v < 2 else (2, others[2])
        # Product and sum rather than a matrix product, which autocast would compute in half precision.
        total = total + (num_targets * view.logsumexp(dim=-1) - (target * view).sum(dim=-1)).mean()
    return total / (2 * (len(views) - 1))


@torch.no_grad()
def pair_cross_entropies(
    teacher: Tensor,
    student: Tensor,
    center: Tensor,
    teacher_temp: float,
    student_temp: float,
    prototypes: Callable[[Tensor], Tensor] | None = None,
    images_at_once: int | None = None,
) -> Tensor:
    """Cross-entropy of every online view against every target view, kept per image.

    H(p, q) = - <p, log q> = logsumexp(s) - <p, s>, with p = softmax((t - center) / teacher_temp), s = student /
    student_temp: one matrix product an image instead of a cross-entropy a pair. Student logits are shifted by their
    largest first, which H does not see, so that large ones neither overflow nor cancel.

    Args:
        teacher: logits of the target views, [T, B, K], any float dtype; computed in float32.
        student: bottleneck embeddings of the online views, [V, B, D], or their logits, [V, B, K], when `prototypes` is
            left out; any float dtype.
        center: [K] or [1, K], subtracted from the teacher's logits.
        teacher_temp, student_temp: temperatures, greater than 0.
        prototypes: makes [n, V, D] logits [n, V, K]. It is linear without bias (the temperature goes in before it,
            where the tensors are small), runs under the caller's autocast, and its result is overwritten. Left out,
            `student` holds logits.
        images_at_once: images whose logits exist at the same time; as many as fit LOGITS_AT_ONCE_* when left out.

    Returns:
        [B, T, V] float32 in nats, entry [b, t, v] of target t against online v; higher is harder. An entry is not
        finite only if one of its own two views holds a NaN or an infinity, or a logit that becomes one in float32 when
        it is divided by the temperature. Single teacher logits of -inf are prototypes ruled out, and fine.

    Raises:
        ValueError: shapes that do not fit each other; the message shows them.

    Source: DINO (arXiv:2104.14294) Eq. 2, before the sum over the pairs; automl/hvp, branch dino, utils/dino.py
        select_forward.
    """
    num_targets, num_images, _ = teacher.shape
    num_views = len(student)
    if student.shape[1] != num_images or center.numel() != teacher.shape[2]:
        raise ValueError(
            f"pair_cross_entropies: teacher {list(teacher.shape)}, student {list(student.shape)}, "
            f"center {list(center.shape)}"
        )
    device = teacher.device
    step = images_at_once or max(min(logits_at_once(device) // (num_views * center.numel()), num_images), 1)
    # One-element tensors, not numbers: they promote half-precision inputs to float32 in the same pass.
    sharpen_teacher = torch.full((1,), 1 / teacher_temp, device=device)
    sharpen_student = torch.full((1,), 1 / student_temp, device=device)
    center = center.reshape(-1).float()

    losses = torch.empty(num_images, num_targets, num_views, device=device)
    # Scaled logits need a home of their own; one for all slices, since fresh memory costs more than the arithmetic.
    buffer = torch.empty(step, num_views, 0 if prototypes else student.shape[2], device=device)
    for start in range(0, num_images, step):
        images = slice(start, start + step)
        online, targets = student[:, images].transpose(0, 1), teacher[:, images].transpose(0, 1)  # [n, V, D], [n, T, K]
        if prototypes is None:
            s = torch.mul(online, sharpen_student, out=buffer[: len(online)])  # [n, V, K]
        else:
            s = prototypes(online * sharpen_student).float()
        if s.shape[-1] != center.numel():
            raise ValueError(
                f"pair_cross_entropies: {center.numel()} prototypes, but the student's logits are {list(s.shape)}"
            )
        with torch.autocast(device.type, enabled=False):
            s -= s.amax(dim=-1, keepdim=True)
            p = (targets - center).mul_(sharpen_teacher).softmax(dim=-1)  # [n, T, K]
            product = p @ s.mT  # [n, T, V], before s is overwritten
            logsumexp = s.exp_().sum(dim=-1).log_()  # [n, V]
            losses[images] = logsumexp[:, None, :] - product
    return losses
