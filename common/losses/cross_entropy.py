"""The cross-entropy of methods with prototypes: the objective over the views that are trained on, and, of all
candidates, the pair-loss matrix, every view against every target, per image, and the loss of a view's masked patches.

# B images, T target views (teacher), V online views (student), D or b bottleneck dim, K prototypes
# n views of N patches, R of them masked in all, K2 prototypes of patches
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]

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

    Args:
        targets, views: as for `view_cross_entropies()`.

    Returns:
        Scalar float32, in nats.
    """
    total = sum(view_cross_entropies(targets, views), views[0].new_zeros(()))
    return total / (2 * (len(views) - 1))


def view_cross_entropies(targets: Sequence[Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """For each view the batch's mean cross-entropy, summed over the targets that are other views than itself.

    The targets of a view are summed first, so it costs one product, not one a pair: with n targets P_v,
    sum_t H(p_t, v) = n logsumexp(v) - <P_v, v>.

    Args:
        targets: the teacher's probabilities of the two global views, [B, K] each, float32.
        views: the student's logits over its temperature, [B, K] each, float32; the two global views first.

    Returns:
        Scalars float32, in nats, in the order of the views.
    """
    first, second = targets
    others = second, first, first + second
    losses = []
    for v, view in enumerate(views):
        num_targets, target = (1, others[v]) if v < 2 else (2, others[2])
        # Product and sum rather than a matrix product, which autocast would compute in half precision.
        losses.append((num_targets * view.logsumexp(dim=-1) - (target * view).sum(dim=-1)).mean())
    return losses


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


@torch.no_grad()
def masked_patch_losses(
    teacher: Tensor,
    student: Tensor,
    masks: Tensor,
    center2: Tensor,
    teacher_temp: float,
    student_temp: float,
    prototypes: tuple[Layer, Layer] | None = None,
    patches_at_once: int | None = None,
) -> Tensor:
    """The mean cross-entropy over the masked patches of each view, a few patches at a time.

    H(p, q) = logsumexp(s) - <p, s>, as for [CLS] tokens. Logits exist only for masked patches, and not for all of them
    at once: [n, N, K2] of both networks would be 2 GB for 64 images of 4 views.

    Args:
        teacher: bottleneck embeddings of the masked patches, in the order of `masks`, [R, b], or their logits [R, K2]
            when `prototypes` is left out; any float dtype, computed in float32.
        student: the same of the student, which does not see these patches.
        masks: [n, N] bool.
        center2: K2 numbers in any shape, subtracted from the teacher's logits.
        teacher_temp, student_temp: temperatures, greater than 0.
        prototypes: the teacher's and the student's layer [., b] to [., K2], linear without bias; they run under the
            caller's autocast, and their results are overwritten.
        patches_at_once: patches whose logits exist at the same time; as many as fit the cache when left out.

    Returns:
        [n] float32 in nats; 0 for a view without a masked patch.
    """
    num_patches = len(teacher)
    if len(student) != num_patches or int(masks.sum()) != num_patches:
        raise ValueError(
            f"masked_patch_losses: teacher {list(teacher.shape)}, student {list(student.shape)}, "
            f"but {int(masks.sum())} patches are masked"
        )
    device = teacher.device
    step = patches_at_once or max(logits_at_once(device) // (2 * center2.numel()), 1)
    center2 = center2.reshape(-1).float()
    # One-element tensors, not numbers: they promote half-precision inputs to float32 in the same pass.
    sharpen_teacher = torch.full((1,), 1 / teacher_temp, device=device)
    sharpen_student = torch.full((1,), 1 / student_temp, device=device)

    per_patch = torch.zeros(masks.shape, device=device)
    losses = torch.empty(num_patches, device=device)
    for start in range(0, num_patches, step):
        patches = slice(start, start + step)
        t, s = teacher[patches], student[patches] * sharpen_student
        if prototypes is not None:
            t, s = prototypes[0](t), prototypes[1](s).float()  # [m, K2]
        with torch.autocast(device.type, enabled=False):
            s -= s.amax(dim=-1, keepdim=True)
            p = (t - center2).mul_(sharpen_teacher).softmax(dim=-1)
            product = p.mul_(s).sum(dim=-1)  # before s is overwritten
            losses[patches] = s.exp_().sum(dim=-1).log_() - product
    per_patch[masks] = losses
    return per_patch.sum(dim=1) / masks.sum(dim=1).clamp(min=1)


def patch_weights(masks: Tensor) -> Tensor:
    """What each masked patch counts in its image's mean: one over the number of masked patches there.

    Args:
        masks: [n, N] bool.

    Returns:
        [R] float32, in the order of the marked patches.
    """
    counts = masks.sum(dim=1, keepdim=True, dtype=torch.float32).clamp(min=1)  # [n, 1]
    return (masks / counts)[masks]
