"""MoCo v3 (arXiv:2104.02057), with hard views and rescued easy samples."""

from hvp.methods import Method
from hvp.methods.mocov3.config import MoCoConfig
from hvp.methods.mocov3.main_mocov3 import build, build_encoder, train_mocov3, train_one_epoch

METHOD = Method(
    "mocov3",
    MoCoConfig,
    train_mocov3,
    build,
    train_one_epoch,
    build_encoder,
    linear={
        "epochs": 90,
        "optimizer": "sgd",
        "base_lr": 0.1,
        "batch_size": 1024,
        "n_last_blocks": 1,
        "avgpool": False,
    },
    linear_vit={"base_lr": 3.0},
)
