"""The configuration of SimSiam. Defaults are those of facebookresearch/simsiam, unless said otherwise."""

from typing import Literal

from pydantic import Field

from hvp.common.config.resolving import Fraction, LearningRate, Section, Weight, Width
from hvp.common.config.view_sections import TwoViewConfig, TwoViews


class ModelConfig(Section):
    """Encoder, projector and predictor."""

    arch: Literal["resnet50", "resnet18", "resnet18_cifar", "convnet_micro"] = "resnet50"
    """Encoder. `resnet18_cifar` has CIFAR's stem; `convnet_micro` is ours, for images of 32 pixels on two cores."""

    zero_init_residual: bool = True
    """Start every residual branch at zero."""

    dim: int = Field(2048, ge=2, le=65536)
    """Width D of the projection."""

    pred_dim: Width = 512
    """Width of the predictor's hidden layer."""

    projector_layers: Literal[2, 3] = 3
    """Linear layers of the projector. The paper takes 2 for CIFAR's ResNet-18 (appendix D)."""

    projector_bias: bool = True
    """The projector's last linear layer has a bias that is never trained. HVP's released code has none; batch norm
    takes it away again, so that it matters for the names in a checkpoint alone."""


class OptimConfig(Section):
    """Optimiser and its schedule: a cosine to 0 in steps of epochs, without warm-up."""

    optimizer: Literal["sgd"] = "sgd"
    """SGD, with momentum 0.9."""

    base_lr: LearningRate = 0.05
    """Learning rate of the first epoch, per 256 images: the run uses base_lr * batch_size / 256."""

    weight_decay: Weight = 0.0001
    """Of everything that is trained, batch norm and biases too."""

    fix_pred_lr: bool = False
    """The predictor keeps the learning rate of the first epoch. Upstream: off by default, on in its README."""


class ViewsConfig(TwoViews):
    """The distribution of views, one for all of them."""

    saturation: Fraction = 0.4
    """Jitter's saturation factor is drawn from 1 +- this."""


class SimSiamConfig(TwoViewConfig):
    """hvp pretrain simsiam"""

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    views: ViewsConfig = ViewsConfig()

    @property
    def peak_lr(self) -> float:
        """Learning rate of the first epoch."""
        return self.optim.base_lr * self.train.batch_size / 256  # linear scaling rule
