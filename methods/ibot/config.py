"""Configuration of iBOT. Defaults are those of bytedance/ibot, main_ibot.py, unless stated otherwise."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hvp.common.config.resolving import (
    Epochs,
    Fraction,
    PatchSize,
    Prototypes,
    Scale,
    Section,
    Temperature,
    Weight,
    Width,
)
from hvp.common.config.sections import TeacherOptimConfig
from hvp.common.config.view_sections import MultiCropConfig, MultiCropSelection, MultiCropViews
from hvp.common.hardviews import Slots

# YAML has lists only, so a tuple must accept one; its items stay strictly typed.
Fractions = Annotated[tuple[Fraction, ...], Field(strict=False, min_length=1, max_length=64)]


class ModelConfig(Section):
    """Student and teacher."""

    arch: Literal["vit_tiny", "vit_small", "vit_base", "vit_micro"] = "vit_small"
    """Backbone. `vit_micro` is ours, for 32 x 32 images: width 96, depth 3, a convolutional stem."""

    patch_size: PatchSize = 16
    """Height and width of a patch, pixels. Smaller patches cost memory and time."""

    drop_path_rate: Fraction = 0.1
    """Stochastic-depth rate of the student's last block; the teacher has none."""

    out_dim: Prototypes = 8192
    """Number of [CLS] prototypes, K."""

    patch_out_dim: Prototypes = 8192
    """Number of patch prototypes, K2; equal to K with a shared head."""

    shared_head: bool = True
    """Use the same prototypes for patches and [CLS] tokens, in student and teacher, as in the upstream's recipes."""

    norm_last_layer: bool = True
    """Fix the gain of the last layers' weight norm at 1. Upstream's ViT-S recipe: off."""

    norm_in_head: Literal["bn"] | None = None
    """Normalisation in the projection head. `bn`: batch norm, over [CLS] tokens and over patches separately."""

    head_hidden_dim: Width = 2048
    """Width of the head's hidden layers."""

    head_bottleneck_dim: Width = 256
    """Width of the head's normalised output, before the prototypes."""

    momentum_teacher: Fraction = 0.996
    """EMA momentum of the teacher at the first step; a cosine raises it to 1."""


class MasksConfig(Section):
    """Masks that hide patches of the global views from the student."""

    pred_ratio: Fractions = (0.3,)
    """Shares of patches to mask; each view draws one of them. Upstream's recipes: 0 and 0.3."""

    pred_ratio_var: Fractions = (0.0,)
    """Largest deviation from each ratio, drawn uniformly. Upstream's recipes: 0 and 0.2."""

    pred_shape: Literal["block", "rand"] = "block"
    """Mask rectangles of patches, or single patches."""

    pred_start_epoch: Epochs = 0
    """First epoch with masks."""


class LossConfig(Section):
    """Cross-entropies between teacher and student, for [CLS] tokens and for masked patches."""

    lambda1: Weight = 1.0
    """Weight of the [CLS] term."""

    lambda2: Weight = 1.0
    """Weight of the patch term."""

    warmup_teacher_temp: Temperature = 0.04
    """Teacher temperature for [CLS] tokens at the start."""

    teacher_temp: Temperature = 0.04
    """Teacher temperature for [CLS] tokens after its linear warm-up."""

    warmup_teacher_patch_temp: Temperature = 0.04
    """Teacher temperature for patches at the start."""

    teacher_patch_temp: Temperature = 0.07
    """Teacher temperature for patches after its linear warm-up, which begins with masking."""

    warmup_teacher_temp_epochs: Epochs = 30
    """Length of both warm-ups, epochs."""

    student_temp: Temperature = 0.1
    """Student temperature."""

    center_momentum: Fraction = 0.9
    """EMA momentum of the centre of the teacher's [CLS] outputs."""

    center_momentum2: Fraction = 0.9
    """EMA momentum of the centre of the teacher's patch outputs."""


class ViewsConfig(MultiCropViews):
    """Distribution of the views: two global transforms and a local one (DataAugmentationiBOT)."""

    local_crops_number: int = Field(0, ge=0, le=256)
    """Local crops per image to train on. HVP: none; upstream's recipes: 10."""

    global_crops_scale: Scale = (0.14, 1.0)
    """Area of a global crop as a fraction of the image's area, (min, max)."""


class IbotSelection(MultiCropSelection):
    """Selection of the crops to train on (HVP)."""

    local_candidates: int = Field(0, ge=0, le=256)
    """Local crops sampled. HVP: none."""


class IbotConfig(MultiCropConfig):
    """hvp pretrain ibot"""

    model: ModelConfig = ModelConfig()
    masks: MasksConfig = MasksConfig()
    loss: LossConfig = LossConfig()
    optim: TeacherOptimConfig = TeacherOptimConfig()
    views: ViewsConfig = ViewsConfig()
    selection: IbotSelection = IbotSelection()

    @model_validator(mode="after")
    def _values_fit(self) -> "IbotConfig":
        model, masks = self.model, self.masks
        self.check_patch_size(model.patch_size)
        if model.shared_head and model.patch_out_dim != model.out_dim:
            raise ValueError(
                f"model.patch_out_dim = {model.patch_out_dim}, but a shared head has model.out_dim = {model.out_dim} "
                "prototypes for both. Set them equal, or model.shared_head to false"
            )
        if len(masks.pred_ratio) != len(masks.pred_ratio_var):
            raise ValueError(
                f"masks.pred_ratio has {len(masks.pred_ratio)} values and masks.pred_ratio_var "
                f"{len(masks.pred_ratio_var)}. Give one variation for each ratio"
            )
        for ratio, variation in zip(masks.pred_ratio, masks.pred_ratio_var, strict=True):
            if variation > min(ratio, 1 - ratio):
                raise ValueError(
                    f"masks.pred_ratio = {ratio} with masks.pred_ratio_var = {variation} leaves the range from 0 to 1"
                )
        epochs = self.train.epochs
        warmup, start = self.loss.warmup_teacher_temp_epochs, masks.pred_start_epoch
        if self.optim.warmup_epochs > epochs:
            raise ValueError(f"optim.warmup_epochs = {self.optim.warmup_epochs} is longer than train.epochs = {epochs}")
        if warmup + start > epochs:
            raise ValueError(
                f"loss.warmup_teacher_temp_epochs = {warmup} after masks.pred_start_epoch = {start} is longer than "
                f"train.epochs = {epochs}"
            )
        return self

    def combination_slots(self) -> Slots:
        """Combinations of those views that `select()` compares; a global view's patch loss is on the diagonal."""
        return self.slots_of_crops(diagonal=True)

    def objective_bytes(self, images: int) -> int:
        """Bytes of the student's [CLS] logits, float32."""
        return self.logits_bytes(images, self.model.out_dim)

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up, by the linear scaling rule."""
        return self.optim.base_lr * self.train.batch_size / 256
