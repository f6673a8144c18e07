"""Configuration of DINOv2. Defaults are those of facebookresearch/dinov2, configs/ssl_default_config.yaml overridden by
configs/train/vitl16_short.yaml, unless stated otherwise."""

import math
from typing import Literal

from pydantic import Field, model_validator

from hvp.common.config import sections
from hvp.common.config.resolving import (
    Epochs,
    Every,
    Fraction,
    FractionRange,
    LearningRate,
    PatchSize,
    Prototypes,
    Scale,
    Section,
    Temperature,
    Weight,
    Width,
)
from hvp.common.config.view_sections import MultiCropConfig, MultiCropViews
from hvp.common.hardviews import Slots


class ModelConfig(Section):
    """Backbone of student and teacher."""

    arch: Literal["vit_micro", "vit_small", "vit_base", "vit_large"] = "vit_large"
    """Backbone. `vit_micro` is ours, for 32 x 32 images: width 96, depth 3, a convolutional stem."""

    patch_size: PatchSize = 16
    """Height and width of a patch, pixels. Upstream's released networks: 14."""

    drop_path_rate: Fraction = 0.3
    """Stochastic-depth rate of the student; the teacher has none."""

    drop_path_uniform: bool = True
    """Give all blocks that rate; off, it grows linearly from 0 at the first block."""

    layerscale: float = Field(1e-5, ge=0, le=10)
    """Initial gains of LayerScale; 0: no LayerScale."""

    ffn_layer: Literal["mlp", "swiglu"] = "mlp"
    """Feed-forward layers: an MLP, or SwiGLU as in upstream's ViT-L/14 and ViT-g/14 recipes."""

    num_register_tokens: int = Field(0, ge=0, le=256)
    """Number of register tokens. With any, positions are interpolated as in the released networks with registers."""


class HeadConfig(Section):
    """A projection head."""

    head_n_prototypes: Prototypes = 65536
    """Number of prototypes."""

    head_bottleneck_dim: Width = 256
    """Width of the head's normalised output, before the prototypes."""

    head_nlayers: int = Field(3, ge=1, le=16)
    """Linear layers before the prototypes."""

    head_hidden_dim: Width = 2048
    """Width of the hidden layers."""


class DinoConfig(HeadConfig):
    """[CLS] term, KoLeo, and the [CLS] head."""

    loss_weight: Weight = 1.0
    """Weight of the [CLS] cross-entropy."""

    koleo_loss_weight: Weight = 0.1
    """Weight of KoLeo for each of the two global views."""


class IbotConfig(HeadConfig):
    """Masked-patch term, and the patch head if it is separate."""

    loss_weight: Weight = 1.0
    """Weight of the masked-patch cross-entropy."""

    mask_sample_probability: Fraction = Field(0.5, gt=0)
    """Share of the global crops of a micro-batch that are masked."""

    mask_ratio_min_max: FractionRange = (0.1, 0.5)
    """Smallest and largest share of a masked crop's patches."""

    separate_head: bool = False
    """Use a separate head for patches, with this section's sizes; off, patches share the [CLS] head."""


class TeacherConfig(Section):
    """The teacher and its targets."""

    momentum_teacher: Fraction = 0.992
    """EMA momentum of the teacher at the first step."""

    final_momentum_teacher: Fraction = 1.0
    """EMA momentum of the teacher at the end of its cosine."""

    warmup_teacher_temp: Temperature = 0.04
    """Teacher temperature at the start."""

    teacher_temp: Temperature = 0.07
    """Teacher temperature after its linear warm-up."""

    warmup_teacher_temp_epochs: Epochs = 30
    """Length of the teacher temperature's warm-up, epochs (see optim.epoch_length)."""

    centering: Literal["centering", "sinkhorn_knopp"] = "centering"
    """Protection against collapse: `centering` subtracts an EMA of the teacher's mean logits; `sinkhorn_knopp` spreads
    a batch's targets evenly over the prototypes, as in upstream's ViT-L/14 and ViT-g/14 recipes."""

    student_temp: Temperature = 0.1
    """Student temperature."""

    center_momentum: Fraction = 0.9
    """EMA momentum of the centres of the teacher's outputs."""


class OptimConfig(sections.TeacherOptimConfig):
    """Optimiser and its schedules."""

    optimizer: Literal["adamw"] = "adamw"
    """AdamW with betas 0.9 and 0.999."""

    base_lr: LearningRate = 0.004
    """Learning rate after warm-up at batch size 1024: the run uses base_lr * sqrt(batch_size / 1024)."""

    layerwise_decay: float = Field(0.9, ge=0.01, le=1)
    """Ratio of a layer's learning rate to that of the layer above it."""

    patch_embed_lr_mult: float = Field(0.2, ge=1e-6, le=1000)
    """Additional learning-rate multiplier for the patch embedding."""

    epoch_length: Every | None = None
    """Steps per epoch, as the unit of warm-ups and freezing; null: one pass over the images. Upstream: 1250, regardless
    of data set and batch size."""


class ViewsConfig(MultiCropViews):
    """Distribution of the views: two global transforms and a local one (DataAugmentationDINO)."""

    global_crops_scale: Scale = (0.32, 1.0)
    """Area of a global crop as a fraction of the image's area, (min, max)."""

    local_crops_scale: Scale = (0.05, 0.32)
    """Area of a local crop as a fraction of the image's area, (min, max)."""


class TrainConfig(sections.TrainConfig):
    """Length, batches, precision, checkpoints and sharding of a run."""

    sharding: Literal["ddp", "fsdp"] = "ddp"
    """Parallelism over several processes: `ddp` gives each whole networks (DistributedDataParallel); `fsdp` shards
    student, teacher and optimiser (FSDP2)."""


class DINOv2Config(MultiCropConfig):
    """hvp pretrain dinov2"""

    model: ModelConfig = ModelConfig()
    dino: DinoConfig = DinoConfig()
    ibot: IbotConfig = IbotConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    views: ViewsConfig = ViewsConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _values_fit(self) -> "DINOv2Config":
        self.check_patch_size(self.model.patch_size)
        return self

    def notes(self) -> list[str]:
        """Warn that gradient accumulation changes some of the objective's terms."""
        parts = self.train.accumulate
        terms = ["KoLeo"] if self.dino.koleo_loss_weight else []
        terms += ["Sinkhorn-Knopp"] if self.teacher.centering == "sinkhorn_knopp" else []
        if parts == 1 or not terms:
            return super().notes()
        return [
            f"train.accumulate = {parts}: {' and '.join(terms)} will see only one part of the batch at a time",
            *super().notes(),
        ]

    def combination_slots(self) -> Slots:
        """Combinations of those views that `select()` compares; a global view's patch loss is on the diagonal."""
        return self.slots_of_crops(diagonal=True)

    @property
    def patch_head(self) -> HeadConfig:
        """Sizes of the head that patches go through."""
        return self.ibot if self.ibot.separate_head else self.dino

    def objective_bytes(self, images: int) -> int:
        """Bytes of the student's [CLS] logits, float32."""
        return self.logits_bytes(images, self.dino.head_n_prototypes)

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up, by the square-root scaling rule."""
        return self.optim.base_lr * math.sqrt(self.train.batch_size / 1024)
