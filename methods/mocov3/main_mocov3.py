"""MoCo v3, with hard views and rescued easy samples: the trainer.

Shaped like the upstream's main_moco.py; `# hvp:` and `# rescue:` mark what is not in it. With
`selection.hard_views: none` and `--no-rescue` none of that runs.

    # B images of this process, M of all processes, V candidate views (2 without hard views), D projection dim

Source: facebookresearch/moco-v3 main_moco.py; HVP Algorithm 1.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hvp.common.networks.resnet import CONVNETS, ConvNet
from hvp.common.training.collapse import feature_spread
from hvp.common.training.distributed import averaging, data_parallel, synchronised, unwrapped
from hvp.common.training.optimizers import build_optimizer
from hvp.common.training.precision import Precision
from hvp.common.training.rescuing import Rescuer
from hvp.common.training.run import Run
from hvp.common.training.schedules import cosine
from hvp.common.training.selecting import ViewSelector
from hvp.common.training.session import RunOptions, session
from hvp.common.views.normalize import normalize
from hvp.methods.mocov3.builder import MoCo, MoCo_ResNet, MoCo_ViT
from hvp.methods.mocov3.config import MoCoConfig
from hvp.methods.mocov3.contrastive_loss import contrastive_loss
from hvp.methods.mocov3.score import pair_losses
from hvp.methods.mocov3.vits import VITS, VisionTransformerMoCo


def train_mocov3(config: MoCoConfig, out: Path, **options: Unpack[RunOptions]) -> Path:
    """Pretrains an encoder, in one process or as one of those that a launcher started.

    Args:
        config: what to do.
        out: the run's folder.
        options: as in RunOptions.

    Returns:
        The last checkpoint. `model` in it has the upstream's state-dict keys.

    Raises:
        UserError: something that the caller can mend, before the first step where it can be known by then.
        Stopped: a signal asked to stop.
    """
    with session(config, out, **options) as s:
        with s.world.agreeing():
            moco = synchronised(build_model(config, s.device), s.world, s.device)
            optimizer = build_optimizer(config.optim.optimizer, parameter_groups(moco, config.optim.weight_decay))
            rescuer = s.rescuer(moco)
        with s.run("mocov3", {"model": moco, "optimizer": optimizer}) as run:
            model = data_parallel(moco, s.world, s.device)
            for epoch in run.epochs:
                train_one_epoch(model, optimizer, s.precision, rescuer, run, epoch, config)
            return run.last_checkpoint


def build_encoder(config: MoCoConfig) -> ConvNet | VisionTransformerMoCo:
    """The encoder, with fresh weights and no projector."""
    model = config.model
    if model.arch in VITS:
        return VITS[model.arch](img_size=config.views.crop_size, stop_grad_conv1=model.stop_grad_conv1)
    return CONVNETS[model.arch](zero_init_residual=True)


def build_model(config: MoCoConfig, device: torch.device) -> MoCo:
    """Base encoder, momentum encoder and predictor, with fresh weights, those of the encoders equal."""
    encoder, dim, mlp_dim = build_encoder(config), config.model.dim, config.model.mlp_dim
    moco: MoCo
    if isinstance(encoder, VisionTransformerMoCo):
        moco = MoCo_ViT(encoder, dim, mlp_dim)
    else:
        moco = MoCo_ResNet(encoder, dim, mlp_dim)
    return moco.to(device)


def build_modules(config: MoCoConfig, device: torch.device) -> Sequence[nn.Module]:
    """What a checkpoint holds: the model."""
    return (build_model(config, device),)


def parameter_groups(model: MoCo, weight_decay: float) -> list[dict[str, Any]]:
    """Everything that is trained, in one group: AdamW decays all of it, LARS spares what has one dimension."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": weight_decay}]


def adjust_learning_rate(step: int, peak_lr: float, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of a step, counted from 0: a line from 0 to `peak_lr`, then half a cosine to 0."""
    if step < warmup_steps:
        return peak_lr * step / warmup_steps
    return cosine(step - warmup_steps, base=peak_lr, final=0.0, total_steps=total_steps - warmup_steps)


def adjust_moco_momentum(step: int, momentum: float, total_steps: int) -> float:
    """The momentum of a step, counted from 0: half a cosine from `momentum` to 1."""
    return cosine(step, base=momentum, final=1.0, total_steps=total_steps)


def train_one_epoch(
    model: MoCo | DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    rescuer: Rescuer,
    run: Run,
    epoch: int,
    config: MoCoConfig,
) -> None:
    """The steps of one epoch that are not done yet. `model` is as `data_parallel()` gave it back."""
    moco: MoCo = unwrapped(model)
    temperature, num_parts = config.loss.temperature, config.train.accumulate
    selector = ViewSelector(config, run.total_steps, run.world.rank)
    slots = config.combination_slots()
    warmup_steps = config.optim.warmup_epochs * run.steps_per_epoch
    chance = 4 * temperature * math.log(config.train.batch_size // num_parts)  # all M keys alike
    for it, parts in run.steps(epoch):
        lr = adjust_learning_rate(it, config.peak_lr, warmup_steps, run.total_steps)
        momentum = config.model.momentum
        if config.model.momentum_cosine:
            momentum = adjust_moco_momentum(it, momentum, run.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        optimizer.zero_grad(set_to_none=True)
        step_loss, step_rescue = torch.zeros(2, device=precision.device)
        kept = None
        for number, part in enumerate(parts, start=1):
            views = [normalize(pixels) for pixels in part.to(precision.device, non_blocking=True).pixels]  # [V, B, ...]
            with precision.autocast():
                if selector.acts_on(it):  # hvp: train on the hardest pair of the sampled views
                    with run.selecting.running():
                        with selector.scoring(moco):
                            losses = pair_losses(moco, views, slots, temperature, run.world)
                        kept = selector.keep(views, losses, it)
                        views = kept.views
                else:
                    views = selector.first(views)
                x1, x2 = views[0]  # each [B, 3, H, W]
                with averaging(model, on=number == num_parts):
                    out = model(x1, x2, momentum if number == 1 else None)  # the momentum encoder moves once a step
                loss = contrastive_loss(out.q1, out.k2, temperature, run.world)
                loss = (loss + contrastive_loss(out.q2, out.k1, temperature, run.world)) / num_parts
                step_loss += loss.detach()
                if rescuer.enabled:  # rescue: pull strong views of the easiest images to their common ones
                    rescued = rescuer.loss(out.features, part) / num_parts
                    step_rescue += rescued.detach()
                    loss = loss + rescued
            precision.backward(loss)

        precision.unscale(optimizer)
        # before a loss or gradient that is not finite reaches the weights
        loss_value = run.check(step_loss + step_rescue, optimizer, lr=lr, **precision.statistics())
        precision.step(optimizer)

        spread = feature_spread(torch.cat((out.q1, out.q2)))
        statistics = precision.statistics() | (
            {**selector.statistics(kept), **rescuer.statistics()} if run.row_due else {}
        )
        run.record(loss_value, lr=lr, momentum=momentum, spread=spread, **statistics)
        run.collapse.see(
            it,
            abs(step_loss.item() - chance) < 4e-3 * temperature or spread < 1e-2,
            f"for {run.collapse.steps} steps the loss has been that of chance, {chance:.3f}, or the queries one point. "
            "Lower the learning rate, or warm it up for longer",
        )
