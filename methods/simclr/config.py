"""The configuration of SimCLR. Defaults are those of HVP's released code, branch simclr, unless said otherwise."""

import math
from typing import Literal

from pydantic import Field, model_validator

from hvp.common.config.resolving import Epochs, Fraction, LearningRate, Scale, Section, Temperature, Weight, Width
from hvp.common.config.view_sections import TwoViewConfig, TwoViews


class ModelConfig(Section):
    """Backbone and projector."""

    arch: Literal["resnet50", "resnet18", "resnet18_cifar", "convnet_micro"] = "resnet50"
    """Backbone. `resnet18_cifar` has a 3 x 3 stem without pooling, for 32 pixels; `convnet_micro` is ours, and tiny."""

    zero_init_residual: bool = True
    """Start every residual branch at zero. `convnet_micro` has none."""

    proj_hidden_dim: Width = 2048
    """Width of the projector's hidden layers."""

    out_dim: Width = 128
    """Width of the projections, which the loss compares."""

    num_proj_layers: int = Field(2, ge=2, le=16)
    """Linear layers of the projector. google-research/simclr, tf2: 3."""

    use_bn_in_head: bool = True
    """Batch norm after every layer of the projector."""


class LossConfig(Section):
    """NT-Xent."""

    temperature: Temperature = 0.1
    """Divides the cosines. Fixed in HVP's code; google-research/simclr: 0.1, on CIFAR-10 0.5."""


class OptimConfig(Section):
    """Optimiser and its schedule, which is a function of the step."""

    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    """LARS (trust 0.001) and SGD have a momentum of 0.9."""

    base_lr: LearningRate = 0.3
    """Learning rate after warm-up, before `lr_scaling`. google-research/simclr: 0.3 linear, or 0.075 with sqrt."""

    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """`linear`: the run uses base_lr * batch_size / 256; `sqrt`: base_lr * sqrt(batch_size), for smaller batches."""

    min_lr: float = Field(1e-6, ge=0, le=1e6)
    """Learning rate at the end of the cosine. Not scaled by the batch size. google-research/simclr: 0."""

    warmup_epochs: Epochs = 10
    """Linear warm-up of the learning rate from 0, epochs."""

    weight_decay: Weight = 1e-4
    """Weight decay; biases and 1-D parameters have none. SimCLR paper: 1e-6."""


class ViewsConfig(TwoViews):
    """The distribution of views, one for all of them (SimCLRTransform)."""

    crop_scale: Scale = (0.08, 1.0)
    """Area of a view, as a fraction of the image's, (min, max)."""

    brightness: Fraction = 0.8
    """Jitter's brightness factor is drawn from 1 +- this."""

    contrast: Fraction = 0.8
    """Jitter's contrast factor is drawn from 1 +- this."""

    saturation: Fraction = 0.8
    """Jitter's saturation factor is drawn from 1 +- this."""

    hue: float = Field(0.2, ge=0, le=0.5)
    """Jitter's hue shift is drawn from +- this, as a fraction of the circle."""


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
                "without another one to tell it from: NT-Xent needs at least 2 a part"
            )
        return self

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up, by the scaling rule of `optim.lr_scaling`."""
        batch_size = self.train.batch_size
        scale = math.sqrt(batch_size) if self.optim.lr_scaling == "sqrt" else batch_size / 256
        return self.optim.base_lr * scale

    def objective_bytes(self, images: int) -> int:
        """The similarities of both views of a process's images, float32."""
        return 4 * (2 * images) ** 2

    def notes(self) -> list[str]:
        """That parts of a batch change the objective, where there are any."""
        train = self.train
        if train.accumulate == 1:
            return super().notes()
        part = train.batch_size // train.accumulate
        return [
            f"train.accumulate = {train.accumulate} changes the objective: views have {2 * part - 2} negatives, those "
            f"of their part, instead of {2 * train.batch_size - 2}",
            *super().notes(),
        ]
