"""SimCLR, with hard views: the trainer.

`# hvp:` and `# rescue:` mark what is not in the upstream. With `--hard-views none` and `--no-rescue` none of that runs.

    # B images of this process, M of all processes, N candidate views (2 without hard views), D embedding dim

Source: google-research/simclr tf2/run.py, objective and recipe; automl/hvp, branch simclr, pretrain.py, whose names
these are; HVP Algorithm 1.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hvp.common.networks.resnet import CONVNETS, ConvNet
from hvp.common.training.collapse import feature_spread
from hvp.common.training.distributed import averaging, data_parallel, synchronised, unwrapped
from hvp.common.training.optimizers import build_optimizer, split_weight_decay
from hvp.common.training.precision import Precision
from hvp.common.training.rescuing import Rescuer
from hvp.common.training.run import Run
from hvp.common.training.schedules import warmup_cosine
from hvp.common.training.selecting import ViewSelector
from hvp.common.training.session import RunOptions, session
from hvp.common.views.normalize import normalize
from hvp.methods.simclr.config import SimclrConfig
from hvp.methods.simclr.model import SimCLR, SimCLRProjectionHead
from hvp.methods.simclr.nt_xent_loss import nt_xent_loss
from hvp.methods.simclr.score import pair_losses


def train_simclr(config: SimclrConfig, out: Path, **options: Unpack[RunOptions]) -> Path:
    """Pretrains an encoder, in one process or as one of those that a launcher started.

    Args:
        config: what to do.
        out: the run's folder.
        options: as in RunOptions.

    Returns:
        The last checkpoint. `model` in it has the state-dict keys of HVP's released code.

    Raises:
        UserError: something that the caller can mend, before the first step where it can be known by then.
        Stopped: a signal asked to stop.
    """
    with session(config, out, **options) as s:
        with s.world.agreeing():
            simclr = synchronised(build_model(config, s.device), s.world, s.device)
            optimizer = build_optimizer(config.optim.optimizer, split_weight_decay(simclr.named_parameters()))
            optimizer.param_groups[0]["weight_decay"] = config.optim.weight_decay
            rescuer = s.rescuer(simclr)
        with s.run("simclr", {"model": simclr, "optimizer": optimizer}) as run:
            model = data_parallel(simclr, s.world, s.device)
            for epoch in run.epochs:
                train_one_epoch(model, optimizer, s.precision, rescuer, run, epoch, config)
            return run.last_checkpoint


def build_encoder(config: SimclrConfig) -> ConvNet:
    """The backbone, with fresh weights."""
    return CONVNETS[config.model.arch](zero_init_residual=config.model.zero_init_residual)


def build_model(config: SimclrConfig, device: torch.device) -> SimCLR:
    """Backbone and projector, with fresh weights."""
    model = config.model
    backbone = build_encoder(config)
    projector = SimCLRProjectionHead(
        backbone.embed_dim, model.proj_hidden_dim, model.out_dim, model.num_proj_layers, model.use_bn_in_head
    )
    return SimCLR(backbone, projector).to(device)


def build_modules(config: SimclrConfig, device: torch.device) -> Sequence[nn.Module]:
    """The network: what a checkpoint holds."""
    return (build_model(config, device),)


def train_one_epoch(
    model: SimCLR | DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    rescuer: Rescuer,
    run: Run,
    epoch: int,
    config: SimclrConfig,
) -> None:
    """The steps of one epoch that are not done yet. `model` is as `data_parallel()` gave it back."""
    simclr: SimCLR = unwrapped(model)
    optim, temperature, num_parts = config.optim, config.loss.temperature, config.train.accumulate
    selector = ViewSelector(config, run.total_steps, run.world.rank)
    chance = math.log(2 * config.train.batch_size // num_parts - 1)  # all 2 M - 1 other views alike
    for it, parts in run.steps(epoch):
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
        step_loss, step_rescue = torch.zeros(2, device=precision.device)
        kept = None
        for number, part in enumerate(parts, start=1):
            views = [normalize(pixels) for pixels in part.to(precision.device, non_blocking=True).pixels]  # [N, B, ...]
            with precision.autocast():
                if selector.acts_on(it):  # hvp: train on the hardest pair of the sampled views
                    with run.selecting.running():
                        with selector.scoring(simclr):
                            losses = pair_losses(simclr, views, temperature, run.world)
                        kept = selector.keep(views, losses, it)
                        views = kept.views
                else:
                    views = selector.first(views)
                with averaging(model, on=number == num_parts):
                    features = model(views[0].flatten(0, 1))  # of both views, [2 B, .]
                z = features.projection.unflatten(0, (2, -1))  # [2, B, D]
                loss = nt_xent_loss(z, temperature, run.world) / num_parts
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

        spread = feature_spread(z.detach().flatten(0, 1))
        statistics = precision.statistics() | (
            {**selector.statistics(kept), **rescuer.statistics()} if run.row_due else {}
        )
        run.record(loss_value, lr=lr, spread=spread, **statistics)
        run.collapse.see(
            it,
            abs(step_loss.item() - chance) < 1e-3 or spread < 1e-2,
            f"for {run.collapse.steps} steps the loss has been that of chance, ln(2 B - 1) = {chance:.3f}, or the "
            "projections one point. Lower the learning rate, or warm it up for longer",
        )
