"""DINO (arXiv:2104.14294), with hard views."""

from hvp.methods import Method
from hvp.methods.dino.checkpoint_names import upstream_layout
from hvp.methods.dino.config import DinoConfig
from hvp.methods.dino.main_dino import build_encoder, build_modules, train_dino

METHOD = Method("dino", DinoConfig, train_dino, build_encoder, build_modules, upstream_layout)
