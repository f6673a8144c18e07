"""Random views of an image, with the parameters that made each."""

from hvp.common.views.gallery import draw_selection
from hvp.common.views.loader import MultiViewLoader, ViewBatch
from hvp.common.views.normalize import normalize
from hvp.common.views.order import epoch_order, steps_per_epoch
from hvp.common.views.parameters import ViewSlot, ViewTransform, first_views

__all__ = [
    "MultiViewLoader",
    "ViewBatch",
    "ViewSlot",
    "ViewTransform",
    "draw_selection",
    "epoch_order",
    "first_views",
    "normalize",
    "steps_per_epoch",
]
