"""SimCLR (arXiv:2002.05709), with hard views."""

from hvp.methods import Method
from hvp.methods.simclr.config import SimclrConfig
from hvp.methods.simclr.main_simclr import build, build_encoder, train_one_epoch, train_simclr

METHOD = Method(
    "simclr",
    SimclrConfig,
    train_simclr,
    build,
    train_one_epoch,
    build_encoder,
    linear={"epochs": 90, "optimizer": "sgd", "base_lr": 0.1, "batch_size": 4096},
)
