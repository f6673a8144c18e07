"""SimSiam (arXiv:2011.10566), with hard views."""

from hvp.methods import Method
from hvp.methods.simsiam.config import SimSiamConfig
from hvp.methods.simsiam.main_simsiam import build, build_encoder, train_one_epoch, train_simsiam

METHOD = Method(
    "simsiam",
    SimSiamConfig,
    train_simsiam,
    build,
    train_one_epoch,
    build_encoder,
    linear={"epochs": 90, "optimizer": "lars", "base_lr": 0.1, "batch_size": 4096},
)
