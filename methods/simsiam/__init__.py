"""SimSiam (arXiv:2011.10566), with hard views."""

from hvp.methods import Method
from hvp.methods.simsiam.checkpoint_names import upstream_layout
from hvp.methods.simsiam.config import SimSiamConfig
from hvp.methods.simsiam.main_simsiam import build_encoder, build_modules, train_simsiam

METHOD = Method(
    "simsiam",
    SimSiamConfig,
    train_simsiam,
    build_encoder,
    build_modules,
    upstream_layout,
    linear={"epochs": 90, "optimizer": "lars", "base_lr": 0.1, "batch_size": 4096},
)
