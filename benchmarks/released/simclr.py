"""Comparison of our SimCLR selection with the one that HVP's authors released.

# B images, D embedding dim
"""

from importlib import import_module

import torch
from torch import Tensor

from hvp.benchmarks.originals.harness import normalized_views
from hvp.benchmarks.released.selection import (
    Choices,
    Network,
    Outputs,
    Released,
    agreed,
    marked_images,
    random_outputs,
    views_in,
)
from hvp.common.hardviews import Slots
from hvp.common.views import ViewBatch
from hvp.methods.simclr.model import SimCLR
from hvp.methods.simclr.score import pair_nt_xent

NUM_VIEWS = 4
DIM = 128
TEMPERATURE = 0.1


def random(generator: torch.Generator) -> Outputs:
    """Draw projections, [4, B, D]."""
    return {"z": random_outputs(NUM_VIEWS, generator, DIM)}


def network(model: SimCLR, batch: ViewBatch) -> Outputs:
    """Return the projections of a model."""
    z = model(torch.cat(normalized_views(batch))).projection
    return {"z": z.unflatten(0, (NUM_VIEWS, -1))}


def theirs(outputs: Outputs) -> Choices:
    """Return the choices of the released code."""
    images = marked_images(NUM_VIEWS, outputs["z"].shape[1], size=1)
    criterion = import_module("losses").NTXentLoss(TEMPERATURE)
    out, selection, score = import_module("hvs").adversarial_crop_selection(images, Network(outputs["z"]), criterion)
    return Choices(agreed(views_in(out), selection.T), score)


def pair_losses(outputs: Outputs) -> Tensor:
    """Return our pair-loss matrix."""
    return pair_nt_xent(outputs["z"], TEMPERATURE)


RELEASED = Released(
    branch="simclr",
    commit="deaf87e62ef5c505ddee76dba7f510ea8c2c8357",
    function="hvs.adversarial_crop_selection",
    slots=Slots.from_counts((NUM_VIEWS,), (2,)),
    random=random,
    network=network,
    values={"model.arch": "convnet_micro", "optim.warmup_epochs": 1, "views.crop_size": 32},
    theirs=theirs,
    pair_losses=pair_losses,
    unit=0.5,
    notes=(
        "its score is the sum over both orders of a pair, our loss the mean",
        "it selects in half precision on a GPU, whatever its flags",
    ),
)
