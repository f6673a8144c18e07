"""Export of a backbone to another library, which loads it strictly and computes the same features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torchvision
from torch import Tensor, nn

from hvp.common.convert.report import Account, Became, Converted, Fate, tensors_in
from hvp.common.errors import UserError
from hvp.common.evaluation.backbones import backbone_in
from hvp.common.evaluation.checkpoints import load_complete, misfits, read_content
from hvp.common.evaluation.descriptions import Which
from hvp.common.networks import Encoder, encoder_from_state
from hvp.common.networks.libraries import to_torchvision
from hvp.common.networks.register_vision_transformer import RegisterVisionTransformer, SwiGLU
from hvp.common.networks.resnet import ResNet
from hvp.common.networks.vision_transformer import ConvStem, VisionTransformer
from hvp.common.views.normalize import MEAN, STD

Library = Literal["timm", "torchvision", "safetensors"]

TIMM_VITS = {
    (192, 12): "vit_tiny_patch16_224",
    (384, 12): "vit_small_patch16_224",
    (768, 12): "vit_base_patch16_224",
    (1024, 24): "vit_large_patch16_224",
}
"""timm's ViTs by width and depth."""

TIMM_REGISTER_VITS = {
    (384, 12): "vit_small_patch14_dinov2",
    (768, 12): "vit_base_patch14_dinov2",
    (1024, 24): "vit_large_patch14_dinov2",
}
"""timm's ViTs with LayerScale, by width and depth."""

TORCHVISION_VITS = {
    (768, 12, 12, 16): "vit_b_16",
    (768, 12, 12, 32): "vit_b_32",
    (1024, 24, 16, 16): "vit_l_16",
    (1024, 24, 16, 32): "vit_l_32",
}
"""torchvision's ViTs by width, depth, heads and patch size. They have no registers and no LayerScale."""

SUPPORTED = {
    "timm": "ViT-Ti, ViT-S, ViT-B, ViT-L, ResNet-18 and ResNet-50",
    "torchvision": "ViT-B, ResNet-18 and ResNet-50",
}
"""Our networks that the libraries have, for messages."""


@dataclass(frozen=True)
class Export:
    """A library's network, and our weights under its names."""

    state: dict[str, Tensor]
    """Complete state dict, which loads strictly."""
    load: dict[str, Any]
    """Instructions for `meta.json` to build the network; `call` is Python."""
    build: Callable[[], nn.Module]
    """Builds the network."""
    changed: Mapping[str, str] = field(default_factory=dict)
    """Our keys whose tensors were changed, and how."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Our keys that the network has no place for, and why this changes no feature."""


def export_backbone(path: Path, library: Library, which: Which | None = None) -> Converted:
    """Convert the backbone in a file for a library.

    Args:
        path: a checkpoint of ours or of an upstream trainer, or a state dict.
        library: library whose names the result has; `safetensors` keeps ours.
        which: as for `read_backbone_state()`.

    Raises:
        UserError: as for `read_backbone_state()`; or the weights are incomplete, or the library has no such network.
    """
    content = read_content(path)
    state, meta = (found := backbone_in(content, path, which)).state, found.meta
    encoder = encoder_from_state(state)
    if encoder is None:
        raise UserError(f"{path}: its backbone is no ViT or ResNet as the methods here train them")
    load_complete(encoder, state, str(path))
    export = EXPORTS[library](encoder, state)
    if export is None:
        raise UserError(
            f"{path}: {library} has no network like this one ({type(encoder).__name__}, width {encoder.embed_dim}); "
            f"it has {SUPPORTED.get(library)}.\n    Use --to safetensors, which keeps our names and loads with "
            "hvp.common.evaluation.checkpoints.load_encoder()"
        )
    with torch.device("meta"):
        theirs = export.build().state_dict()
    if problem := misfits(theirs, export.state):
        raise UserError(f"{path}: does not fit {library}'s network in the installed version.{problem}")

    about = {
        "layout": library,
        "method": meta.method,
        "which": meta.which,
        "epoch": meta.epoch,
        "step": meta.step,
        "config": meta.config,
        "backbone": {**_facts(encoder, meta.image_size), "load": export.load},
    }
    return Converted(export.state, _fates(content, path, state, export), about)


def _fates(content: Mapping[str, Any], path: Path, state: Mapping[str, Tensor], export: Export) -> list[Fate]:
    """Outcome for every tensor of the file; `state` holds those of the backbone under our names."""
    account = Account(content, str(path))
    fates: tuple[tuple[Mapping[str, str], Became], ...] = ((export.changed, "changed"), (export.left_out, "left out"))
    for reasons, became in fates:
        for key, why in reasons.items():
            account.settle(became, only=[state[key]], why=why)
    read = list(tensors_in(content))
    if "pos_embed" in state and not any(tensor is state["pos_embed"] for _, tensor in read):  # a file made for timm
        positions = [tensor for where, tensor in read if str(where[-1]).endswith("pos_embed")]
        account.settle("changed", only=positions, why="a zero position for [CLS] was added")
    kept = [state[key] for key in state if key not in export.changed and key not in export.left_out]
    same_names = all(content.get(key) is tensor for key, tensor in export.state.items())
    account.settle("kept" if same_names else "renamed", only=kept, to="backbone")
    account.settle("left out", why="not part of this backbone")
    return account.close()


