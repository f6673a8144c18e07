"""Device and numerical precision of a run."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvp.common.errors import UserError


def pick_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device that `train.device` names.

    Raises:
        UserError: `cuda`, but PyTorch sees no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = cuda, but PyTorch sees no GPU here. Use --device cpu, or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


class Precision:
    """Autocast and, for fp16, gradient scaling. Parameters and optimiser state stay float32.

    Raises:
        UserError: fp16 on the CPU, which has no fp16 training, or bf16 on a GPU that does not support it.
    """

    def __init__(self, name: Literal["fp32", "bf16", "fp16"], device: torch.device):
        if name == "fp16" and device.type == "cpu":
            raise UserError("train.precision = fp16 needs a GPU. On the CPU use --precision bf16 or fp32")
        if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise UserError("train.precision = bf16, which this GPU does not support. Use --precision fp16 or fp32")
        self.device = device
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        self.skipped_steps = 0
        """Optimiser steps skipped under fp16 because a gradient overflowed."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context manager for every forward pass and loss."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss to the parameters, scaled under fp16 until `unscale()`."""
        self.scaler.scale(loss).backward()

    def unscale(self, optimizer: Optimizer) -> None:
        """Undo the gradients' scaling, before clipping."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        """Take one optimiser step; under fp16 a step whose gradient overflowed is skipped and counted."""
        self.scaler.step(optimizer)
        if self.scaler.is_enabled():
            before = self.scaler.get_scale()
            self.scaler.update()
            self.skipped_steps += self.scaler.get_scale() < before

    def statistics(self) -> dict[str, float]:
        """Return values for the log: under fp16, the loss scale and the steps skipped so far."""
        if not self.scaler.is_enabled():
            return {}
        return {"fp16_scale": self.scaler.get_scale(), "skipped_steps": float(self.skipped_steps)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"scaler": self.scaler.state_dict(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.scaler.load_state_dict(state["scaler"])
        self.skipped_steps = state["skipped_steps"]
