"""The trainers, one folder each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any

from hvp.common.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import nn

    from hvp.common.convert.layouts import Layout
    from hvp.common.evaluation.linear import LinearProtocol

METHODS = ("dino", "ibot", "simsiam", "simclr", "mocov3", "dinov2")
"""Names of the folders."""


@dataclass(frozen=True)
class Method:
    """What the command line needs of a trainer."""

    name: str

    config: type[Any]
    """Its configuration, a `RunConfig` with `view_slots()`."""

    train: "Callable[..., Path]"
    """train(config, out, *, resume, overwrite, force, console, on_row) -> the last checkpoint."""

    build_encoder: "Callable[[Any], nn.Module]"
    """The backbone that a configuration describes, with fresh weights."""

    build_modules: "Callable[[Any, torch.device], Sequence[nn.Module]]"
    """build_modules(config, device): everything with weights or buffers that a checkpoint holds, freshly made."""

    upstream_layout: "Callable[[Any], Layout]"
    """upstream_layout(config): what the upstream's checkpoints call things."""

    linear: "LinearProtocol" = field(default_factory=dict)  # type: ignore[assignment]
    """How its paper trains a linear probe; left out, as DINO."""

    linear_vit: "LinearProtocol" = field(default_factory=dict)  # type: ignore[assignment]
    """What differs in that for a ViT."""


def get_method(name: str) -> Method:
    """The trainer of that name.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        raise _unknown(name)
    method: Method = import_module(f"hvp.methods.{name}").METHOD
    return method


def presets(method: str) -> dict[str, Traversable]:
    """The presets of a method, by name.

    Raises:
        UserError: there is no such method.
    """
    if method not in METHODS:
        raise _unknown(method)
    folder = files("hvp.methods") / method / "presets"
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): folder / name for name in names}


def get_preset(method: str, name: str) -> Traversable:
    """The preset's file.

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
