"""DINO (arXiv:2104.14294), with hard views."""

from hvp.methods import Method
from hvp.methods.dino.config import DinoConfig
from hvp.methods.dino.main_dino import build_encoder, train_dino
from hvp.methods.dino.size import checkpoint_bytes
from hvp.methods.dino.vision_transformer import encoder_from_state

METHOD = Method("dino", DinoConfig, train_dino, build_encoder, encoder_from_state, checkpoint_bytes)
