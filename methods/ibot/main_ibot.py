"""iBOT, with hard views: the trainer.

Shaped like the upstream's main_ibot.py; `# hvp:` and `# rescue:` mark every departure from it, which
`--hard-views none` and `--no-rescue` switch off.

    # B images, G global and V = G + M candidate crops (G = 2, V = 2 + M without hard views), N patches of a global crop
    # R of the patches are masked; K and K2 prototypes ([CLS] and patches), b bottleneck dim

Source: bytedance/ibot main_ibot.py; HVP Algorithm 1.
"""

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvp.common.networks.vision_transformer import VisionTransformer, build_vit
from hvp.common.training.collapse import feature_spread
from hvp.common.training.distributed import World, synchronised
from hvp.common.training.ema import update_ema
from hvp.common.training.optimizers import build_optimizer, clip_gradients, split_weight_decay
from hvp.common.training.schedules import student_with_teacher
from hvp.common.training.session import RunOptions, session
from hvp.common.training.step import Step
from hvp.methods.ibot.config import IbotConfig
from hvp.methods.ibot.head import MultiCropWrapper, iBOTHead
from hvp.methods.ibot.ibot_loss import iBOTLoss
from hvp.methods.ibot.masking import MaskSampler
from hvp.methods.ibot.score import pair_losses

UNIFORM = (
    "for {steps} steps the [CLS] loss has been ln(out_dim) = {loss:.3f}: the outputs are uniform. Lower the learning "
    "rate or the teacher temperature, or start selecting later (selection.start)"
)

TeacherEmbedding = tuple[Tensor, Tensor]
"""Bottlenecks of [CLS] tokens, [2 B, b], and of all patches, [2 B, N, b]."""


def train_ibot(config: IbotConfig, out: Path, **options: Unpack[RunOptions]) -> Path:
    """Pretrain an encoder, in one process or as one of several that a launcher started.

    Args:
        config: the resolved configuration.
        out: the run's folder.
        options: as in RunOptions.

    Returns:
        The last checkpoint. `student`, `teacher` and `ibot_loss` in it have the upstream's state-dict keys.

    Raises:
        UserError: an error that the user can fix, before the first step where possible.
        Stopped: a signal asked to stop.
    """
    with session(config, out, masks=build_masks(config), **options) as s:
        parts = s.build(build)
        with s.run("ibot", parts, trained=parts.student) as run:
            for epoch in run.epochs:
                train_one_epoch(run, parts, epoch, config)
            return run.last_checkpoint


def build_masks(config: IbotConfig) -> MaskSampler:
    """Build the sampler of the masks of global candidates."""
    side = config.views.global_crops_size // config.model.patch_size
    masks = config.masks
    return MaskSampler(
        grid=(side, side),
        num_views=sum(slot.candidates for slot in config.view_slots()[:2]),
        ratios=masks.pred_ratio,
        variations=masks.pred_ratio_var,
        shape=masks.pred_shape,
        start_epoch=masks.pred_start_epoch,
        seed=config.train.seed,
    )


def build_encoder(config: IbotConfig, *, drop_path_rate: float = 0.0, mask_token: bool = False) -> VisionTransformer:
    """Build the backbone, with fresh weights."""
    return build_vit(
        config.model.arch,
        patch_size=config.model.patch_size,
        img_size=config.views.global_crops_size,
        drop_path_rate=drop_path_rate,
        mask_token=mask_token,
    )


def build_networks(config: IbotConfig, device: torch.device) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """Build student and teacher with the same fresh weights.

    The teacher has no stochastic depth, no gradient, and no mask token, as it sees no masks.
    """
    model = config.model

    def build(drop_path_rate: float, mask_token: bool) -> MultiCropWrapper:
        backbone = build_encoder(config, drop_path_rate=drop_path_rate, mask_token=mask_token)
        head = iBOTHead(
            backbone.embed_dim,
            model.out_dim,
            patch_out_dim=model.patch_out_dim,
            shared_head=model.shared_head,
            use_bn=model.norm_in_head == "bn",
            norm_last_layer=model.norm_last_layer,
            hidden_dim=model.head_hidden_dim,
            bottleneck_dim=model.head_bottleneck_dim,
        )
        return MultiCropWrapper(backbone, head).to(device)

    student, teacher = build(model.drop_path_rate, mask_token=True), build(0.0, mask_token=False)
    weights = student.state_dict()
    teacher.load_state_dict({name: weights[name] for name in teacher.state_dict()})
    teacher.requires_grad_(False)
    return student, teacher


def build_loss(config: IbotConfig) -> iBOTLoss:
    """Build the objective, with its centres."""
    loss = config.loss
    return iBOTLoss(
        config.model.out_dim,
        config.model.patch_out_dim,
        2 + config.views.local_crops_number,
        loss.warmup_teacher_temp,
        loss.teacher_temp,
        loss.warmup_teacher_patch_temp,
        loss.teacher_patch_temp,
        loss.warmup_teacher_temp_epochs,
        config.train.epochs,
        student_temp=loss.student_temp,
        center_momentum=loss.center_momentum,
        center_momentum2=loss.center_momentum2,
        lambda1=loss.lambda1,
        lambda2=loss.lambda2,
        pred_start_epoch=config.masks.pred_start_epoch,
    )


