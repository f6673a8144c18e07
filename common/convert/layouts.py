"""Descriptions of upstream trainers' checkpoints: their entries, keys and parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from hvp.common.training.optimizers import OptimizerName

Built = TypeVar("Built")

LARS = {"momentum": 0.9, "eta": 0.001, "weight_decay_filter": None, "lars_adaptation_filter": None}
"""Hyperparameters of a group of the LARS that DINO, iBOT and HVP's released code share."""


@dataclass(frozen=True)
class Part:
    """State of one module in both checkpoints."""

    ours: str
    """Entry in our checkpoint."""
    theirs: str
    """Entry in the upstream's checkpoint; several parts may share one."""
    module: nn.Module
    """The module on the meta device, for its keys and shapes."""
    wrapped: bool = False
    """Whether the upstream saves it inside DistributedDataParallel, so its keys begin with `module.`."""
    prefix: str = ""
    """Prefix of the upstream's keys, after `module.`."""
    rename: Callable[[str], str] = str
    """Translates our key to the upstream's, without the prefix."""

    def their_key(self, key: str) -> str:
        """Translate our key to the upstream's, without `module.`."""
        return self.prefix + self.rename(key)


@dataclass(frozen=True)
class Optimizer:
    """Parameter groups in both checkpoints. State dicts number parameters in the order of the groups."""

    name: OptimizerName
    ours: Sequence[Mapping[str, Any]]
    """Our trainer's parameter groups; the parameters are those of the parts' modules."""
    theirs: Sequence[Mapping[str, Any]]
    """The upstream's groups of the same parameters, with the entries that it adds to a group."""
    lars: Mapping[str, Any] = field(default_factory=LARS.copy)
    """Hyperparameters of the upstream's LARS, under its names."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Mapping between an upstream's training checkpoint and ours, for one configuration."""

    repository: str
    """The upstream repository."""
    parts: Sequence[Part]
    optimizer: Optimizer | None
    """None if no other trainer can continue with the optimiser state that the upstream saves."""
    scaler: str | None = None
    """Entry with the state of the fp16 gradient scaler; None if the upstream has none."""
    always_scales: bool = False
    """Whether the upstream expects a scaler's state in every checkpoint."""
    header: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of its checkpoints that its loaders may read."""
    progress: Callable[[int, int], Mapping[str, int]] = lambda epoch, step: {"epoch": epoch}
    """progress(epochs done, steps done) returns the entries that record them."""
    unread: Sequence[str] = ("args",)
    """Entries that we do not need."""
    notes: Sequence[str] = ()
    """Notes for the user about checkpoints in this layout."""


def on_meta(build: Callable[[Any, torch.device], Built], config: Any) -> Built:
    """Build modules on the meta device: names, shapes and parameters, but no memory."""
    meta = torch.device("meta")
    with meta:
        return build(config, meta)
