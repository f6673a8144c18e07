"""DINO (arXiv:2104.14294), with hard views."""

from hvp.methods import Method
from hvp.methods.dino.config import DinoConfig
from hvp.methods.dino.main_dino import build, build_encoder, train_dino, train_one_epoch

METHOD = Method("dino", DinoConfig, train_dino, build, train_one_epoch, build_encoder)
