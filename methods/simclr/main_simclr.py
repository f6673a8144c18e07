"""SimCLR, with hard views: the trainer.

`# hvp:` and `# rescue:` mark every departure from the upstream. With `--hard-views none` and `--no-rescue` they do
nothing.

    # B images of this process, M of all processes, N candidate views (2 without hard views), D embedding dim

Source: google-research/simclr tf2/run.py, objective and recipe; automl/hvp, branch simclr, pretrain.py, whose names
these are; HVP Algorithm 1.
"""

import math
from pathlib import Path
from typing import NamedTuple, Unpack

import torch
from torch.optim import Optimizer

from hvp.common.networks.resnet import CONVNETS, ConvNet
from hvp.common.training.collapse import feature_spread
from hvp.common.training.distributed import World, synchronised
from hvp.common.training.optimizers import build_optimizer, split_weight_decay
from hvp.common.training.schedules import warmup_cosine
from hvp.common.training.session import RunOptions, session
from hvp.common.training.step import Step
from hvp.methods.simclr.config import SimclrConfig
from hvp.methods.simclr.model import SimCLR, SimCLRProjectionHead
from hvp.methods.simclr.nt_xent_loss import nt_xent_loss
from hvp.methods.simclr.score import pair_losses


def train_simclr(config: SimclrConfig, out: Path, **options: Unpack[RunOptions]) -> Path:
    """Pretrain an encoder, in one process or as one of several that a launcher started.

    Args:
        config: the resolved configuration.
        out: the run's folder.
        options: as in RunOptions.

    Returns:
        The last checkpoint. `model` in it has the state-dict keys of HVP's released code.

    Raises:
        UserError: an error that the user can fix, before the first step where possible.
        Stopped: a signal asked to stop.
    """
    with session(config, out, **options) as s:
        parts = s.build(build)
        with s.run("simclr", parts, trained=parts.model) as run:
            for epoch in run.epochs:
                train_one_epoch(run, parts, epoch, config)
            return run.last_checkpoint


def build_encoder(config: SimclrConfig) -> ConvNet:
    """Build the backbone, with fresh weights."""
    return CONVNETS[config.model.arch](zero_init_residual=config.model.zero_init_residual)


def build_model(config: SimclrConfig, device: torch.device) -> SimCLR:
    """Build backbone and projector, with fresh weights."""
    model = config.model
    backbone = build_encoder(config)
    projector = SimCLRProjectionHead(
        backbone.embed_dim, model.proj_hidden_dim, model.out_dim, model.num_proj_layers, model.use_bn_in_head
    )
    return SimCLR(backbone, projector).to(device)


class Parts(NamedTuple):
    """State that training changes, under its names in a checkpoint."""

    model: SimCLR
    optimizer: Optimizer


def build(config: SimclrConfig, world: World, device: torch.device) -> Parts:
    """Build the network and its optimiser."""
    model = synchronised(build_model(config, device), world, device)
    optimizer = build_optimizer(config.optim.optimizer, split_weight_decay(model.named_parameters()))
    optimizer.param_groups[0]["weight_decay"] = config.optim.weight_decay
    return Parts(model, optimizer)


def train_one_epoch(run: Step, parts: Parts, epoch: int, config: SimclrConfig) -> None:
    """Train the steps of one epoch that are not done yet."""
    simclr, optimizer = parts
    optim, temperature = config.optim, config.loss.temperature
    for it, batch in run.steps(epoch):
        lr = warmup_cosine(
            it,
            base=config.peak_lr,
            final=optim.min_lr,
            total_steps=run.total_steps,
            warmup_steps=optim.warmup_epochs * run.steps_per_epoch,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr

        optimizer.zero_grad(set_to_none=True)
        for part in batch:
            views = run.views(part)  # [N, B, 3, H, W], one resolution
            with run.precision.autocast():
                # hvp: train on the hardest pair of the sampled views
                views = run.hard_views(views, lambda v: pair_losses(simclr, v, temperature, run.world), simclr)
                features = run.model(views[0].flatten(0, 1))  # of both views, [2 B, .]
                z = features.projection.unflatten(0, (2, -1))  # [2, B, D]
                loss = nt_xent_loss(z, temperature, run.world)
                rescued = run.rescue(features, part)  # rescue: pull strong views of the easiest images to common ones
            run.backward(loss, rescued)
        run.optimize(optimizer)

        spread = feature_spread(z.detach().flatten(0, 1))
        run.record(lr=lr, spread=spread)
        chance = math.log(2 * config.train.batch_size // config.train.accumulate - 1)  # all 2 M - 1 other views alike
        run.collapse.see(
            it,
            abs(run.objective - chance) < 1e-3 or spread < 1e-2,
            f"for {run.collapse.steps} steps the loss has been at chance level, ln(2 B - 1) = {chance:.3f}, or all "
            "projections have been one point. Lower the learning rate, or warm it up for longer",
        )
