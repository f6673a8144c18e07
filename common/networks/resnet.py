"""Convolutional encoders: ResNet-50, ResNet-18, also for images of CIFAR's size, and a small one for two cores.

Blocks are timm's, whose parameter names and initialisation are torchvision's, which the upstream trainers take.

# B images, D feature width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn

from hvp.common.errors import UserError


class _Pooled:
    """An encoder whose feature is the mean over the last map; there are no blocks or patches to choose from."""

    num_blocks = 0
    fc: nn.Module
    """The identity, or what a method puts there, such as a projector."""

    def probe_features(self, x: Tensor, n_last_blocks: int, avgpool: bool) -> Tensor:
        """The pooled feature, [B, D]."""
        if n_last_blocks != 1 or avgpool:
            raise UserError(
                f"n_last_blocks = {n_last_blocks} and avgpool = {avgpool}, but a convolutional network has one pooled "
                "feature.\n    Set n_last_blocks to 1 and avgpool to false."
            )
        feature: Tensor = self(x)  # type: ignore[operator]
        return feature


class ResNet(_Pooled, TimmResNet):
    """A ResNet without classifier: images [B, 3, H, W] to features [B, embed_dim].

    Args:
        bottleneck: blocks of three convolutions (ResNet-50), or of two (ResNet-18).
        layers: blocks of each stage.
        zero_init_residual: start every residual branch at zero.
        small_images: a 3 x 3 stem of stride 1 without pooling, for images of 32 pixels.

    `fc` is the identity. SimSiam, as its upstream, puts the projector there.
    """

    def __init__(
        self,
        *,
        bottleneck: bool,
        layers: tuple[int, int, int, int],
        zero_init_residual: bool = False,
        small_images: bool = False,
    ) -> None:
        block: Any = Bottleneck if bottleneck else BasicBlock  # timm's annotation asks for an instance
        super().__init__(block, layers, num_classes=0, zero_init_last=zero_init_residual)
        self.embed_dim: int = self.num_features
        if small_images:
            stem = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
            nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
            self.add_module("conv1", stem)
            self.add_module("maxpool", nn.Identity())

    def pooled(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features before `fc`, [B, embed_dim]."""
        feature: Tensor = self.global_pool(self.forward_features(x))
        return feature


class ConvNetMicro(_Pooled, nn.Module):
    """Four convolutions with batch norm, 0.08 M parameters: for images of 32 pixels, on two cores.

    Three convolutions of stride 2 without pooling are as fast, and learn the embedded dataset much more slowly.
    """

    embed_dim = 96

    def __init__(self) -> None:
        super().__init__()

        def stage(c_in: int, c_out: int, stride: int = 1, pool: bool = False) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(c_in, c_out, kernel_size=3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(inplace=True),
                *([nn.MaxPool2d(2)] if pool else []),
            )

        self.stages = nn.Sequential(
            stage(3, 16, stride=2), stage(16, 32, pool=True), stage(32, 64, pool=True), stage(64, self.embed_dim)
        )
        self.fc = nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def pooled(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features before `fc`, [B, 96]."""
        maps: Tensor = self.stages(x)
        return maps.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features [B, 96], or to what `fc` makes of them."""
        feature: Tensor = self.fc(self.pooled(x))
        return feature


ConvNet = ResNet | ConvNetMicro


def resnet50(*, zero_init_residual: bool = False) -> ResNet:
    """ResNet-50, 23.5 M parameters, features of 2048."""
    return ResNet(bottleneck=True, layers=(3, 4, 6, 3), zero_init_residual=zero_init_residual)


def resnet18(*, zero_init_residual: bool = False) -> ResNet:
    """ResNet-18, 11.2 M parameters, features of 512."""
    return ResNet(bottleneck=False, layers=(2, 2, 2, 2), zero_init_residual=zero_init_residual)


def resnet18_cifar(*, zero_init_residual: bool = False) -> ResNet:
    """ResNet-18 with CIFAR's stem, 11.2 M parameters, features of 512."""
    return ResNet(bottleneck=False, layers=(2, 2, 2, 2), zero_init_residual=zero_init_residual, small_images=True)


def convnet_micro(*, zero_init_residual: bool = False) -> ConvNetMicro:
    """The small network of the `tiny` presets. It has no residual branches: `zero_init_residual` finds nothing."""
    return ConvNetMicro()


CONVNETS: dict[str, Callable[..., ConvNet]] = {
    "resnet50": resnet50,
    "resnet18": resnet18,
    "resnet18_cifar": resnet18_cifar,
    "convnet_micro": convnet_micro,
}


def convnet_from_state(state: Mapping[str, Tensor]) -> ConvNet | None:
    """The encoder that a backbone's state dict belongs to, told from names and shapes; its weights are not loaded.

    Args:
        state: state dict of a backbone alone, without prefixes such as `module.` or `encoder.`.

    Returns:
        None when the weights are none of ours. Entries the encoder does not have are not looked at: loading strictly
        finds them.
    """
    if "layer4.2.conv3.weight" in state and "layer3.6.conv3.weight" not in state:
        return resnet50()
    stem = state.get("conv1.weight")
    if stem is not None and "layer4.1.conv2.weight" in state:
        if any(key in state for key in ("layer3.2.conv2.weight", "layer4.2.conv2.weight", "layer4.1.conv3.weight")):
            return None  # deeper, or of other blocks
        builders = {torch.Size((64, 3, 7, 7)): resnet18, torch.Size((64, 3, 3, 3)): resnet18_cifar}
        return builders[stem.shape]() if stem.shape in builders else None
    if "stages.3.0.weight" in state and "pos_embed" not in state:
        return convnet_micro()
    return None
