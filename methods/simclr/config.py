"""Configuration of SimCLR. Defaults are those of HVP's released code, branch simclr, unless stated otherwise."""

import math
from typing import Literal

from pydantic import Field, model_validator

from hvp.common.config.resolving import Epochs, Fraction, LearningRate, Scale, Section, Temperature, Weight, Width
from hvp.common.config.view_sections import TwoViewConfig, TwoViews


class ModelConfig(Section):
    """Backbone and projector."""

    arch: Literal["resnet50", "resnet18", "resnet18_cifar", "convnet_micro"] = "resnet50"
    """Backbone. `resnet18_cifar` has a 3 x 3 stem without pooling, for 32 x 32 images; `convnet_micro` is ours."""

    zero_init_residual: bool = True
    """Initialise every residual branch to zero. `convnet_micro` has none."""

    proj_hidden_dim: Width = 2048
    """Width of the projector's hidden layers."""

    out_dim: Width = 128
    """Width of the projections that the loss compares."""

    num_proj_layers: int = Field(2, ge=2, le=16)
    """Linear layers of the projector. google-research/simclr, tf2: 3."""

    use_bn_in_head: bool = True
    """Batch norm after every layer of the projector."""


class LossConfig(Section):
    """NT-Xent."""

    temperature: Temperature = 0.1
    """Divides the cosines. Fixed in HVP's code; google-research/simclr: 0.1, on CIFAR-10 0.5."""


class OptimConfig(Section):
    """Optimiser and learning-rate schedule."""

    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    """LARS (trust coefficient 0.001) and SGD have momentum 0.9."""

    base_lr: LearningRate = 0.3
    """Learning rate after warm-up, before `lr_scaling`. google-research/simclr: 0.3 with linear, 0.075 with sqrt."""

    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """`linear`: the run uses base_lr * batch_size / 256; `sqrt`: base_lr * sqrt(batch_size), for smaller batches."""

    min_lr: float = Field(1e-6, ge=0, le=1e6)
    """Learning rate at the end of the cosine. Not scaled by the batch size. google-research/simclr: 0."""

    warmup_epochs: Epochs = 10
    """Linear warm-up of the learning rate from 0, epochs."""

    weight_decay: Weight = 1e-4
    """Weight decay; biases and 1-D parameters have none. SimCLR paper: 1e-6."""


class ViewsConfig(TwoViews):
    """Distribution of the views, the same for both (SimCLRTransform)."""

    crop_scale: Scale = (0.08, 1.0)
    """Area of a view's crop as a fraction of the image's area, (min, max)."""

    brightness: Fraction = 0.8
    """Strength of the brightness jitter: the factor is drawn from 1 +- this."""

    contrast: Fraction = 0.8
    """Strength of the contrast jitter: the factor is drawn from 1 +- this."""

    saturation: Fraction = 0.8
    """Strength of the saturation jitter: the factor is drawn from 1 +- this."""

    hue: float = Field(0.2, ge=0, le=0.5)
    """Strength of the hue jitter: the shift is drawn from +- this, as a fraction of the colour circle."""


class SimclrConfig(TwoViewConfig):
    """hvp pretrain simclr"""

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    views: ViewsConfig = ViewsConfig()

    @model_validator(mode="after")
    def _values_fit(self) -> "SimclrConfig":
        train = self.train
        if self.optim.warmup_epochs > train.epochs:
            raise ValueError(
                f"optim.warmup_epochs = {self.optim.warmup_epochs} is longer than train.epochs = {train.epochs}"
            )
        if train.batch_size // train.accumulate < 2:
            raise ValueError(
                f"train.batch_size = {train.batch_size} in train.accumulate = {train.accumulate} parts leaves an image "
                "without negatives: NT-Xent needs at least 2 images in each part"
            )
        return self

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up, by the scaling rule of `optim.lr_scaling`."""
        batch_size = self.train.batch_size
        scale = math.sqrt(batch_size) if self.optim.lr_scaling == "sqrt" else batch_size / 256
        return self.optim.base_lr * scale

    def objective_bytes(self, images: int) -> int:
        """Bytes of the similarities between both views of all the process's images, float32."""
        return 4 * (2 * images) ** 2

    def notes(self) -> list[str]:
        """Warn that gradient accumulation changes the objective."""
        train = self.train
        if train.accumulate == 1:
            return super().notes()
        part = train.batch_size // train.accumulate
        return [
            f"train.accumulate = {train.accumulate} changes the objective: a view has {2 * part - 2} negatives, from "
            f"its part of the batch, instead of {2 * train.batch_size - 2}",
            *super().notes(),
        ]
