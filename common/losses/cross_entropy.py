"""Cross-entropy losses of the methods with prototypes: DINO, iBOT and DINOv2.

`view_cross_entropy()` is the training objective over the kept views. `pair_cross_entropies()` and
`masked_patch_losses()` score all candidate views without gradient, per image.

# B images, T target views (teacher), V online views (student), D or b bottleneck dim, K prototypes
# n views of N patches, R masked patches in total, K2 prototypes for patches
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]

# Float32 logits [n, V, K] held at once. A CPU gets 5 MB (one image of 20 views and 65 536 prototypes), so passes over
# them stay in its cache; a GPU needs more work per kernel launch.
LOGITS_AT_ONCE_CPU = 20 * 65_536
LOGITS_AT_ONCE_CUDA = 16 * LOGITS_AT_ONCE_CPU


def logits_at_once(device: torch.device) -> int:
    """Number of float32 logits to hold at once on a device."""
    return LOGITS_AT_ONCE_CUDA if device.type == "cuda" else LOGITS_AT_ONCE_CPU


def view_cross_entropy(targets: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
    """Training objective: cross-entropy averaged over the batch and over all pairs of a target and a different view.

    Args:
        targets, views: as for `view_cross_entropies()`.

    Returns:
        Scalar float32, in nats.
    """
    total = sum(view_cross_entropies(targets, views), views[0].new_zeros(()))
    return total / (2 * (len(views) - 1))


def view_cross_entropies(targets: Sequence[Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """Mean cross-entropy of the batch for each view, summed over the targets that are not the view itself.

    The n targets of a view are summed to P_v first, which takes one product per view rather than one per pair:
    sum_t H(p_t, v) = n logsumexp(v) - <P_v, v>.

    Args:
        targets: the teacher's probabilities of the two global views, [B, K] each, float32.
        views: the student's logits divided by its temperature, [B, K] each, float32; the two global views first.

    Returns:
        Scalars float32, in nats, in the order of the views.
    """
    first, second = targets
    others = second, first, first + second
    losses = []
    for v, view in enumerate(views):
        num_targets, target = (1, others[v]) if v < 2 else (2, others[2])
        # Multiply and sum: autocast would run a matrix product in half precision.
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

    H(p, q) = - <p, log q> = logsumexp(s) - <p, s>, with p = softmax((t - center) / teacher_temp) and
    s = student / student_temp. That takes one matrix product per image instead of a cross-entropy per pair. The
    student's largest logit is subtracted first, which does not change H and keeps large logits from overflowing or
    cancelling.

    Args:
        teacher: logits of the target views, [T, B, K], any float dtype; computed in float32.
        student: bottleneck embeddings of the online views, [V, B, D], or their logits, [V, B, K], without `prototypes`;
            any float dtype.
        center: [K] or [1, K], subtracted from the teacher's logits.
        teacher_temp, student_temp: temperatures, greater than 0.
        prototypes: maps [n, V, D] to logits [n, V, K]. It must be linear without bias, since the temperature is applied
            before it, where the tensors are small. It runs under the caller's autocast; its result is overwritten.
        images_at_once: number of images whose logits are held at once; by default as many as fit LOGITS_AT_ONCE_*.

    Returns:
        [B, T, V] float32 in nats, entry [b, t, v] of target t against online v; higher is harder. An entry is not
        finite only if one of its own two views holds a NaN or an infinity, or a logit that overflows float32 when
        divided by the temperature. Single teacher logits of -inf are allowed: they rule out a prototype.

    Raises:
        ValueError: the shapes do not fit each other; the message shows them.

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
    # One buffer for the scaled logits of every slice: allocating memory costs more than the arithmetic.
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
    """Mean cross-entropy over the masked patches of each view, computed a few patches at a time.

    H(p, q) = logsumexp(s) - <p, s>, as for [CLS] tokens. Logits are computed for masked patches only, and not for all
    of them at once: [n, N, K2] for both networks would take 2 GB for 64 images of 4 views.

    Args:
        teacher: bottleneck embeddings of the masked patches, in the order of `masks`, [R, b], or their logits [R, K2]
            without `prototypes`; any float dtype, computed in float32.
        student: the same for the student, which does not see these patches.
        masks: [n, N] bool.
        center2: K2 numbers in any shape, subtracted from the teacher's logits.
        teacher_temp, student_temp: temperatures, greater than 0.
        prototypes: the teacher's and the student's layer from [., b] to [., K2], linear without bias. They run under
            the caller's autocast; their results are overwritten.
        patches_at_once: number of patches whose logits are held at once; by default as many as fit LOGITS_AT_ONCE_*.

    Returns:
        [n] float32 in nats; 0 for a view without a masked patch.

    Raises:
        ValueError: teacher, student and masks disagree on the number of masked patches.
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
    """Weight of each masked patch: one over the number of masked patches in its view.

    Args:
        masks: [n, N] bool.

    Returns:
        [R] float32, in the order of the masked patches.
    """
    counts = masks.sum(dim=1, keepdim=True, dtype=torch.float32).clamp(min=1)  # [n, 1]
    return (masks / counts)[masks]
