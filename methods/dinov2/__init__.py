"""DINOv2 (arXiv:2304.07193), with hard views."""

from hvp.methods import Method
from hvp.methods.dinov2.config import DINOv2Config
from hvp.methods.dinov2.main_dinov2 import build, build_encoder, build_masks, train_dinov2, train_one_epoch

METHOD = Method("dinov2", DINOv2Config, train_dinov2, build, train_one_epoch, build_encoder, build_masks)
