"""Convolutional encoders: ResNet-50, ResNet-18 (also for images of CIFAR's size), and a small network for two cores.

The blocks are timm's. Their parameter names and initialisation match torchvision's, which the upstream trainers use.

# B images, D feature width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn

from hvp.common.errors import UserError


class _Pooled:
    """Encoder whose only feature is the mean over the last map; it has no blocks or patches to choose from."""

    num_blocks = 0
    fc: nn.Module
    """The identity, or a method's own module, such as a projector."""

    def probe_features(self, x: Tensor, n_last_blocks: int, avgpool: bool) -> Tensor:
        """Return the pooled feature, [B, D].

        Raises:
            UserError: anything but one block without `avgpool` is requested.
        """
        if n_last_blocks != 1 or avgpool:
            raise UserError(
                f"n_last_blocks = {n_last_blocks} and avgpool = {avgpool}, but a convolutional network has one pooled "
                "feature.\n    Set n_last_blocks to 1 and avgpool to false."
            )
        feature: Tensor = self(x)  # type: ignore[operator]
        return feature


class ResNet(_Pooled, TimmResNet):
    """ResNet without a classifier: images [B, 3, H, W] to features [B, embed_dim].

    `fc` is the identity; SimSiam, like its upstream, puts the projector there.

    Args:
        bottleneck: blocks of three convolutions (ResNet-50) rather than two (ResNet-18).
        layers: number of blocks in each stage.
        zero_init_residual: start every residual branch at zero.
        small_images: use a 3 x 3 stem of stride 1 without pooling, for images of 32 pixels.
    """

    def __init__(
        self,
        *,
        bottleneck: bool,
        layers: tuple[int, int, int, int],
        zero_init_residual: bool = False,
        small_images: bool = False,
    ) -> None:
        block: Any = Bottleneck if bottleneck else BasicBlock  # timm is annotated to take an instance
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

    Three convolutions of stride 2 without pooling are as fast, but learn the embedded dataset much more slowly. There
    are no residual branches, so `zero_init_residual` has no effect.
    """

    embed_dim = 96

    def __init__(self, *, zero_init_residual: bool = False) -> None:
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
        """Images [B, 3, H, W] to features [B, 96], passed through `fc`."""
        feature: Tensor = self.fc(self.pooled(x))
        return feature


ConvNet = ResNet | ConvNetMicro


CONVNETS: dict[str, Callable[..., ConvNet]] = {
    "resnet50": partial(ResNet, bottleneck=True, layers=(3, 4, 6, 3)),
    "resnet18": partial(ResNet, bottleneck=False, layers=(2, 2, 2, 2)),
    "resnet18_cifar": partial(ResNet, bottleneck=False, layers=(2, 2, 2, 2), small_images=True),
    "convnet_micro": ConvNetMicro,
}
"""Constructors, which take `zero_init_residual`; 23.5 M, 11.2 M, 11.2 M and 0.08 M parameters."""


def convnet_from_state(state: Mapping[str, Tensor]) -> ConvNet | None:
    """Like `encoder_from_state()`, for convolutional encoders."""
    if "layer4.2.conv3.weight" in state and "layer3.6.conv3.weight" not in state:
        return CONVNETS["resnet50"]()
    stem = state.get("conv1.weight")
    if stem is not None and "layer4.1.conv2.weight" in state:
        if any(key in state for key in ("layer3.2.conv2.weight", "layer4.2.conv2.weight", "layer4.1.conv3.weight")):
            return None  # deeper, or with other blocks
        archs: dict[tuple[int, ...], str] = {(64, 3, 7, 7): "resnet18", (64, 3, 3, 3): "resnet18_cifar"}
        arch = archs.get(tuple(stem.shape))
        return CONVNETS[arch]() if arch else None
    if "stages.3.0.weight" in state and "pos_embed" not in state:
        return ConvNetMicro()
    return None
