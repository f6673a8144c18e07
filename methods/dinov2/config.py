"""The configuration of DINOv2. Defaults are those of facebookresearch/dinov2, configs/ssl_default_config.yaml with
configs/train/vitl16_short.yaml over it, unless said otherwise."""

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
    """The backbone, of student and teacher."""

    arch: Literal["vit_micro", "vit_small", "vit_base", "vit_large"] = "vit_large"
    """`vit_micro` is ours: width 96, depth 3, a convolutional stem, for pictures of 32 pixels."""

    patch_size: PatchSize = 16
    """Height and width of a patch, pixels. 14 for the upstream's released networks."""

    drop_path_rate: Fraction = 0.3
    """Stochastic depth of the student; the teacher has none."""

    drop_path_uniform: bool = True
    """All blocks have that rate; off, it grows linearly from 0 at the first block."""

    layerscale: float = Field(1e-5, ge=0, le=10)
    """LayerScale's gains at the start; 0: no LayerScale."""

    ffn_layer: Literal["mlp", "swiglu"] = "mlp"
    """Feed-forward layers: a perceptron, or gated (the upstream's ViT-L/14 and ViT-g/14 recipes)."""

    num_register_tokens: int = Field(0, ge=0, le=256)
    """Tokens that hold no patch. Positions are then interpolated as in the released networks that have them."""


class HeadConfig(Section):
    """A projection head."""

    head_n_prototypes: Prototypes = 65536
    """Prototypes."""

    head_bottleneck_dim: Width = 256
    """Width of the head's normalised output, before the prototypes."""

    head_nlayers: int = Field(3, ge=1, le=16)
    """Linear layers before the prototypes."""

    head_hidden_dim: Width = 2048
    """Width of the hidden layers."""


class DinoConfig(HeadConfig):
    """The [CLS] term, KoLeo, and the head of [CLS] tokens."""

    loss_weight: Weight = 1.0
    """Weight of the [CLS] cross-entropy."""

    koleo_loss_weight: Weight = 0.1
    """Weight of KoLeo on each of the two global views."""


class IbotConfig(HeadConfig):
    """The masked-patch term, and the head of patches where it is separate."""

    loss_weight: Weight = 1.0
    """Weight of the masked-patch cross-entropy."""

    mask_sample_probability: Fraction = Field(0.5, gt=0)
    """Share of the global crops of a micro-batch that are masked."""

    mask_ratio_min_max: FractionRange = (0.1, 0.5)
    """Smallest and largest share of a masked crop's patches."""

    separate_head: bool = False
    """Patches have a head of their own, with this section's sizes; off, they go through that of [CLS] tokens."""


class TeacherConfig(Section):
    """The teacher and its targets."""

    momentum_teacher: Fraction = 0.992
    """EMA momentum at the first step."""

    final_momentum_teacher: Fraction = 1.0
    """EMA momentum to which a cosine takes it."""

    warmup_teacher_temp: Temperature = 0.04
    """Temperature at the start."""

    teacher_temp: Temperature = 0.07
    """Temperature after its linear warm-up."""

    warmup_teacher_temp_epochs: Epochs = 30
    """Length of that warm-up, epochs (see optim.epoch_length)."""

    centering: Literal["centering", "sinkhorn_knopp"] = "centering"
    """What keeps targets from collapsing: an EMA of the teacher's mean logits is subtracted, or the targets of a batch
    are spread over the prototypes evenly (Sinkhorn-Knopp; the upstream's ViT-L/14 and ViT-g/14 recipes)."""

    student_temp: Temperature = 0.1
    """The student's temperature."""

    center_momentum: Fraction = 0.9
    """EMA momentum of the centres."""


class OptimConfig(sections.TeacherOptimConfig):
    """Optimiser and schedules, which are functions of the step."""

    optimizer: Literal["adamw"] = "adamw"
    """AdamW, betas 0.9 and 0.999."""

    base_lr: LearningRate = 0.004
    """Learning rate after warm-up at a batch of 1024: the run uses base_lr * sqrt(batch_size / 1024)."""

    layerwise_decay: float = Field(0.9, ge=0.01, le=1)
    """A layer's learning rate is that of the layer above it times this."""

    patch_embed_lr_mult: float = Field(0.2, ge=1e-6, le=1000)
    """The patch embedding's learning rate is multiplied by this, too."""

    epoch_length: Every | None = None
    """Steps that warm-ups and freezing count as an epoch; null: those of a pass over the images. Upstream: 1250,
    whatever the data and the batch."""


class ViewsConfig(MultiCropViews):
    """The distribution of views: two global transforms and a local one (DataAugmentationDINO)."""

    global_crops_scale: Scale = (0.32, 1.0)
    """Area of a global crop, as a fraction of the image's, (min, max)."""

    local_crops_scale: Scale = (0.05, 0.32)
    """Area of a local crop, as a fraction of the image's, (min, max)."""


class TrainConfig(sections.TrainConfig):
    """The run itself."""

    sharding: Literal["ddp", "fsdp"] = "ddp"
    """With several processes, each has whole networks (DistributedDataParallel), or a share of student, teacher and
    optimiser (FSDP2)."""


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
        """What differs from the same run in one part."""
        parts = self.train.accumulate
        terms = ["KoLeo"] if self.dino.koleo_loss_weight else []
        terms += ["Sinkhorn-Knopp"] if self.teacher.centering == "sinkhorn_knopp" else []
        if parts == 1 or not terms:
            return super().notes()
        return [
            f"train.accumulate = {parts}: {' and '.join(terms)} will see the images of one part at a time",
            *super().notes(),
        ]

    def combination_slots(self) -> Slots:
        """Which combinations of those views `select()` compares; a global view's patch loss is on the diagonal."""
        return self.slots_of_crops(diagonal=True)

    @property
    def patch_head(self) -> HeadConfig:
        """The sizes of the head that patches go through."""
        return self.ibot if self.ibot.separate_head else self.dino

    def objective_bytes(self, images: int) -> int:
        """The student's logits of the [CLS] prototypes, float32."""
        return self.logits_bytes(images, self.dino.head_n_prototypes)

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up, by the square-root scaling rule."""
        return self.optim.base_lr * math.sqrt(self.train.batch_size / 1024)
