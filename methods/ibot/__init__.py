"""iBOT (arXiv:2111.07832), with hard views."""

from hvp.methods import Method
from hvp.methods.ibot.checkpoint_names import upstream_layout
from hvp.methods.ibot.config import IbotConfig
from hvp.methods.ibot.main_ibot import build_encoder, build_modules, train_ibot

METHOD = Method("ibot", IbotConfig, train_ibot, build_encoder, build_modules, upstream_layout)