def _facts(encoder: Encoder, image_size: int | None) -> dict[str, Any]:
    """Facts that a user of the network needs besides its name."""
    if isinstance(encoder, VisionTransformer):
        feature, patch_size = "[CLS] token after the last norm", encoder.patch_size
        image_size = encoder.image_size
    else:
        feature, patch_size = "mean over the last map", None
    return {
        "feature_width": encoder.embed_dim,
        "feature": feature,
        "img_size": image_size,
        "patch_size": patch_size,
        "mean": list(MEAN),
        "std": list(STD),
    }


def _num_heads(encoder: VisionTransformer) -> int:
    heads: int = encoder.blocks[0].attn.num_heads  # type: ignore[union-attr, assignment]
    return heads


def _resnet(encoder: ResNet) -> str | None:
    """Name of a ResNet in both libraries; None for the one with a stem for CIFAR, which neither has."""
    if encoder.state_dict()["conv1.weight"].shape[-1] != 7:
        return None
    return {2048: "resnet50", 512: "resnet18"}[encoder.embed_dim]


def _to_timm(encoder: Encoder, state: Mapping[str, Tensor]) -> Export | None:
    """Export to timm, whose ViTs and ResNets have our names except for registers."""
    theirs = dict(state)
    changed, left_out = {}, {}
    arguments: dict[str, Any] = {"num_classes": 0}
    model: str | None = None
    if isinstance(encoder, VisionTransformer) and not isinstance(encoder.patch_embed, ConvStem):
        arguments["img_size"] = encoder.image_size
        arguments["patch_size"] = encoder.patch_size
        arguments["num_heads"] = _num_heads(encoder)
        models = TIMM_VITS
        if isinstance(encoder, RegisterVisionTransformer):
            left_out["mask_token"] = "replaces masked patches in pretraining; no feature depends on it"
            del theirs["mask_token"]
            if "blocks.0.ls1.gamma" in state:
                models = TIMM_REGISTER_VITS
            if encoder.num_registers:
                # timm has no position for [CLS] and registers: add the position of [CLS] to its token
                arguments |= {"reg_tokens": encoder.num_registers, "no_embed_class": True}
                theirs["reg_token"] = theirs.pop("register_tokens")
                theirs["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
                theirs["pos_embed"] = state["pos_embed"][:, 1:]
                changed["cls_token"] = "the position of [CLS] is added to it, as in timm"
                changed["pos_embed"] = "the position of [CLS] is part of cls_token, as in timm"
        if not any(isinstance(module, SwiGLU) for module in encoder.modules()):  # timm's giant has different widths
            model = models.get((encoder.embed_dim, encoder.num_blocks))
    elif isinstance(encoder, ResNet):
        model = _resnet(encoder)
    if model is None:
        return None
    shown = "".join(f", {name}={value!r}" for name, value in arguments.items())
    load = {"model": model, "arguments": arguments, "call": f'timm.create_model("{model}"{shown})'}
    return Export(theirs, load, lambda: timm.create_model(model, **arguments), changed, left_out)


def _to_torchvision(encoder: Encoder, state: Mapping[str, Tensor]) -> Export | None:
    """Export to torchvision, whose ViTs have their own names; the classifier is replaced by the identity."""
    arguments: dict[str, Any] = {}
    if isinstance(encoder, ResNet) and (resnet := _resnet(encoder)):
        model, classifier, renamed = resnet, "fc", dict(state)
    elif type(encoder) is VisionTransformer and not isinstance(encoder.patch_embed, ConvStem):
        sizes = (encoder.embed_dim, encoder.num_blocks, _num_heads(encoder), encoder.patch_size)
        if sizes not in TORCHVISION_VITS:
            return None
        model, classifier = TORCHVISION_VITS[sizes], "heads"
        arguments = {"image_size": encoder.image_size}
        renamed = {to_torchvision(key): value for key, value in state.items()}
    else:
        return None

    def build() -> nn.Module:
        network: nn.Module = getattr(torchvision.models, model)(**arguments)
        setattr(network, classifier, nn.Identity())
        return network

    shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    call = f"model = torchvision.models.{model}({shown}); model.{classifier} = torch.nn.Identity()"
    return Export(renamed, {"model": model, "arguments": arguments, "call": call}, build)


def _to_safetensors(encoder: Encoder, state: Mapping[str, Tensor]) -> Export:
    return Export(
        dict(state),
        {"call": "encoder, meta = hvp.common.evaluation.checkpoints.load_encoder(Path(FILE))"},
        lambda: encoder,
    )


EXPORTS: dict[Library, Callable[[Encoder, Mapping[str, Tensor]], Export | None]] = {
    "timm": _to_timm,
    "torchvision": _to_torchvision,
    "safetensors": _to_safetensors,
}
