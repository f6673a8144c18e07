"""iBOT, with hard views: the trainer.

Shaped like the upstream's main_ibot.py; `# hvp:` and `# rescue:` mark what is not in it. With `--hard-views none`
and `--no-rescue` none of that runs.

    # B images, G global and V = G + M candidate crops (G = 2, V = 2 + M without hard views), N patches of a global crop
    # R of the patches are masked; K and K2 prototypes ([CLS] and patches), b bottleneck dim

Source: bytedance/ibot main_ibot.py; HVP Algorithm 1.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hvp.common.networks.vision_transformer import VisionTransformer, build_vit
from hvp.common.training.collapse import feature_spread
from hvp.common.training.distributed import averaging, data_parallel, synchronised, unwrapped
from hvp.common.training.ema import update_ema
from hvp.common.training.optimizers import build_optimizer, clip_gradients, split_weight_decay
from hvp.common.training.precision import Precision
from hvp.common.training.rescuing import Rescuer
from hvp.common.training.run import Run, Stateful
from hvp.common.training.schedules import warmup_cosine
from hvp.common.training.selecting import ViewSelector, of_kept
from hvp.common.training.session import RunOptions, session
from hvp.common.views.normalize import normalize
from hvp.methods.ibot.config import IbotConfig
from hvp.methods.ibot.head import MultiCropWrapper, iBOTHead
from hvp.methods.ibot.ibot_loss import iBOTLoss
from hvp.methods.ibot.masking import MaskSampler
from hvp.methods.ibot.score import pair_losses


def train_ibot(config: IbotConfig, out: Path, **options: Unpack[RunOptions]) -> Path:
    """Pretrains an encoder, in one process or as one of those that a launcher started.

    Args:
        config: what to do.
        out: the run's folder.
        options: as in RunOptions.

    Returns:
        The last checkpoint. `student`, `teacher` and `ibot_loss` in it have the upstream's state-dict keys.

    Raises:
        UserError: something that the caller can mend, before the first step where it can be known by then.
        Stopped: a signal asked to stop.
    """
    with session(config, out, masks=build_masks(config), **options) as s:
        with s.world.agreeing():
            student, teacher = (synchronised(net, s.world, s.device) for net in build_networks(config, s.device))
            ibot_loss = build_loss(config).to(s.device)
            optimizer = build_optimizer(config.optim.optimizer, split_weight_decay(student.named_parameters()))
            rescuer = s.rescuer(student)
        parts: dict[str, Stateful] = {
            "student": student,
            "teacher": teacher,
            "ibot_loss": ibot_loss,
            "optimizer": optimizer,
        }
        with s.run("ibot", parts) as run:
            model = data_parallel(student, s.world, s.device)
            for epoch in run.epochs:
                train_one_epoch(model, teacher, ibot_loss, optimizer, s.precision, rescuer, run, epoch, config)
            return run.last_checkpoint


def build_masks(config: IbotConfig) -> MaskSampler:
    """What draws the masks of the global candidates."""
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
    """The backbone, with fresh weights."""
    return build_vit(
        config.model.arch,
        patch_size=config.model.patch_size,
        img_size=config.views.global_crops_size,
        drop_path_rate=drop_path_rate,
        mask_token=mask_token,
    )


def build_networks(config: IbotConfig, device: torch.device) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """Student and teacher, which start with the same weights.

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
    """The objective, with its centres."""
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


def build_modules(config: IbotConfig, device: torch.device) -> Sequence[nn.Module]:
    """Student, teacher and loss: what a checkpoint holds."""
    return (*build_networks(config, device), build_loss(config).to(device))


