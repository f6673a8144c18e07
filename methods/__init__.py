"""The trainers, one folder each."""

from dataclasses import dataclass, field
from importlib import import_module
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, Unpack

from hvp.common.errors import UserError

# Nothing here is imported at run time, as the command line starts without PyTorch and Pydantic.
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch
    from torch import nn

    from hvp.common.config.sections import RunConfig
    from hvp.common.convert.layouts import Layout
    from hvp.common.evaluation.linear import LinearProtocol
    from hvp.common.training.loading import Masks
    from hvp.common.training.session import Build, RunOptions
    from hvp.common.training.step import Step

METHODS = ("dino", "ibot", "simsiam", "simclr", "mocov3", "dinov2")
"""Names of the folders."""

ConfigT = TypeVar("ConfigT", bound="RunConfig")
ConfigT_contra = TypeVar("ConfigT_contra", bound="RunConfig", contravariant=True)


class Train(Protocol[ConfigT_contra]):
    """A trainer: pretrain as configured, in the folder `out`, and return the last checkpoint."""

    def __call__(self, config: ConfigT_contra, out: "Path", **options: "Unpack[RunOptions]") -> "Path": ...


def _as_in_dino() -> "LinearProtocol":
    return {}


@dataclass(frozen=True)
class Method(Generic[ConfigT]):
    """A method, as the rest of the program sees it: `methods/NAME/__init__.py` defines `METHOD`."""

    name: str
    """Name of the folder."""

    config: type[ConfigT]
    """Class of its configuration."""

    train: Train[ConfigT]
    """The trainer."""

    build: "Build[ConfigT, Any]"
    """Networks, objective and optimiser of the trainer, with fresh weights."""

    train_one_epoch: "Callable[[Step, Any, int, ConfigT], None]"
    """The trainer's loop over an epoch, on what `build` made."""

    build_encoder: "Callable[[ConfigT], nn.Module]"
    """The backbone of a configuration, with fresh weights."""

    build_masks: "Callable[[ConfigT], Masks] | None" = None
    """Sampler of patch masks, in a method that masks patches."""

    linear: "LinearProtocol" = field(default_factory=_as_in_dino)
    """Linear probing in the method's paper, where it differs from DINO's."""

    linear_vit: "LinearProtocol" = field(default_factory=_as_in_dino)
    """Further differences for a ViT."""

    def build_modules(self, config: ConfigT, device: "torch.device") -> "Sequence[nn.Module]":
        """Build everything with weights or buffers that a checkpoint holds, in the order of the checkpoint."""
        from torch import nn

        from hvp.common.training.distributed import World

        return [part for part in self.build(config, World(), device) if isinstance(part, nn.Module)]

    def upstream_layout(self, config: ConfigT) -> "Layout":
        """Return the names in the upstream's checkpoints, from `methods/NAME/checkpoint_names.py`."""
        layout: Layout = import_module(f"hvp.methods.{self.name}.checkpoint_names").upstream_layout(config)
        return layout


def get_method(name: str) -> Method[Any]:
    """Return a method by its name.

    Raises:
        UserError: there is no such method.
    """
    if name not in METHODS:
        raise _unknown(name)
    method: Method[Any] = import_module(f"hvp.methods.{name}").METHOD
    return method


def presets(method: str) -> dict[str, Traversable]:
    """Return the presets of a method, by name.

    Raises:
        UserError: there is no such method.
    """
    if method not in METHODS:
        raise _unknown(method)
    folder = files("hvp.methods") / method / "presets"
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): folder / name for name in names}


def get_preset(method: str, name: str) -> Traversable:
    """Return the file of a preset.

    Raises:
        UserError: the method has no such preset.
    """
    from hvp.common.config.resolving import nearest

    known = presets(method)
    if name not in known:
        raise UserError(f"{method} has no preset {name}.{nearest(name, list(known))} Known: {', '.join(known)}")
    return known[name]


def _unknown(method: str) -> UserError:
    from hvp.common.config.resolving import (
        nearest,  # needs Pydantic, which takes longer to import than `hvp --help` to run
    )

    return UserError(f"unknown method {method}.{nearest(method, list(METHODS))} Known: {', '.join(METHODS)}")
