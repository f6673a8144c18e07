"""DINOv2, with hard views and Rescue: the trainer.

Shaped like the upstream's train/train.py and train/ssl_meta_arch.py; `# hvp:` and `# rescue:` mark what is not in it.
With `selection.hard_views: none` and without `rescue.enabled` none of that runs.

    # B images, G global and V = G + M candidate crops (G = 2, V = 2 + M without hard views), N patches of a global crop
    # R of the patches are masked; K and K2 prototypes ([CLS] and patches), D embedding dim, b bottleneck dim

Source: facebookresearch/dinov2 dinov2/train; HVP Algorithm 1.
"""

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvp.common.errors import UserError
from hvp.common.networks.heads import DINOHead
from hvp.common.networks.register_vision_transformer import RegisterVisionTransformer, build_register_vit
from hvp.common.training.collapse import feature_spread
from hvp.common.training.distributed import World, assert_equal_weights
from hvp.common.training.ema import update_ema
from hvp.common.training.optimizers import build_optimizer
from hvp.common.training.session import RunOptions, session
from hvp.common.training.sharding import Whole, is_sharded, local, release, shard
from hvp.common.training.step import Step
from hvp.methods.dinov2.config import DINOv2Config, HeadConfig
from hvp.methods.dinov2.losses import DINOv2Loss
from hvp.methods.dinov2.masking import MaskSampler
from hvp.methods.dinov2.networks import Network
from hvp.methods.dinov2.param_groups import parameter_groups
from hvp.methods.dinov2.schedules import Schedules
from hvp.methods.dinov2.score import pair_losses

UNIFORM = (
    "for {steps} steps the [CLS] loss has been ln(head_n_prototypes) = {loss:.3f}: the outputs are uniform. Lower the "
    "learning rate or the teacher temperature"
)


def train_dinov2(config: DINOv2Config, out: Path, **options: Unpack[RunOptions]) -> Path:
    """Pretrain an encoder, in one process or as one of several that a launcher started.

    Args:
        config: the resolved configuration.
        out: the run's folder.
        options: as in RunOptions.

    Returns:
        The last checkpoint. `student`, `teacher` and `dinov2_loss` in it have the upstream's state-dict keys.

    Raises:
        UserError: an error that the user can fix, before the first step where possible.
        Stopped: a signal asked to stop.
    """
    with session(config, out, masks=build_masks(config), **options) as s:
        with s.world.agreeing():
            check_lengths(config, s.loader.steps_per_epoch, s.world.size)
        parts = s.build(partial(build, dtype=s.precision.dtype))
        saved = {name: Whole(part, s.world) if is_sharded(part) else part for name, part in parts._asdict().items()}
        with s.run("dinov2", saved, trained=parts.student) as run:
            for epoch in run.epochs:
                train_one_epoch(run, parts, epoch, config)
            return run.last_checkpoint


def check_lengths(config: DINOv2Config, steps_per_epoch: int, num_processes: int) -> None:
    """Check what depends on the length of an epoch and the number of processes.

    Raises:
        UserError: the warm-up is longer than the run, or KoLeo has no second image to compare with.
    """
    train = config.train
    Schedules(config, train.epochs * steps_per_epoch, steps_per_epoch)
    if config.dino.koleo_loss_weight and train.batch_size // (num_processes * train.accumulate) < 2:
        raise UserError(
            f"train.batch_size = {train.batch_size} leaves one image to each of {num_processes} processes and "
            f"{train.accumulate} parts, but KoLeo compares the images of a part.\n"
            "    Set a larger batch, fewer processes or parts, or dino.koleo_loss_weight to 0."
        )


def build_masks(config: DINOv2Config) -> MaskSampler:
    """Build the sampler of the masks of global candidates."""
    side = config.views.global_crops_size // config.model.patch_size
    return MaskSampler(
        grid=(side, side),
        num_candidates=config.view_slots()[0].candidates,
        probability=config.ibot.mask_sample_probability,
        ratio=config.ibot.mask_ratio_min_max,
        seed=config.train.seed,
    )


def build_encoder(config: DINOv2Config, *, drop_path_rate: float = 0.0) -> RegisterVisionTransformer:
    """Build the backbone, with fresh weights."""
    model = config.model
    return build_register_vit(
        model.arch,
        patch_size=model.patch_size,
        img_size=config.views.global_crops_size,
        drop_path_rate=drop_path_rate,
        drop_path_uniform=model.drop_path_uniform,
        init_values=model.layerscale,
        swiglu=model.ffn_layer == "swiglu",
        num_registers=model.num_register_tokens,
    )


def build_networks(config: DINOv2Config, device: torch.device) -> tuple[Network, Network]:
    """Build student and teacher with the same fresh weights. The teacher has no stochastic depth and no gradient."""

    def build(drop_path_rate: float) -> Network:
        backbone = build_encoder(config, drop_path_rate=drop_path_rate)

        def head(sizes: HeadConfig) -> DINOHead:
            return DINOHead(
                backbone.embed_dim,
                sizes.head_n_prototypes,
                norm_last_layer=False,
                nlayers=sizes.head_nlayers,
                hidden_dim=sizes.head_hidden_dim,
                bottleneck_dim=sizes.head_bottleneck_dim,
            )

        return Network(backbone, head(config.dino), head(config.ibot) if config.ibot.separate_head else None).to(device)

    student, teacher = build(config.model.drop_path_rate), build(0.0)
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False).eval()


