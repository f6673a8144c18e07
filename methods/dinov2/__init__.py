"""DINOv2 (arXiv:2304.07193), with hard views."""

from hvp.methods import Method
from hvp.methods.dinov2.checkpoint_names import upstream_layout
from hvp.methods.dinov2.config import DINOv2Config
from hvp.methods.dinov2.main_dinov2 import build_encoder, build_modules, train_dinov2

METHOD = Method("dinov2", DINOv2Config, train_dinov2, build_encoder, build_modules, upstream_layout)
