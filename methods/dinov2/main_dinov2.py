"""DINOv2, with hard views and Rescue: the trainer.

Shaped like the upstream's train/train.py and train/ssl_meta_arch.py; `# hvp:` and `# rescue:` mark what is not in it.
With `selection.hard_views: none` and without `rescue.enabled` none of that runs.

    # B images, G global and V = G + M candidate crops (G = 2, V = 2 + M without hard views), N patches of a global crop
    # R of the patches are masked; K and K2 prototypes ([CLS] and patches), D embedding dim, b bottleneck dim

Source: facebookresearch/dinov2 dinov2/train; HVP Algorithm 1.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hvp.common.errors import UserError
from hvp.common.networks.heads import DINOHead
from hvp.common.networks.register_vision_transformer import RegisterVisionTransformer, build_register_vit
from hvp.common.training.collapse import feature_spread
from hvp.common.training.distributed import assert_equal_weights, averaging, data_parallel, unwrapped
from hvp.common.training.ema import update_ema
from hvp.common.training.optimizers import build_optimizer
from hvp.common.training.precision import Precision
from hvp.common.training.rescuing import Rescuer
from hvp.common.training.run import Run, Stateful
from hvp.common.training.selecting import ViewSelector, of_kept
from hvp.common.training.session import RunOptions, session
from hvp.common.training.sharding import Whole, local, release, shard
from hvp.common.views.normalize import normalize
from hvp.methods.dinov2.config import DINOv2Config, HeadConfig
from hvp.methods.dinov2.losses import DINOv2Loss
from hvp.methods.dinov2.masking import MaskSampler
from hvp.methods.dinov2.networks import Network
from hvp.methods.dinov2.param_groups import parameter_groups
from hvp.methods.dinov2.schedules import Schedules
from hvp.methods.dinov2.score import pair_losses


def train_dinov2(config: DINOv2Config, out: Path, **options: Unpack[RunOptions]) -> Path:
    """Pretrains an encoder, in one process or as one of those that a launcher started.

    Args:
        config: what to do.
        out: the run's folder.
        options: as in RunOptions.

    Returns:
        The last checkpoint. `student`, `teacher` and `dinov2_loss` in it have the upstream's state-dict keys.

    Raises:
        UserError: something that the caller can mend, before the first step where it can be known by then.
        Stopped: a signal asked to stop.
    """
    with session(config, out, masks=build_masks(config), **options) as s:
        with s.world.agreeing():
            check_lengths(config, s.loader.steps_per_epoch, s.world.size)
            student, teacher = build_networks(config, s.device)
            dinov2_loss = build_loss(config).to(s.device)
            rescuer = s.rescuer(student)
        sharded = config.train.sharding == "fsdp" and s.world.size > 1
        if sharded:
            assert_equal_weights(student, s.world)
            for network in (student, teacher):
                shard(network.shards(), s.world, s.device, s.precision.dtype)
        optimizer = build_optimizer(config.optim.optimizer, build_groups(config, student))
        parts: dict[str, Stateful] = {"student": student, "teacher": teacher, "optimizer": optimizer}
        if sharded:
            parts = {name: Whole(part, s.world) for name, part in parts.items()}
        with s.run("dinov2", {**parts, "dinov2_loss": dinov2_loss}) as run:
            model = student if sharded else data_parallel(student, s.world, s.device)
            for epoch in run.epochs:
                train_one_epoch(model, teacher, dinov2_loss, optimizer, s.precision, rescuer, run, epoch, config)
            return run.last_checkpoint


def check_lengths(config: DINOv2Config, steps_per_epoch: int, num_processes: int) -> None:
    """What only a run knows to be too short or too small.

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
    """What draws the masks of the global candidates."""
    side = config.views.global_crops_size // config.model.patch_size
    return MaskSampler(
        grid=(side, side),
        num_candidates=config.view_slots()[0].candidates,
        probability=config.ibot.mask_sample_probability,
        ratio=config.ibot.mask_ratio_min_max,
        seed=config.train.seed,
    )


def build_encoder(config: DINOv2Config, *, drop_path_rate: float = 0.0) -> RegisterVisionTransformer:
    """The backbone, with fresh weights."""
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
    """Student and teacher, which start with the same weights. The teacher has no stochastic depth and no gradient."""

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
    """The student's parameters, grouped by their rates."""
    optim = config.optim
    return parameter_groups(
        student, layerwise_decay=optim.layerwise_decay, patch_embed_lr_mult=optim.patch_embed_lr_mult
    )


def build_loss(config: DINOv2Config) -> DINOv2Loss:
    """The objective, with its centres."""
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


def build_modules(config: DINOv2Config, device: torch.device) -> Sequence[nn.Module]:
    """Student, teacher and loss: what a checkpoint holds."""
    return (*build_networks(config, device), build_loss(config).to(device))