class Parts(NamedTuple):
    """State that training changes, under its names in a checkpoint."""

    student: MultiCropWrapper
    teacher: MultiCropWrapper
    ibot_loss: iBOTLoss
    optimizer: Optimizer


def build(config: IbotConfig, world: World, device: torch.device) -> Parts:
    """Build the networks, the objective and the optimiser."""
    student, teacher = (synchronised(network, world, device) for network in build_networks(config, device))
    optimizer = build_optimizer(config.optim.optimizer, split_weight_decay(student.named_parameters()))
    return Parts(student, teacher, build_loss(config).to(device), optimizer)


def train_one_epoch(run: Step, parts: Parts, epoch: int, config: IbotConfig) -> None:
    """Train the steps of one epoch that are not done yet."""
    student, teacher, ibot_loss, optimizer = parts
    weights = dict(student.named_parameters())
    averaged = [weights[name] for name, _ in teacher.named_parameters()]  # all but the mask token
    schedules = student_with_teacher(
        config.optim, config.peak_lr, config.model.momentum_teacher, run.total_steps, run.steps_per_epoch
    )
    for it, batch in run.steps(epoch):
        lr, wd, momentum = schedules(it)
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = lr
            group["weight_decay"] = wd if i == 0 else 0.0  # only the first group is regularised

        optimizer.zero_grad(set_to_none=True)
        for part in batch:
            crops, masks = run.views(part), run.masks(part)  # [G, B, ...] and [V - G, B, ...]; masks [G, B, N]
            with run.precision.autocast():
                # hvp: train on the hardest combination of the sampled crops, each with its own mask
                score = partial(pair_losses, student, teacher, masks=masks, ibot_loss=ibot_loss, epoch=epoch)
                crops = run.hard_views(crops, score, student, teacher)
                views, masks = [crop.flatten(0, 1) for crop in crops], run.kept.of(masks)  # [2 B, ...], ...; [2 B, N]
                # hvp: reuse the teacher's outputs, unless batch norm makes them depend on the other crops
                embedding: TeacherEmbedding | None = None if teacher.has_batch_norm else run.kept.outputs
                if embedding is None:
                    with torch.no_grad():
                        embedding = teacher.embed(views[0])
                teacher_cls, teacher_patch, teacher_patch_mean = teacher_outputs(teacher.head, *embedding, masks)
                # [(2 + local) B, K] and [R, K2]; of the global crops [2 B, .]
                student_cls, student_patch, features = run.model(views, masks)
                losses = ibot_loss(student_cls, student_patch, teacher_cls, teacher_patch, masks, epoch)
                # rescue: pull strong views of the easiest images to their common ones
                loss = losses.loss + run.rescue(features, part)
            run.backward(loss, loss_cls=losses.cls, loss_patch=losses.patch)
            ibot_loss.center_step(teacher_cls, teacher_patch_mean)

        run.unscale(optimizer)
        if config.optim.clip_grad:
            clip_gradients(student.parameters(), config.optim.clip_grad)
        if epoch < config.optim.freeze_last_layer:
            cancel_gradients_last_layer(student)
        run.optimize(optimizer)
        update_ema(teacher.parameters(), averaged, momentum)
        ibot_loss.update_center()

        run.record(lr=lr, weight_decay=wd, momentum=momentum, spread=partial(feature_spread, features.projection))
        uniform, weight = math.log(config.model.out_dim), config.loss.lambda1
        collapsed = abs(run.loss_part("loss_cls") - weight * uniform) < 1e-3 * weight
        run.collapse.see(it, collapsed, UNIFORM.format(steps=run.collapse.steps, loss=uniform))


def cancel_gradients_last_layer(student: MultiCropWrapper) -> None:
    """Leave the prototypes, of [CLS] tokens and of patches, as they are in the coming optimiser step."""
    for name, parameter in student.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


@torch.no_grad()
def teacher_outputs(head: iBOTHead, cls: Tensor, patches: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the teacher's outputs for the loss and its centres.

    The prototypes are linear, so the mean of the logits over all patches, which the centre follows, is the logits of
    the mean patch. No logits are computed besides those of the masked patches.

    Args:
        head: the teacher's head.
        cls, patches: the bottleneck of [CLS] tokens, [2 B, b], and of all patches, [2 B, N, b].
        masks: [2 B, N] bool.

    Returns:
        Logits of [CLS] tokens [2 B, K], of masked patches [R, K2], and their mean over all patches of a view [2 B, K2].
    """
    return head.last_layer(cls), head.last_layer2(patches[masks]), head.last_layer2(patches.mean(dim=1))
