"""SimSiam, with hard views: the trainer.

Shaped like the upstream's main_simsiam.py; `# hvp:` and `# rescue:` mark what is not in it. With `--hard-views none`
and `--no-rescue` none of that runs.

    # B images per process, N candidate views (N = 2 without hard views), D projection dim

Source: facebookresearch/simsiam main_simsiam.py; HVP Algorithm 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.parallel import DistributedDataParallel

from hvp.common.errors import UserError
from hvp.common.networks.resnet import CONVNETS, ConvNet
from hvp.common.training.collapse import feature_spread
from hvp.common.training.distributed import (
    World,
    averaging,
    data_parallel,
    share_of_batch,
    synchronised,
    unwrapped,
)
from hvp.common.training.optimizers import build_optimizer
from hvp.common.training.precision import Precision
from hvp.common.training.rescuing import Rescuer
from hvp.common.training.run import Run
from hvp.common.training.schedules import cosine
from hvp.common.training.selecting import ViewSelector
from hvp.common.training.session import RunOptions, session
from hvp.common.views.normalize import normalize
from hvp.methods.simsiam.builder import SimSiam
from hvp.methods.simsiam.config import SimSiamConfig
from hvp.methods.simsiam.score import EPS, pair_losses

COLLAPSED_SPREAD = 0.05
"""Spread of the projections (1 all over the sphere, 0 a point) below which a step looks collapsed."""


def train_simsiam(config: SimSiamConfig, out: Path, **options: Unpack[RunOptions]) -> Path:
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
            check_batch(config, s.world)
            model = synchronised(build_model(config, s.device), s.world, s.device)
            optimizer = build_optimizer(config.optim.optimizer, parameter_groups(model, config.optim.weight_decay))
            rescuer = s.rescuer(model)
        with s.run("simsiam", {"model": model, "optimizer": optimizer}) as run:
            ddp = data_parallel(model, s.world, s.device)
            for epoch in run.epochs:
                train_one_epoch(ddp, optimizer, s.precision, rescuer, run, epoch, config)
            return run.last_checkpoint


def check_batch(config: SimSiamConfig, world: World) -> None:
    """Sees to it that batch norm has something to compare.

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
    """The encoder, with fresh weights and no projector."""
    return CONVNETS[config.model.arch](zero_init_residual=config.model.zero_init_residual)


def build_model(config: SimSiamConfig, device: torch.device) -> SimSiam:
    """Encoder, projector and predictor, with fresh weights."""
    return SimSiam(
        build_encoder(config),
        config.model.dim,
        config.model.pred_dim,
        projector_layers=config.model.projector_layers,
        projector_bias=config.model.projector_bias,
    ).to(device)


def build_modules(config: SimSiamConfig, device: torch.device) -> Sequence[nn.Module]:
    """What a checkpoint holds: the model."""
    return (build_model(config, device),)


def parameter_groups(model: SimSiam, weight_decay: float) -> list[dict[str, Any]]:
    """Encoder with projector, then predictor, which may have a learning rate of its own. All of it decays."""
    return [
        {"params": [p for p in part.parameters() if p.requires_grad], "weight_decay": weight_decay}
        for part in (model.encoder, model.predictor)
    ]


def symmetric_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """How far each view's prediction points away from the other view's projection, mean over both and the batch.

    Args:
        p1, p2: predictions, [B, D], any float dtype; computed in float32.
        z1, z2: projections, [B, D]; targets, so given without gradient.

    Returns:
        Scalar float32 in [-1, 1].

    Source: SimSiam (arXiv:2011.10566) Eq. 2.
    """
    p1, p2, z1, z2 = (x.float() for x in (p1, p2, z1, z2))
    towards = cosine_similarity(p1, z2, eps=EPS).mean() + cosine_similarity(p2, z1, eps=EPS).mean()
    return -0.5 * towards


def train_one_epoch(
    model: SimSiam | DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    rescuer: Rescuer,
    run: Run,
    epoch: int,
    config: SimSiamConfig,
) -> None:
    """The steps of one epoch that are not done yet. `model` is as `data_parallel()` gave it back."""
    simsiam: SimSiam = unwrapped(model)
    num_parts = config.train.accumulate
    selector = ViewSelector(config, run.total_steps, run.world.rank)
    # a cosine in steps of epochs
    lr = cosine(epoch, base=config.peak_lr, final=0.0, total_steps=config.train.epochs)
    encoder, predictor = optimizer.param_groups
    encoder["lr"], predictor["lr"] = lr, config.peak_lr if config.optim.fix_pred_lr else lr
    for it, parts in run.steps(epoch):
        optimizer.zero_grad(set_to_none=True)
        step_loss, step_rescue = torch.zeros(2, device=precision.device)
        kept = None
        for number, part in enumerate(parts, start=1):
            views = [normalize(pixels) for pixels in part.to(precision.device, non_blocking=True).pixels]
            with precision.autocast():
                if selector.acts_on(it):  # hvp: train on the hardest pair of the sampled views
                    with run.selecting.running():
                        with selector.scoring(simsiam):
                            losses = pair_losses(simsiam, views)
                        kept = selector.keep(views, losses, it)
                        views = kept.views
                else:
                    views = selector.first(views)
                x1, x2 = views[0]  # each [B, 3, H, W]
                with averaging(model, on=number == num_parts):
                    p1, p2, z1, z2, features = model(x1, x2)  # each [B, D]; features of both views [2 B, .]
                loss = symmetric_loss(p1, p2, z1, z2) / num_parts
                step_loss += loss.detach()
                if rescuer.enabled:  # rescue: pull strong views of the easiest images to their common ones
                    rescued = rescuer.loss(features, part) / num_parts
                    step_rescue += rescued.detach()
                    loss = loss + rescued
            precision.backward(loss)

        precision.unscale(optimizer)
        # before a loss or gradient that is not finite reaches the weights
        loss_value = run.check(step_loss + step_rescue, optimizer, lr=lr, **precision.statistics())
        precision.step(optimizer)

        spread = feature_spread(z1)
        statistics = precision.statistics() | (
            {**selector.statistics(kept), **rescuer.statistics()} if run.row_due else {}
        )
        run.record(loss_value, lr=lr, spread=spread, **statistics)
        run.collapse.see(
            it,
            spread < COLLAPSED_SPREAD,
            f"for {run.collapse.steps} steps the projections of all images have been nearly the same (spread "
            f"{spread:.4f}). Lower the learning rate, or start selecting later (selection.start)",
        )