def train_one_epoch(
    model: Network | DistributedDataParallel,
    teacher: Network,
    dinov2_loss: DINOv2Loss,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    rescuer: Rescuer,
    run: Run,
    epoch: int,
    config: DINOv2Config,
) -> None:
    """The steps of one epoch that are not done yet. `model` is the student, as `data_parallel()` gave it back."""
    student: Network = unwrapped(model)
    optim, num_parts = config.optim, config.train.accumulate
    uniform = math.log(config.dino.head_n_prototypes)
    schedules = Schedules(config, run.total_steps, run.steps_per_epoch)
    selector = ViewSelector(config, run.total_steps, run.world.rank)
    for it, parts in run.steps(epoch):
        # schedules are functions of the step
        lr, last_layer_lr, wd = schedules.lr(it), schedules.last_layer_lr(it), schedules.weight_decay(it)
        momentum, teacher_temp = schedules.momentum(it), schedules.teacher_temp(it)
        for group in optimizer.param_groups:
            group["lr"] = (last_layer_lr if group["last_layer"] else lr) * group["lr_multiplier"]
            group["weight_decay"] = wd * group["wd_multiplier"]

        optimizer.zero_grad(set_to_none=True)
        step_losses = torch.zeros(5, device=precision.device)  # as in Losses
        kept = None
        for number, part in enumerate(parts, start=1):
            batch = part.to(precision.device, non_blocking=True)
            crops = [normalize(pixels) for pixels in batch.pixels]
            assert batch.masks is not None  # build_masks() made them
            masks = batch.masks.flatten(2)  # [G, B, N]
            embedding = None
            with precision.autocast():
                if selector.acts_on(it):  # hvp: train on the hardest combination of the sampled crops
                    with run.selecting.running():
                        with selector.scoring(student):
                            pairs, (cls, patches) = pair_losses(
                                student, teacher, crops, masks, dinov2_loss, teacher_temp
                            )
                        kept = selector.keep(crops, pairs, it)
                        crops, masks = kept.views, of_kept(kept, masks)  # a crop keeps its mask
                        # the teacher's heads see every token alone, so its outputs are what they would be again
                        embedding = of_kept(kept, cls), of_kept(kept, patches)[masks]
                else:
                    crops, masks = selector.first(crops), masks[selector.first_views[:2]].flatten(0, 1)
                views = [crop.flatten(0, 1) for crop in crops]  # [2 B, ...] and [local B, ...]; masks are [2 B, N]
                teacher_cls, teacher_patch = teacher_logits(teacher, views[0], masks, embedding)
                with averaging(model, on=number == num_parts):
                    outputs = model(views, masks)
                losses = dinov2_loss(
                    outputs.cls,
                    outputs.patch,
                    outputs.features.backbone,
                    teacher_cls,
                    teacher_patch,
                    masks,
                    teacher_temp,
                )
                loss = losses.loss
                if rescuer.enabled:  # rescue: pull strong views of the easiest images to their common ones
                    loss = loss + rescuer.loss(outputs.features, part)
            precision.backward(loss / num_parts)
            dinov2_loss.center_step(teacher_cls, teacher_patch)
            step_losses += torch.stack((loss, *losses[1:])).detach() / num_parts

        release(student)
        release(teacher)
        precision.unscale(optimizer)
        # before a loss or gradient that is not finite reaches the weights
        loss_value = run.check(step_losses[0], optimizer, lr=lr, **precision.statistics())
        if optim.clip_grad:
            for module in student.children():  # backbone and heads, each by its own norm
                nn.utils.clip_grad_norm_(module.parameters(), optim.clip_grad)
        precision.step(optimizer)
        update_ema(local(teacher.parameters()), local(student.parameters()), momentum)
        dinov2_loss.update_center()

        _, loss_global, loss_local, loss_koleo, loss_patch = step_losses.tolist()
        statistics = precision.statistics() | (
            {"spread": feature_spread(outputs.features.projection), **selector.statistics(kept), **rescuer.statistics()}
            if run.row_due
            else {}
        )
        run.record(
            loss_value,
            loss_global=loss_global,
            loss_local=loss_local,
            loss_koleo=loss_koleo,
            loss_patch=loss_patch,
            lr=lr,
            weight_decay=wd,
            momentum=momentum,
            teacher_temp=teacher_temp,
            **statistics,
        )
        loss_cls = loss_global + loss_local
        run.collapse.see(
            it,
            abs(loss_cls - config.dino.loss_weight * uniform) < 1e-3 * config.dino.loss_weight,
            f"for {run.collapse.steps} steps the [CLS] loss has been ln(head_n_prototypes) = {uniform:.3f}: outputs "
            "are uniform. Lower the learning rate or the teacher temperature",
        )


@torch.no_grad()
def teacher_logits(
    teacher: Network, views: Tensor, masks: Tensor, embedding: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """What the loss and its centres need of the teacher: logits of [CLS] [2 B, K], of the masked patches [R, K2].

    Args:
        teacher: in evaluation mode.
        views: the two global views, [2 B, 3, H, W].
        masks: [2 B, N] bool; the teacher sees these patches.
        embedding: hvp: their bottlenecks, [2 B, b] and [R, b], where a selection has computed them already.
    """
    cls, patches = embedding if embedding is not None else teacher.embed_teacher(views, masks)
    return teacher.dino_head.last_layer(cls), teacher.patch_head.last_layer(patches)