def train_one_epoch(
    model: MultiCropWrapper | DistributedDataParallel,
    teacher: MultiCropWrapper,
    ibot_loss: iBOTLoss,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    rescuer: Rescuer,
    run: Run,
    epoch: int,
    config: IbotConfig,
) -> None:
    """The steps of one epoch that are not done yet. `model` is the student, as `data_parallel()` gave it back."""
    student: MultiCropWrapper = unwrapped(model)
    optim, num_parts = config.optim, config.train.accumulate
    weights = dict(student.named_parameters())
    averaged = [weights[name] for name, _ in teacher.named_parameters()]  # all but the mask token
    last_layers = [weight for name, weight in weights.items() if "last_layer" in name]  # also last_layer2
    uniform = math.log(config.model.out_dim)
    selector = ViewSelector(config, run.total_steps, run.world.rank)
    # hvp: with batch norm the outputs of the kept crops depend on the batch they are computed in
    reuses_teacher = not teacher.has_batch_norm
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
        step_losses = torch.zeros(3, device=precision.device)  # all together, [CLS] part, patch part
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
                        with selector.scoring(student, teacher):
                            pairs, candidates = pair_losses(student, teacher, crops, masks, ibot_loss, epoch)
                        kept = selector.keep(crops, pairs, it)
                        crops, masks = kept.views, of_kept(kept, masks)  # a crop keeps its mask
                        if reuses_teacher:
                            embedding = of_kept(kept, candidates[0]), of_kept(kept, candidates[1])
                else:
                    crops, masks = selector.first(crops), masks[selector.first_views[:2]].flatten(0, 1)
                views = [crop.flatten(0, 1) for crop in crops]  # [2 B, ...] and [local B, ...]; masks are [2 B, N]
                if embedding is None:
                    with torch.no_grad():
                        embedding = teacher.embed(views[0])  # [2 B, b] and [2 B, N, b]
                teacher_cls, teacher_patch, teacher_patch_mean = teacher_outputs(teacher.head, *embedding, masks)
                with averaging(model, on=number == num_parts):
                    # [(2 + local) B, K] and [R, K2]; of the global crops [2 B, .]
                    student_cls, student_patch, features = model(views, masks)
                losses = ibot_loss(student_cls, student_patch, teacher_cls, teacher_patch, masks, epoch)
                loss = losses.loss
                if rescuer.enabled:  # rescue: pull strong views of the easiest images to their common ones
                    loss = loss + rescuer.loss(features, part)
            precision.backward(loss / num_parts)
            ibot_loss.center_step(teacher_cls, teacher_patch_mean)
            step_losses += torch.stack((loss, *losses[1:])).detach() / num_parts

        precision.unscale(optimizer)
        # before a loss or gradient that is not finite reaches the weights
        loss_value = run.check(step_losses[0], optimizer, lr=lr, **precision.statistics())
        if optim.clip_grad:
            clip_gradients(student.parameters(), optim.clip_grad)
        if epoch < optim.freeze_last_layer:
            for parameter in last_layers:
                parameter.grad = None
        precision.step(optimizer)
        update_ema(teacher.parameters(), averaged, momentum)
        ibot_loss.update_center()

        _, loss_cls, loss_patch = step_losses.tolist()
        statistics = precision.statistics() | (
            {"spread": feature_spread(features.projection), **selector.statistics(kept), **rescuer.statistics()}
            if run.row_due
            else {}
        )
        run.record(
            loss_value,
            loss_cls=loss_cls,
            loss_patch=loss_patch,
            lr=lr,
            weight_decay=wd,
            momentum=momentum,
            **statistics,
        )
        run.collapse.see(
            it,
            abs(loss_cls - config.loss.lambda1 * uniform) < 1e-3 * config.loss.lambda1,
            f"for {run.collapse.steps} steps the [CLS] loss has been ln(out_dim) = {uniform:.3f}: the outputs are "
            "uniform. Lower the learning rate or the teacher temperature, or start selecting later (selection.start)",
        )


@torch.no_grad()
def teacher_outputs(head: iBOTHead, cls: Tensor, patches: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss and its centres need of the teacher.

    The prototypes are linear, so the mean of the logits over all patches, which the centre follows, is the logits of
    the mean, and no other logits are made than those of the masked patches.

    Args:
        head: the teacher's.
        cls, patches: the bottleneck of [CLS] tokens, [2 B, b], and of all patches, [2 B, N, b].
        masks: [2 B, N] bool.

    Returns:
        Logits of [CLS] [2 B, K], of the masked patches [R, K2], and their mean over all patches of a view [2 B, K2].
    """
    return head.last_layer(cls), head.last_layer2(patches[masks]), head.last_layer2(patches.mean(dim=1))
