"""How large the checkpoints of a configuration are, without the memory to train it."""

import torch
from torch import nn

from hvp.methods.dino.config import DinoConfig
from hvp.methods.dino.main_dino import build_loss, build_networks

MOMENTS = {"adamw": 2, "sgd": 1, "lars": 1}
"""Numbers that an optimiser keeps for each that it trains."""


def checkpoint_bytes(config: DinoConfig) -> int:
    """Bytes of the tensors in a checkpoint: student, teacher, centre, and the optimiser's moments."""
    meta = torch.device("meta")
    with meta:
        student, teacher = build_networks(config, meta)
        loss = build_loss(config)
    trained = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    return sum(map(_state_bytes, (student, teacher, loss))) + MOMENTS[config.optim.optimizer] * trained


def _state_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
