"""DINO, with hard views: the trainer.

Shaped like the upstream's main_dino.py; `# hvp:` and `# rescue:` mark what is not in it. With `--hard-views none`
and `--no-rescue` none of that runs.

    # B images, G global and V = G + M candidate crops (G = 2, V = 2 + M without hard views), K prototypes

Source: facebookresearch/dino main_dino.py; HVP Algorithm 1.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hvp.common.hardviews import Selection
from hvp.common.networks import Encoder
from hvp.common.networks.heads import DINOHead
from hvp.common.training.batch_norm import has_batch_norm
from hvp.common.training.collapse import feature_spread
from hvp.common.training.distributed import averaging, data_parallel, synchronised, unwrapped
from hvp.common.training.ema import update_ema
from hvp.common.training.optimizers import build_optimizer, clip_gradients, split_weight_decay
from hvp.common.training.precision import Precision
from hvp.common.training.rescuing import Rescuer
from hvp.common.training.run import Run, Stateful
from hvp.common.training.schedules import warmup_cosine
from hvp.common.training.selecting import ViewSelector
from hvp.common.training.session import RunOptions, session
from hvp.common.views.normalize import normalize
from hvp.methods.dino.config import DinoConfig
from hvp.methods.dino.dino_loss import DINOLoss
from hvp.methods.dino.multi_crop import MultiCropWrapper, build_backbone
from hvp.methods.dino.score import pair_losses


def train_dino(config: DinoConfig, out: Path, **options: Unpack[RunOptions]) -> Path:
    """Pretrains an encoder, in one process or as one of those that a launcher started.

    Args:
        config: what to do.
        out: the run's folder.
        options: as in RunOptions.

    Returns:
        The last checkpoint. `student` and `teacher` in it have the upstream's state-dict keys.

    Raises:
        UserError: something that the caller can mend, before the first step where it can be known by then.
        Stopped: a signal asked to stop.
    """
    with session(config, out, **options) as s:
        with s.world.agreeing():
            student, teacher = (synchronised(net, s.world, s.device) for net in build_networks(config, s.device))
            dino_loss = build_loss(config).to(s.device)
            optimizer = build_optimizer(config.optim.optimizer, split_weight_decay(student.named_parameters()))
            rescuer = s.rescuer(student)
        parts: dict[str, Stateful] = {
            "student": student,
            "teacher": teacher,
            "dino_loss": dino_loss,
            "optimizer": optimizer,
        }
        with s.run("dino", parts) as run:
            model = data_parallel(student, s.world, s.device)
            for epoch in run.epochs:
                train_one_epoch(model, teacher, dino_loss, optimizer, s.precision, rescuer, run, epoch, config)
            return run.last_checkpoint


def build_encoder(config: DinoConfig, drop_path_rate: float = 0.0) -> Encoder:
    """The backbone, with fresh weights."""
    return build_backbone(
        config.model.arch,
        patch_size=config.model.patch_size,
        img_size=config.views.global_crops_size,
        drop_path_rate=drop_path_rate,
    )


def build_networks(config: DinoConfig, device: torch.device) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """Student and teacher, which start with the same weights. The teacher has no stochastic depth and no gradient."""
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
    """The objective, with its centre."""
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


def build_modules(config: DinoConfig, device: torch.device) -> Sequence[nn.Module]:
    """Student, teacher and loss: what a checkpoint holds."""
    return (*build_networks(config, device), build_loss(config).to(device))


def train_one_epoch(
    model: MultiCropWrapper | DistributedDataParallel,
    teacher: MultiCropWrapper,
    dino_loss: DINOLoss,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    rescuer: Rescuer,
    run: Run,
    epoch: int,
    config: DinoConfig,
) -> None:
    """The steps of one epoch that are not done yet. `model` is the student, as `data_parallel()` gave it back."""
    student: MultiCropWrapper = unwrapped(model)
    optim, num_parts = config.optim, config.train.accumulate
    last_layer = list(student.head.last_layer.parameters())
    selector = ViewSelector(config, run.total_steps, run.world.rank)
    # hvp: with batch norm the outputs of the kept crops depend on the batch they are computed in
    reuses_teacher = not has_batch_norm(teacher)
    for it, parts in run.steps(epoch):
        # schedules are functions of the step
        lr = warmup_cosine(
            it,
            base=config.peak_lr,
            final=optim.min_lr,
            total_steps=run.total_steps,
            warmup_steps=optim.warmup_epochs * run.steps_per_epoch,
        )
        wd = warmup_cosine(it, base=optim.weight_decay, final=optim.weight_decay_end, total_steps=run.total_steps)
        momentum = warmup_cosine(it, base=config.model.momentum_teacher, final=1.0, total_steps=run.total_steps)
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = lr
            group["weight_decay"] = wd if i == 0 else 0.0  # only the first group is regularised

        optimizer.zero_grad(set_to_none=True)
        step_loss, step_rescue = torch.zeros(2, device=precision.device)
        kept = None
        for number, part in enumerate(parts, start=1):
            crops = [normalize(pixels) for pixels in part.to(precision.device, non_blocking=True).pixels]
            teacher_output = None
            with precision.autocast():
                if selector.acts_on(it):  # hvp: train on the hardest combination of the sampled crops
                    with run.selecting.running():
                        with selector.scoring(student, teacher):
                            losses, teacher_logits = pair_losses(student, teacher, crops, dino_loss, epoch)
                        kept = selector.keep(crops, losses, it)
                        crops = kept.views
                        if reuses_teacher:
                            teacher_output = teacher_output_of(kept, teacher_logits)
                else:
                    crops = selector.first(crops)
                views = [crop.flatten(0, 1) for crop in crops]  # [2 B, ...] and [local B, ...]
                if teacher_output is None:
                    with torch.no_grad():
                        teacher_output, _ = teacher(views[:1])  # [2 B, K]
                with averaging(model, on=number == num_parts):
                    student_output, features = model(views)  # [(2 + local) B, K]; of the global crops [2 B, .]
                loss = dino_loss(student_output, teacher_output, epoch) / num_parts
                step_loss += loss.detach()
                if rescuer.enabled:  # rescue: pull strong views of the easiest images to their common ones
                    rescued = rescuer.loss(features, part) / num_parts
                    step_rescue += rescued.detach()
                    loss = loss + rescued
            precision.backward(loss)
            dino_loss.center_step(teacher_output)

        precision.unscale(optimizer)
        # before a loss or gradient that is not finite reaches the weights
        loss_value = run.check(step_loss + step_rescue, optimizer, lr=lr, **precision.statistics())
        if optim.clip_grad:
            clip_gradients(student.parameters(), optim.clip_grad, by=optim.clip_by)
        if epoch < optim.freeze_last_layer:
            for parameter in last_layer:
                parameter.grad = None
        precision.step(optimizer)
        update_ema(teacher.parameters(), student.parameters(), momentum)
        dino_loss.update_center()

        statistics = precision.statistics() | (
            {"spread": feature_spread(features.projection), **selector.statistics(kept), **rescuer.statistics()}
            if run.row_due
            else {}
        )
        run.record(loss_value, lr=lr, weight_decay=wd, momentum=momentum, **statistics)
        uniform = math.log(config.model.out_dim)
        run.collapse.see(
            it,
            abs(step_loss.item() - uniform) < 1e-3,
            f"for {run.collapse.steps} steps the loss has been ln(out_dim) = {uniform:.3f}: the outputs are uniform. "
            "Lower the learning rate or the teacher temperature, or start selecting later (selection.start)",
        )


def teacher_output_of(kept: Selection, teacher_logits: Tensor) -> Tensor:
    """hvp: the teacher's logits of the kept global crops, [2 B, K], out of those of all candidates, [G, B, K]."""
    images = torch.arange(len(kept.index), device=teacher_logits.device)
    return teacher_logits[kept.index[:, :2].T, images].flatten(0, 1)
