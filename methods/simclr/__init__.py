"""SimCLR (arXiv:2002.05709), with hard views."""

from hvp.methods import Method
from hvp.methods.simclr.checkpoint_names import upstream_layout
from hvp.methods.simclr.config import SimclrConfig
from hvp.methods.simclr.main_simclr import build_encoder, build_modules, train_simclr

METHOD = Method(
    "simclr",
    SimclrConfig,
    train_simclr,
    build_encoder,
    build_modules,
    upstream_layout,
    linear={"epochs": 90, "optimizer": "sgd", "base_lr": 0.1, "batch_size": 4096},
)
