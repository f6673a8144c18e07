"""Configuration of MoCo v3. Defaults are those of facebookresearch/moco-v3, main_moco.py, unless stated otherwise."""

from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, model_validator

from hvp.common.config import sections
from hvp.common.config.resolving import (
    CropSize,
    Epochs,
    Fraction,
    LearningRate,
    Scale,
    Section,
    Temperature,
    Weight,
    Width,
)
from hvp.common.config.view_sections import ColorConfig, check_num_patches
from hvp.common.hardviews import Slots
from hvp.common.views import ViewSlot
from hvp.methods.mocov3.vits import PATCH_SIZE

# Networks with a patch projection of a single convolution.
WITH_CONV1 = ("vit_small", "vit_base")


class ModelConfig(Section):
    """Encoders, projector and predictor."""

    arch: Literal["resnet50", "resnet18", "vit_small", "vit_base", "vit_micro", "convnet_micro"] = "resnet50"
    """Architecture of both encoders. ViT-S has 12 heads, and patches are 16 pixels wide; `vit_micro` (8 pixels) and
    `convnet_micro` are ours, for 32 x 32 images."""

    stop_grad_conv1: bool = False
    """Freeze the patch projection of `vit_small` or `vit_base`. Upstream: on in the ViTs' commands."""

    dim: int = Field(256, ge=2, le=65536)
    """Width D of projections, queries and keys."""

    mlp_dim: Width = 4096
    """Width of the hidden layers of projector and predictor."""

    momentum: Fraction = 0.99
    """EMA momentum of the momentum encoder, applied at every step."""

    momentum_cosine: bool = False
    """Raise the momentum to 1 along half a cosine over the run. Upstream: on in every command of its README."""


class LossConfig(Section):
    """InfoNCE."""

    temperature: Temperature = 1.0
    """Divides the cosines. Upstream: 1.0 for ResNet-50, 0.2 in the ViTs' commands."""


class OptimConfig(Section):
    """Optimiser and learning-rate schedule: a linear warm-up from 0, then half a cosine to 0."""

    optimizer: Literal["lars", "adamw"] = "lars"
    """LARS (trust coefficient 0.001, momentum 0.9) for ResNet-50, AdamW for ViTs."""

    base_lr: LearningRate = 0.6
    """Learning rate after warm-up, per 256 images: the run uses base_lr * batch_size / 256."""

    warmup_epochs: Epochs = 10
    """Linear warm-up of the learning rate from 0, epochs."""

    weight_decay: Weight = 1e-6
    """Weight decay, of all trained parameters with AdamW; LARS exempts biases and batch norm."""


class ViewsConfig(ColorConfig):
    """Distributions of the two views, which differ in blur and solarisation (BYOL's)."""

    crop_size: CropSize = 224
    """Height and width of a view, pixels."""

    crop_scale: Scale = (0.08, 1.0)
    """Area of a view's crop as a fraction of the image's area, (min, max). Upstream: from 0.2 for ResNet-50."""

    blur_view1: Fraction = 1.0
    """Probability of blur (sigma 0.1 to 2 pixels) in the first view."""

    blur_view2: Fraction = 0.1
    """Probability of blur in the second view."""

    solarize: Fraction = 0.2
    """Probability of solarisation (threshold 128) in the second view."""


class SelectionConfig(sections.SelectionConfig):
    """Selection of the pair of views to train on (HVP)."""

    candidates: int = Field(2, ge=1, le=32)
    """Views sampled with each of the two transforms. 2 gives HVP's total of 4."""

    pairs: Literal["by_transform", "any"] = "by_transform"
    """Pairs of views to compare: one of each transform (`by_transform`), or any two (`any`)."""


class MoCoConfig(sections.RunConfig):
    """hvp pretrain mocov3"""

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    views: ViewsConfig = ViewsConfig()
    selection: SelectionConfig = SelectionConfig()

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        model, train = self.model, self.train
        if model.stop_grad_conv1 and model.arch not in WITH_CONV1:
            raise ValueError(
                f"model.stop_grad_conv1 = true, but model.arch = {model.arch} has no patch projection of a single "
                f"convolution. Set it to false, or use {' or '.join(WITH_CONV1)}"
            )
        patch_size = PATCH_SIZE.get(model.arch, 1)
        if self.views.crop_size % patch_size:
            raise ValueError(
                f"views.crop_size = {self.views.crop_size} is not a multiple of {patch_size}, the patch size of "
                f"model.arch = {model.arch}"
            )
        if patch_size > 1:
            check_num_patches("views.crop_size", self.views.crop_size, patch_size)
        if self.optim.warmup_epochs > train.epochs:
            raise ValueError(
                f"optim.warmup_epochs = {self.optim.warmup_epochs} is longer than train.epochs = {train.epochs}"
            )
        if train.batch_size // train.accumulate < 2:
            raise ValueError(
                f"train.batch_size = {train.batch_size} in train.accumulate = {train.accumulate} parts leaves an image "
                "without negatives: InfoNCE needs at least 2 images in each part"
            )
        return self

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up, by the linear scaling rule."""
        return self.optim.base_lr * self.train.batch_size / 256

    def view_slots(self) -> tuple[ViewSlot, ...]:
        """Views that the loader samples for an image: those of the first transform, then of the second."""
        views, selection = self.views, self.selection
        view1 = views.transform(views.crop_size, views.crop_scale, views.blur_view1, "bilinear")
        view2 = replace(view1, blur=views.blur_view2, solarize=views.solarize)
        num_views = selection.candidates if selection.hard_views == "hvp" else 1
        return (
            ViewSlot("view1", view1, candidates=num_views, kept=1),
            ViewSlot("view2", view2, candidates=num_views, kept=1),
        )

    def combination_slots(self) -> Slots:
        """Pairs of those views that `select()` compares."""
        num_first, num_second = (slot.candidates for slot in self.view_slots())
        if self.selection.pairs == "any":
            return Slots.from_counts((num_first + num_second,), (2,))
        return Slots.from_counts((num_first, num_second), (1, 1))

    def objective_bytes(self, images: int) -> int:
        """Bytes of the similarities between the process's queries and keys, float32."""
        return 4 * images**2

    def notes(self) -> list[str]:
        """Warn that gradient accumulation changes the objective."""
        train = self.train
        if train.accumulate == 1:
            return super().notes()
        return [
            f"train.accumulate = {train.accumulate} changes the objective: a query has "
            f"{train.batch_size // train.accumulate - 1} negatives, from its part of the batch, instead of "
            f"{train.batch_size - 1}",
            *super().notes(),
        ]
