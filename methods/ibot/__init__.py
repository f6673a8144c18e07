"""iBOT (arXiv:2111.07832), with hard views."""

from hvp.methods import Method
from hvp.methods.ibot.config import IbotConfig
from hvp.methods.ibot.main_ibot import build, build_encoder, build_masks, train_ibot, train_one_epoch

METHOD = Method("ibot", IbotConfig, train_ibot, build, train_one_epoch, build_encoder, build_masks)
