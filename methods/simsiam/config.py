"""Configuration of SimSiam. Defaults are those of facebookresearch/simsiam, unless stated otherwise."""

from typing import Literal

from pydantic import Field

from hvp.common.config.resolving import Fraction, LearningRate, Section, Weight, Width
from hvp.common.config.view_sections import TwoViewConfig, TwoViews


class ModelConfig(Section):
    """Encoder, projector and predictor."""

    arch: Literal["resnet50", "resnet18", "resnet18_cifar", "convnet_micro"] = "resnet50"
    """Encoder. `resnet18_cifar` has CIFAR's stem; `convnet_micro` is ours, for 32 x 32 images on two cores."""

    zero_init_residual: bool = True
    """Initialise every residual branch to zero."""

    dim: int = Field(2048, ge=2, le=65536)
    """Width D of the projection."""

    pred_dim: Width = 512
    """Width of the predictor's hidden layer."""

    projector_layers: Literal[2, 3] = 3
    """Linear layers of the projector. The paper uses 2 for CIFAR's ResNet-18 (appendix D)."""

    projector_bias: bool = True
    """Give the projector's last linear layer a bias, which is never trained. HVP's released code has none. Batch norm
    cancels it, so it matters only for the names in a checkpoint."""


class OptimConfig(Section):
    """Optimiser and learning-rate schedule: a cosine to 0, updated once per epoch, without warm-up."""

    optimizer: Literal["sgd"] = "sgd"
    """SGD with momentum 0.9."""

    base_lr: LearningRate = 0.05
    """Learning rate of the first epoch, per 256 images: the run uses base_lr * batch_size / 256."""

    weight_decay: Weight = 0.0001
    """Weight decay of all trained parameters, including batch norm and biases."""

    fix_pred_lr: bool = False
    """Keep the predictor at the first epoch's learning rate. Upstream: off by default, on in its README."""


class ViewsConfig(TwoViews):
    """Distribution of the views, the same for both."""

    saturation: Fraction = 0.4
    """Strength of the saturation jitter: the factor is drawn from 1 +- this."""


class SimSiamConfig(TwoViewConfig):
    """hvp pretrain simsiam"""

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    views: ViewsConfig = ViewsConfig()

    @property
    def peak_lr(self) -> float:
        """Learning rate of the first epoch, by the linear scaling rule."""
        return self.optim.base_lr * self.train.batch_size / 256
