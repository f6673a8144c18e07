"""Many random views of an image, with the parameters each was made with."""

from hvp.common.views.gallery import draw_selection
from hvp.common.views.loader import MultiViewLoader, ViewBatch
from hvp.common.views.normalize import MEAN, STD, normalize
from hvp.common.views.order import epoch_order, micro_batches, steps_per_epoch
from hvp.common.views.parameters import (
    COLUMNS,
    JITTER_ORDERS,
    ViewParameters,
    ViewSlot,
    ViewTransform,
    first_views,
    resolutions,
    sample_parameters,
    view_layout,
    view_slots,
)

__all__ = [
    "COLUMNS",
    "JITTER_ORDERS",
    "MEAN",
    "STD",
    "MultiViewLoader",
    "ViewBatch",
    "ViewParameters",
    "ViewSlot",
    "ViewTransform",
    "draw_selection",
    "epoch_order",
    "first_views",
    "micro_batches",
    "normalize",
    "resolutions",
    "sample_parameters",
    "steps_per_epoch",
    "view_layout",
    "view_slots",
]
