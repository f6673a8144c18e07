"""The trainers, one folder each."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any

from hvp.common.config import nearest
from hvp.common.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from hvp.common.evaluation.checkpoints import BackboneMeta, Which

METHODS = ("dino",)
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

    encoder_from_state: "Callable[[Mapping[str, Tensor]], nn.Module | None]"
    """The backbone that a state dict belongs to, by names and shapes, weights not loaded; None if there is none."""

    checkpoint_bytes: "Callable[[Any], int]"
    """The size of a checkpoint of a configuration."""


def get_method(name: str) -> Method:
    """The trainer of that name.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name}.{nearest(name, list(METHODS))} Known: {', '.join(METHODS)}")
    method: Method = import_module(f"hvp.methods.{name}").METHOD
    return method


def presets(method: str) -> dict[str, Traversable]:
    """The presets of a method, by name.

    Raises:
        UserError: there is no such method.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method}.{nearest(method, list(METHODS))} Known: {', '.join(METHODS)}")
    folder = files("hvp.methods") / method / "presets"
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): folder / name for name in names}


def get_preset(method: str, name: str) -> Traversable:
    """The preset's file.

    Raises:
        UserError: the method has no such preset.
    """
    known = presets(method)
    if name not in known:
        raise UserError(f"{method} has no preset {name}.{nearest(name, list(known))} Known: {', '.join(known)}")
    return known[name]


def load_encoder(checkpoint: "Path", which: "Which" = "teacher") -> "tuple[nn.Module, BackboneMeta]":
    """The encoder in a checkpoint of ours, of an upstream trainer, or in a bare state dict, in evaluation mode.

    Raises:
        UserError: the file cannot be read, is of no architecture that is known here, or does not fit it completely.
    """
    from hvp.common.evaluation.checkpoints import load_complete, read_backbone_state

    backbone = read_backbone_state(checkpoint, which)
    for name in METHODS:
        encoder = get_method(name).encoder_from_state(backbone.state)
        if encoder is not None:
            load_complete(encoder, backbone.state, str(backbone.meta.path))
            return encoder.eval(), backbone.meta
    keys = ", ".join(list(backbone.state)[:4])
    raise UserError(
        f"{backbone.meta.path}: is no ViT-Ti, ViT-S, ViT-B or ResNet-50 as the methods here train them; "
        f"its {len(backbone.state)} entries begin with {keys}"
    )
