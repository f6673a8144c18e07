"""DINO, with hard views: the trainer.

Shaped like the upstream's main_dino.py; `# hvp:` and `# rescue:` mark every departure from it, which
`--hard-views none` and `--no-rescue` switch off.

    # B images, G global and V = G + M candidate crops (G = 2, V = 2 + M without hard views), K prototypes

Source: facebookresearch/dino main_dino.py; HVP Algorithm 1.
"""

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple, Unpack

import torch
from torch.optim import Optimizer

from hvp.common.networks import Encoder
from hvp.common.networks.heads import DINOHead
from hvp.common.training.batch_norm import has_batch_norm
from hvp.common.training.collapse import feature_spread
from hvp.common.training.distributed import World, synchronised
from hvp.common.training.ema import update_ema
from hvp.common.training.optimizers import build_optimizer, clip_gradients, split_weight_decay
from hvp.common.training.schedules import student_with_teacher
from hvp.common.training.session import RunOptions, session
from hvp.common.training.step import Step
from hvp.methods.dino.config import DinoConfig
from hvp.methods.dino.dino_loss import DINOLoss
from hvp.methods.dino.multi_crop import MultiCropWrapper, build_backbone
from hvp.methods.dino.score import pair_losses

UNIFORM = (
    "for {steps} steps the loss has been ln(out_dim) = {loss:.3f}: the outputs are uniform. Lower the learning rate or "
    "the teacher temperature, or start selecting later (selection.start)"
)


def train_dino(config: DinoConfig, out: Path, **options: Unpack[RunOptions]) -> Path:
    """Pretrain an encoder, in one process or as one of several that a launcher started.

    Args:
        config: the resolved configuration.
        out: the run's folder.
        options: as in RunOptions.

    Returns:
        The last checkpoint. `student` and `teacher` in it have the upstream's state-dict keys.

    Raises:
        UserError: an error that the user can fix, before the first step where possible.
        Stopped: a signal asked to stop.
    """
    with session(config, out, **options) as s:
        parts = s.build(build)
        with s.run("dino", parts, trained=parts.student) as run:
            for epoch in run.epochs:
                train_one_epoch(run, parts, epoch, config)
            return run.last_checkpoint


def build_encoder(config: DinoConfig, drop_path_rate: float = 0.0) -> Encoder:
    """Build the backbone, with fresh weights."""
    return build_backbone(
        config.model.arch,
        patch_size=config.model.patch_size,
        img_size=config.views.global_crops_size,
        drop_path_rate=drop_path_rate,
    )


def build_networks(config: DinoConfig, device: torch.device) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """Build student and teacher with the same fresh weights. The teacher has no stochastic depth and no gradient."""
    model = config.model

    def build(drop_path_rate: float) -> MultiCropWrapper:
        backbone = build_encoder(config, drop_path_rate)
        head = DINOHead(
            backbone.embed_dim,
            model.out_dim,
            use_bn=model.use_bn_in_head,
            norm_last_layer=model.norm_last_layer,
            hidden_dim=model.head_hidden_dim,
            bottleneck_dim=model.head_bottleneck_dim,
        )
        return MultiCropWrapper(backbone, head).to(device)

    student, teacher = build(model.drop_path_rate), build(0.0)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return student, teacher


def build_loss(config: DinoConfig) -> DINOLoss:
    """Build the objective, with its centre."""
    return DINOLoss(
        config.model.out_dim,
        2 + config.views.local_crops_number,
        config.loss.warmup_teacher_temp,
        config.loss.teacher_temp,
        config.loss.warmup_teacher_temp_epochs,
        config.train.epochs,
        student_temp=config.loss.student_temp,
        center_momentum=config.loss.center_momentum,
    )


class Parts(NamedTuple):
    """State that training changes, under its names in a checkpoint."""

    student: MultiCropWrapper
    teacher: MultiCropWrapper
    dino_loss: DINOLoss
    optimizer: Optimizer


def build(config: DinoConfig, world: World, device: torch.device) -> Parts:
    """Build the networks, the objective and the optimiser."""
    student, teacher = (synchronised(network, world, device) for network in build_networks(config, device))
    optimizer = build_optimizer(config.optim.optimizer, split_weight_decay(student.named_parameters()))
    return Parts(student, teacher, build_loss(config).to(device), optimizer)


def train_one_epoch(run: Step, parts: Parts, epoch: int, config: DinoConfig) -> None:
    """Train the steps of one epoch that are not done yet."""
    student, teacher, dino_loss, optimizer = parts
    # hvp: with batch norm, outputs depend on the other crops that they are computed with
    reuses_teacher = not has_batch_norm(teacher)
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
            crops = run.views(part)  # [G, B, 3, H, W] and [V - G, B, 3, h, w]
            with run.precision.autocast():
                # hvp: train on the hardest combination of the sampled crops
                score = partial(pair_losses, student, teacher, dino_loss=dino_loss, epoch=epoch)
                crops = run.hard_views(crops, score, student, teacher)
                views = [crop.flatten(0, 1) for crop in crops]  # [2 B, ...] and [local B, ...]
                teacher_output = run.kept.outputs if reuses_teacher else None  # hvp: [2 B, K]
                if teacher_output is None:
                    with torch.no_grad():
                        teacher_output, _ = teacher(views[:1])
                student_output, features = run.model(views)  # [(2 + local) B, K]; of the global crops [2 B, .]
                loss = dino_loss(student_output, teacher_output, epoch)
                rescued = run.rescue(features, part)  # rescue: pull strong views of the easiest images to common ones
            run.backward(loss, rescued)
            dino_loss.center_step(teacher_output)

        run.unscale(optimizer)
        if config.optim.clip_grad:
            clip_gradients(student.parameters(), config.optim.clip_grad, by=config.optim.clip_by)
        if epoch < config.optim.freeze_last_layer:
            cancel_gradients_last_layer(student)
        run.optimize(optimizer)
        update_ema(teacher.parameters(), student.parameters(), momentum)
        dino_loss.update_center()

        spread = partial(feature_spread, features.projection)
        run.record(lr=lr, weight_decay=wd, momentum=momentum, spread=spread)
        uniform = math.log(config.model.out_dim)
        collapsed = abs(run.objective - uniform) < 1e-3
        run.collapse.see(it, collapsed, UNIFORM.format(steps=run.collapse.steps, loss=uniform))


def cancel_gradients_last_layer(student: MultiCropWrapper) -> None:
    """Leave the prototypes as they are in the coming optimiser step."""
    for parameter in student.head.last_layer.parameters():
        parameter.grad = None
