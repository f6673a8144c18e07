"""Configuration of DINO. Defaults are those of facebookresearch/dino, main_dino.py, unless stated otherwise."""

from typing import Literal

from pydantic import model_validator

from hvp.common.config.resolving import Epochs, Fraction, PatchSize, Prototypes, Section, Temperature, Width
from hvp.common.config.sections import TeacherOptimConfig
from hvp.common.config.view_sections import MultiCropConfig


class ModelConfig(Section):
    """Student and teacher."""

    arch: Literal["vit_tiny", "vit_small", "vit_base", "vit_micro", "resnet50"] = "vit_small"
    """Backbone. `vit_micro` is ours, for 32 x 32 images: width 96, depth 3, a convolutional stem."""

    patch_size: PatchSize = 16
    """Height and width of a ViT's patches, pixels. Smaller patches cost memory and time. Not used by ResNet-50."""

    drop_path_rate: Fraction = 0.1
    """Stochastic-depth rate of the student's last block; the teacher has none. Not used by ResNet-50."""

    out_dim: Prototypes = 65536
    """Number of prototypes, K."""

    norm_last_layer: bool = True
    """Fix the gain of the last layer's weight norm at 1. Upstream recommends off for ViT-S, on otherwise."""

    use_bn_in_head: bool = False
    """Use batch norm in the projection head."""

    head_hidden_dim: Width = 2048
    """Width of the head's hidden layers."""

    head_bottleneck_dim: Width = 256
    """Width of the head's normalised output, before the prototypes."""

    momentum_teacher: Fraction = 0.996
    """EMA momentum of the teacher at the first step; a cosine raises it to 1."""


class LossConfig(Section):
    """Cross-entropy between teacher and student."""

    warmup_teacher_temp: Temperature = 0.04
    """Teacher temperature at the start."""

    teacher_temp: Temperature = 0.04
    """Teacher temperature after its linear warm-up."""

    warmup_teacher_temp_epochs: Epochs = 0
    """Length of the teacher temperature's warm-up, epochs."""

    student_temp: Temperature = 0.1
    """Student temperature."""

    center_momentum: Fraction = 0.9
    """EMA momentum of the centre of the teacher's outputs."""


class OptimConfig(TeacherOptimConfig):
    """Optimiser and its schedules."""

    clip_by: Literal["tensor", "global"] = "tensor"
    """Clip each parameter tensor's gradient norm (upstream), or the global norm (HVP's released code)."""


class DinoConfig(MultiCropConfig):
    """hvp pretrain dino"""

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()

    @model_validator(mode="after")
    def _values_fit(self) -> "DinoConfig":
        if self.model.arch.startswith("vit"):
            self.check_patch_size(self.model.patch_size)
        for key, epochs in (
            ("optim.warmup_epochs", self.optim.warmup_epochs),
            ("loss.warmup_teacher_temp_epochs", self.loss.warmup_teacher_temp_epochs),
        ):
            if epochs > self.train.epochs:
                raise ValueError(f"{key} = {epochs} is longer than train.epochs = {self.train.epochs}")
        return self

    def objective_bytes(self, images: int) -> int:
        """Bytes of the student's logits, float32."""
        return self.logits_bytes(images, self.model.out_dim)

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up, by the linear scaling rule."""
        return self.optim.base_lr * self.train.batch_size / 256
