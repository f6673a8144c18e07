"""Comparison of our SimSiam selection with the one that HVP's authors released.

# B images, D projection dim
"""

from importlib import import_module
from types import SimpleNamespace

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
from hvp.methods.simsiam.builder import SimSiam
from hvp.methods.simsiam.score import negative_cosines

NUM_VIEWS = 4
DIM = 256


def random(generator: torch.Generator) -> Outputs:
    """Draw predictions and projections, [4, B, D] each."""
    return {"p": random_outputs(NUM_VIEWS, generator, DIM), "z": random_outputs(NUM_VIEWS, generator, DIM)}


def network(model: SimSiam, batch: ViewBatch) -> Outputs:
    """Return the predictions and projections of a model."""
    p, z = model.single_forward(torch.cat(normalized_views(batch)))
    return {"p": p.unflatten(0, (NUM_VIEWS, -1)), "z": z.unflatten(0, (NUM_VIEWS, -1))}


def theirs(outputs: Outputs) -> Choices:
    """Return the choices of the released code."""
    images = marked_images(NUM_VIEWS, outputs["p"].shape[1], size=1)
    model = SimpleNamespace(module=SimpleNamespace(single_forward=Network(outputs["p"], outputs["z"])))
    *out, selected, score = import_module("select_crops").select_crops_cross(images, model, None)
    return Choices(agreed(views_in(out), selected.T), score)


def pair_losses(outputs: Outputs) -> Tensor:
    """Return our pair-loss matrix."""
    return negative_cosines(outputs["p"], outputs["z"])


RELEASED = Released(
    branch="main",
    commit="61a461373f9c45bb8df44f4c9b6fcd2b4ab5c396",
    function="select_crops.select_crops_cross",
    slots=Slots.from_counts((NUM_VIEWS,), (2,)),
    random=random,
    network=network,
    values={"model.arch": "convnet_micro", "model.dim": 64, "model.pred_dim": 16, "views.crop_size": 32},
    theirs=theirs,
    pair_losses=pair_losses,
    unit=-1.0,
    notes=("its score is the mean of both cosines, and the lowest wins; our loss is the negative",),
)
