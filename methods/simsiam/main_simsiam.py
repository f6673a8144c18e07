"""SimSiam, with hard views: the trainer.

Shaped like the upstream's main_simsiam.py; `# hvp:` and `# rescue:` mark every departure from it, which
`--hard-views none` and `--no-rescue` switch off.

    # B images per process, N candidate views (N = 2 without hard views), D projection dim

Source: facebookresearch/simsiam main_simsiam.py; HVP Algorithm 1.
"""

from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.optim import Optimizer

from hvp.common.errors import UserError
from hvp.common.networks.resnet import CONVNETS, ConvNet
from hvp.common.training.collapse import feature_spread
from hvp.common.training.distributed import World, share_of_batch, synchronised
from hvp.common.training.optimizers import build_optimizer
from hvp.common.training.schedules import cosine
from hvp.common.training.session import RunOptions, session
from hvp.common.training.step import Step
from hvp.methods.simsiam.builder import SimSiam
from hvp.methods.simsiam.config import SimSiamConfig
from hvp.methods.simsiam.score import EPS, pair_losses

COLLAPSED_SPREAD = 0.05
"""Spread of the projections (1 all over the sphere, 0 a point) below which a step looks collapsed."""


def train_simsiam(config: SimSiamConfig, out: Path, **options: Unpack[RunOptions]) -> Path:
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
        with s.run("simsiam", parts, trained=parts.model) as run:
            for epoch in run.epochs:
                train_one_epoch(run, parts, epoch, config)
            return run.last_checkpoint


def check_batch(config: SimSiamConfig, world: World) -> None:
    """Check that batch norm gets at least two images.

    Raises:
        UserError: a process goes through its share of the batch one image at a time.
    """
    train = config.train
    if share_of_batch(train.batch_size, train.accumulate, world) == 1:
        raise UserError(
            f"train.batch_size = {train.batch_size} over {world.size} processes and train.accumulate = "
            f"{train.accumulate} parts is 1 image at a time, but batch norm needs at least 2. Raise train.batch_size, "
            "or lower train.accumulate"
        )


def build_encoder(config: SimSiamConfig) -> ConvNet:
    """Build the encoder, with fresh weights and no projector."""
    return CONVNETS[config.model.arch](zero_init_residual=config.model.zero_init_residual)


def build_model(config: SimSiamConfig, device: torch.device) -> SimSiam:
    """Build encoder, projector and predictor, with fresh weights."""
    return SimSiam(
        build_encoder(config),
        config.model.dim,
        config.model.pred_dim,
        projector_layers=config.model.projector_layers,
        projector_bias=config.model.projector_bias,
    ).to(device)


class Parts(NamedTuple):
    """State that training changes, under its names in a checkpoint."""

    model: SimSiam
    optimizer: Optimizer


def build(config: SimSiamConfig, world: World, device: torch.device) -> Parts:
    """Build the network and its optimiser.

    Raises:
        UserError: a process would see one image at a time, too few for batch norm.
    """
    check_batch(config, world)
    model = synchronised(build_model(config, device), world, device)
    return Parts(model, build_optimizer(config.optim.optimizer, parameter_groups(model, config.optim.weight_decay)))


def parameter_groups(model: SimSiam, weight_decay: float) -> list[dict[str, Any]]:
    """Group encoder with projector, and the predictor, which may have a learning rate of its own. All of it decays."""
    return [
        {"params": [p for p in part.parameters() if p.requires_grad], "weight_decay": weight_decay}
        for part in (model.encoder, model.predictor)
    ]


def symmetric_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Negative cosine similarity of each view's prediction and the other's projection, mean over both and the batch.

    Args:
        p1, p2: predictions, [B, D], any float dtype; computed in float32.
        z1, z2: projections, [B, D]; targets, without gradient.

    Returns:
        Scalar float32 in [-1, 1].

    Source: SimSiam (arXiv:2011.10566) Eq. 2.
    """
    p1, p2, z1, z2 = (x.float() for x in (p1, p2, z1, z2))
    towards = cosine_similarity(p1, z2, eps=EPS).mean() + cosine_similarity(p2, z1, eps=EPS).mean()
    return -0.5 * towards


def train_one_epoch(run: Step, parts: Parts, epoch: int, config: SimSiamConfig) -> None:
    """Train the steps of one epoch that are not done yet."""
    simsiam, optimizer = parts
    # the cosine moves once an epoch
    lr = cosine(epoch, base=config.peak_lr, final=0.0, total_steps=config.train.epochs)
    encoder, predictor = optimizer.param_groups
    encoder["lr"], predictor["lr"] = lr, config.peak_lr if config.optim.fix_pred_lr else lr
    for it, batch in run.steps(epoch):
        optimizer.zero_grad(set_to_none=True)
        for part in batch:
            views = run.views(part)  # [V, B, 3, H, W], one resolution
            with run.precision.autocast():
                # hvp: train on the hardest pair of the sampled views
                views = run.hard_views(views, lambda v: pair_losses(simsiam, v), simsiam)
                p1, p2, z1, z2, features = run.model(*views[0])  # each [B, D]; features of both views [2 B, .]
                loss = symmetric_loss(p1, p2, z1, z2)
                rescued = run.rescue(features, part)  # rescue: pull strong views of the easiest images to common ones
            run.backward(loss, rescued)
        run.optimize(optimizer)

        spread = feature_spread(z1)
        run.record(lr=lr, spread=spread)
        run.collapse.see(
            it,
            spread < COLLAPSED_SPREAD,
            f"for {run.collapse.steps} steps the projections of all images have been nearly the same (spread "
            f"{spread:.4f}). Lower the learning rate, or start selecting later (selection.start)",
        )
