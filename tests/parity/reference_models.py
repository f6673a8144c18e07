"""Sizes of the reference models, inferred from the names and shapes in `checkpoint_keys.json.gz`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import nn

from hvp.common.networks.resnet import CONVNETS, ConvNet
from hvp.common.networks.vision_transformer import build_vit

VITS = {
    (192, 12): "vit_tiny",
    (384, 12): "vit_small",
    (768, 12): "vit_base",
    (1024, 24): "vit_large",
    (1536, 40): "vit_giant2",
}
"""Names of the Vision Transformers, by width and depth."""

RESNETS = {
    (True, (3, 4, 6, 3), 7): "resnet50",
    (False, (2, 2, 2, 2), 7): "resnet18",
    (False, (2, 2, 2, 2), 3): "resnet18_cifar",
}
"""Names of the ResNets, by use of bottlenecks, blocks per stage, and the stem's kernel size."""

# HVP's released code uses PyTorch's parametrisations for weight norm, which name the two tensors differently. Its own
# network for CIFAR names a block's shortcut differently from torchvision.
RENAMED = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
    ".shortcut.": ".downsample.",
}

CHUNKED_BLOCK = re.compile(r"\bblocks\.\d+\.(\d+)\.")
"""DINOv2's training checkpoints put the chunk into a block's name: blocks.<chunk>.<block>."""

Shapes = Mapping[str, list[int]]


@dataclass(frozen=True)
class Vit:
    """Sizes of a Vision Transformer."""

    arch: str
    patch_size: int
    img_size: int
    depth: int


def described(module: nn.Module) -> list[list[Any]]:
    """Describe a module's state dict like the fixture: [name, shape, dtype] in order."""
    return [[name, list(p.shape), str(p.dtype).removeprefix("torch.")] for name, p in module.state_dict().items()]


def own_name(name: str) -> str:
    """Translate the name of an entry in a reference model's state dict to ours."""
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return CHUNKED_BLOCK.sub(r"blocks.\1.", name.removeprefix("module."))


def renamed(entries: Iterable[list[Any]]) -> list[list[Any]]:
    """Rename a reference model's entries to our names."""
    return [[own_name(name), *rest] for name, *rest in entries]


def shapes_of(entries: Iterable[list[Any]], part: str = "") -> Shapes:
    """Shapes by our names; for a part, such as `backbone`, by the names within it."""
    prefix = f"{part}." if part else ""
    return {name.removeprefix(prefix): shape for name, shape, *_ in renamed(entries) if name.startswith(prefix)}


def vit_of(shapes: Shapes) -> Vit | None:
    """Sizes of the Vision Transformer with these shapes; None if they are a ResNet's."""
    if "pos_embed" not in shapes:
        return None
    _, tokens, width = shapes["pos_embed"]
    depth = sum(name.startswith("blocks.") and name.endswith(".norm1.weight") for name in shapes)
    patch_size = shapes["patch_embed.proj.weight"][-1]
    return Vit(VITS[width, depth], patch_size, isqrt(tokens - 1) * patch_size, depth)


def arch_of(shapes: Shapes) -> str:
    """Name of the backbone with these shapes."""
    vit = vit_of(shapes)
    if vit is not None:
        return vit.arch
    first, second, third, fourth = (
        sum(name.startswith(f"layer{stage}.") and name.endswith(".conv1.weight") for name in shapes)
        for stage in (1, 2, 3, 4)
    )
    return RESNETS["layer1.0.conv3.weight" in shapes, (first, second, third, fourth), shapes["conv1.weight"][-1]]


def build_encoder(shapes: Shapes, *, mask_token: bool = False) -> nn.Module:
    """Build the backbone with these shapes, like DINO and iBOT."""
    vit = vit_of(shapes)
    if vit is None:
        return build_convnet(shapes)
    return build_vit(vit.arch, patch_size=vit.patch_size, img_size=vit.img_size, mask_token=mask_token)


def build_convnet(shapes: Shapes) -> ConvNet:
    """Build the ResNet with these shapes."""
    return CONVNETS[arch_of(shapes)]()


def linear_layers(shapes: Shapes, part: str) -> list[list[int]]:
    """Shapes [out, in] of the linear layers of a perceptron, from first to last."""
    return [
        shape
        for name, shape in shapes.items()
        if name.startswith(f"{part}.") and name.endswith("weight") and len(shape) == 2
    ]


def head_sizes(shapes: Shapes) -> dict[str, Any]:
    """Arguments of DINOHead for these shapes, except `norm_last_layer`, which no shape shows."""
    layers = linear_layers(shapes, "mlp")
    return {
        "in_dim": layers[0][1],
        "out_dim": shapes["last_layer.weight_v"][0],
        "use_bn": "mlp.1.running_mean" in shapes,
        "nlayers": len(layers),
        "hidden_dim": layers[0][0],
        "bottleneck_dim": layers[-1][0],
    }
