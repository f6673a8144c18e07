"""MoCo v3, with hard views and rescued easy samples: the trainer.

Shaped like the upstream's main_moco.py; `# hvp:` and `# rescue:` mark what is not in it. With
`selection.hard_views: none` and `--no-rescue` none of that runs.

    # B images of this process, M of all processes, V candidate views (2 without hard views), D projection dim

Source: facebookresearch/moco-v3 main_moco.py; HVP Algorithm 1.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch.optim import Optimizer

from hvp.common.networks.resnet import CONVNETS, ConvNet
from hvp.common.training.collapse import feature_spread
from hvp.common.training.distributed import World, synchronised
from hvp.common.training.optimizers import build_optimizer
from hvp.common.training.schedules import cosine
from hvp.common.training.session import RunOptions, session
from hvp.common.training.step import Step
from hvp.methods.mocov3.builder import MoCo, MoCo_ResNet, MoCo_ViT
from hvp.methods.mocov3.config import MoCoConfig
from hvp.methods.mocov3.contrastive_loss import contrastive_loss
from hvp.methods.mocov3.score import pair_losses
from hvp.methods.mocov3.vits import VITS, VisionTransformerMoCo


def train_mocov3(config: MoCoConfig, out: Path, **options: Unpack[RunOptions]) -> Path:
    """Pretrain an encoder, in one process or as one of several that a launcher started.

    Args:
        config: the resolved configuration.
        out: the run's folder.
        options: as in RunOptions.

    Returns:
        The last checkpoint. `model` in it has the upstream's state-dict keys.

    Raises:
        UserError: an error that the user can fix, before the first step where possible.
        Stopped: a signal asked to stop.
    """
    with session(config, out, **options) as s:
        parts = s.build(build)
        with s.run("mocov3", parts, trained=parts.model) as run:
            for epoch in run.epochs:
                train_one_epoch(run, parts, epoch, config)
            return run.last_checkpoint


def build_encoder(config: MoCoConfig) -> ConvNet | VisionTransformerMoCo:
    """Build the encoder, with fresh weights and no projector."""
    model = config.model
    if model.arch in VITS:
        return VITS[model.arch](img_size=config.views.crop_size, stop_grad_conv1=model.stop_grad_conv1)
    return CONVNETS[model.arch](zero_init_residual=True)


def build_model(config: MoCoConfig, device: torch.device) -> MoCo:
    """Build base encoder, momentum encoder and predictor. Both encoders start with the same fresh weights."""
    encoder, dim, mlp_dim = build_encoder(config), config.model.dim, config.model.mlp_dim
    moco: MoCo
    if isinstance(encoder, VisionTransformerMoCo):
        moco = MoCo_ViT(encoder, dim, mlp_dim)
    else:
        moco = MoCo_ResNet(encoder, dim, mlp_dim)
    return moco.to(device)


class Parts(NamedTuple):
    """State that training changes, under its names in a checkpoint."""

    model: MoCo
    optimizer: Optimizer


def build(config: MoCoConfig, world: World, device: torch.device) -> Parts:
    """Build the networks and their optimiser."""
    model = synchronised(build_model(config, device), world, device)
    return Parts(model, build_optimizer(config.optim.optimizer, parameter_groups(model, config.optim.weight_decay)))


def parameter_groups(model: MoCo, weight_decay: float) -> list[dict[str, Any]]:
    """Put all trained parameters into one group: AdamW decays all of them, LARS spares those with one dimension."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": weight_decay}]


def adjust_learning_rate(step: int, peak_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0: linear from 0 to `peak_lr`, then half a cosine to 0."""
    if step < warmup_steps:
        return peak_lr * step / warmup_steps
    return cosine(step - warmup_steps, base=peak_lr, final=0.0, total_steps=total_steps - warmup_steps)


def adjust_moco_momentum(step: int, momentum: float, total_steps: int) -> float:
    """Return the momentum of a step, counted from 0: half a cosine from `momentum` to 1."""
    return cosine(step, base=momentum, final=1.0, total_steps=total_steps)


def train_one_epoch(run: Step, parts: Parts, epoch: int, config: MoCoConfig) -> None:
    """Train the steps of one epoch that are not done yet."""
    moco, optimizer = parts
    temperature, slots = config.loss.temperature, config.combination_slots()
    warmup_steps = config.optim.warmup_epochs * run.steps_per_epoch
    for it, batch in run.steps(epoch):
        lr = adjust_learning_rate(it, config.peak_lr, warmup_steps, run.total_steps)
        momentum = config.model.momentum
        if config.model.momentum_cosine:
            momentum = adjust_moco_momentum(it, momentum, run.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        optimizer.zero_grad(set_to_none=True)
        for number, part in enumerate(batch):
            views = run.views(part)  # [V, B, 3, H, W], one resolution
            with run.precision.autocast():
                # hvp: train on the hardest pair of the sampled views
                views = run.hard_views(views, lambda v: pair_losses(moco, v, slots, temperature, run.world), moco)
                out = run.model(*views[0], momentum if number == 0 else None)  # the momentum encoder moves once a step
                loss = contrastive_loss(out.q1, out.k2, temperature, run.world)
                loss = loss + contrastive_loss(out.q2, out.k1, temperature, run.world)
                rescued = run.rescue(out.features, part)  # rescue: pull strong views of the easiest images to common
            run.backward(loss, rescued)
        run.optimize(optimizer)

        spread = feature_spread(torch.cat((out.q1, out.q2)))
        run.record(lr=lr, momentum=momentum, spread=spread)
        chance = 4 * temperature * math.log(config.train.batch_size // config.train.accumulate)  # all M keys alike
        run.collapse.see(
            it,
            abs(run.objective - chance) < 4e-3 * temperature or spread < 1e-2,
            f"for {run.collapse.steps} steps the loss has been at chance level, {chance:.3f}, or all queries have been "
            "one point. Lower the learning rate, or warm it up for longer",
        )
