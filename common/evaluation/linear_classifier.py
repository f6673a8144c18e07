"""Training of a linear classifier on given features."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hvp.common.errors import UserError
from hvp.common.evaluation.features import Progress, silent
from hvp.common.evaluation.metrics import percent, rank_of_target
from hvp.common.training.optimizers import LARS

# B images of a step, M validation images, D features, C classes

log = logging.getLogger(__name__)

STAGE = "linear classifier"

OptimizerName = Literal["sgd", "lars"]

Batches = Iterator[tuple[Tensor, Tensor]]
"""Features [B, D] float32 and labels [B] int64."""


@dataclass(frozen=True)
class Epoch:
    """Losses and accuracies of an epoch that ended with a validation."""

    epoch: int
    """Number of the epoch, from 1."""
    loss: float
    """Mean training loss of the epoch."""
    top1: float
    """Percent."""
    top5: float | None
    """Percent; None with fewer than five classes."""


def train_linear(
    batches: Callable[[int], Batches],
    val_features: Tensor,
    val_labels: Tensor,
    num_classes: int,
    *,
    lr: float,
    epochs: int,
    seed: int,
    optimizer: OptimizerName = "sgd",
    val_every: int = 1,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> list[Epoch]:
    """Train a linear classifier: momentum 0.9, no weight decay, cosine schedule from `lr` to 0, constant in an epoch.

    Weights start from N(0, 0.01), drawn from `seed` alone; the bias starts at 0.

    Args:
        batches: returns the training batches of an epoch (from 0).
        val_features: [M, D] float32.
        val_labels: [M] int64.
        num_classes: C.
        lr: learning rate of the first epoch.
        epochs: number of epochs.
        seed: random seed of the initial weights.
        optimizer: LARS scales the steps of weights and bias, with trust coefficient 0.001.
        val_every: epochs between two validations; the first and the last epoch are always validated.
        device: device of the classifier.
        progress: called at the beginning and after each epoch.

    Returns:
        Every validated epoch, in order.

    Raises:
        UserError: the loss is not finite.

    Source: facebookresearch/dino eval_linear.py, eval_linear and train; facebookresearch/simsiam main_lincls.py.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(num_classes, val_features.shape[1]).normal_(0.0, 0.01, generator=generator).to(device)
    bias = torch.zeros(num_classes, device=device)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    stepper: torch.optim.Optimizer
    if optimizer == "lars":
        stepper = LARS(parameters, momentum=0.9, eta=0.001, exempt_vectors=False)
    else:
        stepper = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    history = []
    progress(STAGE, 0, epochs)
    for epoch in range(epochs):
        stepper.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        total, images = torch.zeros((), dtype=torch.float64, device=device), 0
        for features, labels in batches(epoch):
            loss = cross_entropy(torch.addmm(bias, features, weight.T), labels)
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            total += loss.detach() * len(labels)
            images += len(labels)
        mean = total.item() / images
        if not math.isfinite(mean):
            raise UserError(f"linear probing, epoch {epoch + 1}: the loss is {mean}. Lower base_lr.")
        if epoch % val_every == 0 or epoch == epochs - 1:
            history.append(Epoch(epoch + 1, mean, *_validate(weight.detach(), bias.detach(), val_features, val_labels)))
            log.info("linear probing, epoch %d: loss %.4f, top-1 %.2f", epoch + 1, mean, history[-1].top1)
        progress(STAGE, epoch + 1, epochs)
    return history


def _validate(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> tuple[float, float | None]:
    ranks = [
        rank_of_target(torch.addmm(bias, x.to(weight.device), weight.T), y.to(weight.device)).cpu()
        for x, y in zip(features.split(8192), labels.split(8192), strict=True)
    ]
    return percent(torch.cat(ranks), len(bias))