def build_groups(config: DINOv2Config, student: Network) -> list[dict[str, object]]:
    """Group the student's parameters by their learning rates and weight decays."""
    optim = config.optim
    return parameter_groups(
        student, layerwise_decay=optim.layerwise_decay, patch_embed_lr_mult=optim.patch_embed_lr_mult
    )


def build_loss(config: DINOv2Config) -> DINOv2Loss:
    """Build the objective, with its centres."""
    return DINOv2Loss(
        config.dino.head_n_prototypes,
        config.patch_head.head_n_prototypes,
        2 + config.views.local_crops_number,
        centering=config.teacher.centering,
        dino_weight=config.dino.loss_weight,
        koleo_weight=config.dino.koleo_loss_weight,
        ibot_weight=config.ibot.loss_weight,
        student_temp=config.teacher.student_temp,
        center_momentum=config.teacher.center_momentum,
    )


class Parts(NamedTuple):
    """State that training changes, under its names in a checkpoint."""

    student: Network
    teacher: Network
    optimizer: Optimizer
    dinov2_loss: DINOv2Loss


def build(config: DINOv2Config, world: World, device: torch.device, dtype: torch.dtype | None = None) -> Parts:
    """Build the networks, sharded over the processes if the configuration asks for it, objective and optimiser.

    Args:
        config: the resolved configuration.
        world: the processes.
        device: device of the networks.
        dtype: number format of autocast, for gathered parameters; None for float32.
    """
    student, teacher = build_networks(config, device)
    dinov2_loss = build_loss(config).to(device)
    if config.train.sharding == "fsdp" and world.size > 1:
        assert_equal_weights(student, world)
        for network in (student, teacher):
            shard(network.shards(), world, device, dtype)
    optimizer = build_optimizer(config.optim.optimizer, build_groups(config, student))
    return Parts(student, teacher, optimizer, dinov2_loss)


def train_one_epoch(run: Step, parts: Parts, epoch: int, config: DINOv2Config) -> None:
    """Train the steps of one epoch that are not done yet."""
    student, teacher, optimizer, dinov2_loss = parts
    schedules = Schedules(config, run.total_steps, run.steps_per_epoch)
    for it, batch in run.steps(epoch):
        lr, last_layer_lr, wd = schedules.lr(it), schedules.last_layer_lr(it), schedules.weight_decay(it)
        momentum, temp = schedules.momentum(it), schedules.teacher_temp(it)
        for group in optimizer.param_groups:
            group["lr"] = (last_layer_lr if group["last_layer"] else lr) * group["lr_multiplier"]
            group["weight_decay"] = wd * group["wd_multiplier"]

        optimizer.zero_grad(set_to_none=True)
        for part in batch:
            crops, masks = run.views(part), run.masks(part)  # [G, B, ...] and [V - G, B, ...]; masks [G, B, N]
            with run.precision.autocast():
                # hvp: train on the hardest combination of the sampled crops, each with its own mask
                score = partial(pair_losses, student, teacher, masks=masks, dinov2_loss=dinov2_loss, teacher_temp=temp)
                crops = run.hard_views(crops, score, student)
                views, masks = [crop.flatten(0, 1) for crop in crops], run.kept.of(masks)  # [2 B, ...], ...; [2 B, N]
                # hvp: the teacher's heads see every token alone, so its outputs are what they would be again
                teacher_cls, teacher_patch = teacher_logits(teacher, views[0], masks, run.kept.outputs)
                outputs = run.model(views, masks)
                student_logits, backbone = (outputs.cls, outputs.patch), outputs.features.backbone
                losses = dinov2_loss(*student_logits, backbone, teacher_cls, teacher_patch, masks, temp)
                # rescue: pull strong views of the easiest images to their common ones
                loss = losses.loss + run.rescue(outputs.features, part)
            _, cls_global, cls_local, koleo, patch = losses
            run.backward(loss, loss_global=cls_global, loss_local=cls_local, loss_koleo=koleo, loss_patch=patch)
            dinov2_loss.center_step(teacher_cls, teacher_patch)

        release(student)
        release(teacher)
        run.unscale(optimizer)
        if config.optim.clip_grad:
            for module in student.children():  # backbone and heads, each by its own norm
                nn.utils.clip_grad_norm_(module.parameters(), config.optim.clip_grad)
        run.optimize(optimizer)
        update_ema(local(teacher.parameters()), local(student.parameters()), momentum)
        dinov2_loss.update_center()

        spread = partial(feature_spread, outputs.features.projection)
        run.record(lr=lr, weight_decay=wd, momentum=momentum, teacher_temp=temp, spread=spread)
        uniform, weight = math.log(config.dino.head_n_prototypes), config.dino.loss_weight
        loss_cls = run.loss_part("loss_global") + run.loss_part("loss_local")
        collapsed = abs(loss_cls - weight * uniform) < 1e-3 * weight
        run.collapse.see(it, collapsed, UNIFORM.format(steps=run.collapse.steps, loss=uniform))


@torch.no_grad()
def teacher_logits(
    teacher: Network, views: Tensor, masks: Tensor, embedding: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Compute the teacher's logits: of the [CLS] tokens, [2 B, K], and of the masked patches, [R, K2].

    Args:
        teacher: in evaluation mode.
        views: the two global views, [2 B, 3, H, W].
        masks: [2 B, N] bool; the teacher sees these patches.
        embedding: hvp: bottlenecks of [CLS] tokens [2 B, b] and of patches [2 B, N, b], if a selection computed them.
    """
    if embedding is None:
        cls, patches = teacher.embed_teacher(views, masks)
    else:
        cls, patches = embedding[0], embedding[1][masks]
    return teacher.dino_head.last_layer(cls), teacher.patch_head.last_layer(patches)
