"""The configuration sections that every method has."""

from abc import ABC, abstractmethod
from typing import Literal

from pydantic import Field, model_validator

from hvp.common.config.resolving import Epochs, Every, Fraction, LearningRate, Section, Weight
from hvp.common.data import ShapesOptions
from hvp.common.hardviews import Slots
from hvp.common.views import ViewSlot


class DataConfig(Section):
    """Where images come from and how they are read."""

    path: str | None = Field(None, max_length=4096)
    """A folder of images, or `shapes`, the embedded dataset. Pretraining needs no labels."""

    shapes: ShapesOptions = ShapesOptions()
    """How the embedded dataset is drawn."""

    loader: Literal["fast", "pil"] = "fast"
    """View pipeline: `fast` (OpenCV) or `pil` (Pillow, as the upstreams do it)."""

    workers: int | None = Field(None, ge=0, le=256)
    """Processes that load views; 0 loads in the training process itself; null suits the cores at hand."""

    on_bad_image: Literal["error", "skip"] = "error"
    """An image that does not decode ends the run, or is replaced by the next one, counted and listed."""

    timeout: int = Field(300, ge=0, le=604_800)
    """Seconds without a new image after which a run that waits for its loader saves and ends; 0: it waits for ever."""


class SelectionConfig(Section):
    """Which of the sampled views are trained on (HVP)."""

    hard_views: Literal["none", "hvp"] = "hvp"
    """`hvp` samples extra views and selects; `none` is the upstream's vanilla step."""

    policy: Literal["hardest", "easiest", "random"] = "hardest"
    """`hardest` is HVP; `easiest` its appendix G.2 (expected to collapse); `random` a control at the same cost."""

    search: Literal["sampled", "exact"] = "sampled"
    """`sampled` compares random combinations (the paper); `exact` finds the best of all."""

    comparisons: int = Field(128, ge=1, le=100_000)
    """Random combinations compared for each image. HVP paper, appendix I: 128; appendix J times 64."""

    per_image: bool = False
    """Draw other combinations for every image. HVP's released code shares one list over the batch."""

    mode: Literal["train", "eval"] = "train"
    """Mode of the networks while they score. `train` (released code) has stochastic depth and batch statistics on."""

    every: Every = 1
    """Select on every n-th step only; the steps between train on the first candidates. HVP paper, Table 15."""

    start: Fraction = 0.0
    """Begin selecting after this fraction of the steps. The papers: 0."""


class RescueConfig(Section):
    """Strong views for the images whose two views are most alike (Rescue).

    The paper leaves some of this open; the defaults follow its text, and each has a switch.
    """

    enabled: bool = False
    """Add the Rescue loss."""

    k: int | None = Field(None, ge=0, le=2**20)
    """Images of a step that get a strong view, the easiest over all processes and parts; 0: none; null:
    batch_size / 64, the paper's rule, rounded up."""

    s: Weight = 1.0
    """Weight of the Rescue loss. Paper: 0.05 (MoCo v3), 0.75 (SimCLR), 1 (DINOv2)."""

    feature: Literal["projection", "backbone"] = "projection"
    """What is compared, and pulled: the projection head's output z = g(f(x)), or the encoder's f(x)."""

    stop_gradient: bool = False
    """Pull the strong view only, and take the common one as given. The paper's Equation 1 has no stop-gradient."""

    direction: Literal["pull", "push"] = "pull"
    """`pull` the strong view to the common one (the paper's section 3); `push` is the sign that Equation 1 prints."""

    num_ops: int = Field(2, ge=0, le=14)
    """RandAugment's operations, of FixMatch's 14, each with a random magnitude."""

    cutout: Fraction = 0.5
    """Side of the grey square, as a fraction of the image's shorter side; 0: none. FixMatch: 0.5."""


class TrainConfig(Section):
    """The run itself."""

    epochs: int = Field(100, ge=1, le=1_000_000)
    """Passes over the training images."""

    batch_size: int = Field(512, ge=1, le=2**20)
    """Images of one optimiser step, over all processes and accumulated parts."""

    accumulate: int = Field(1, ge=1, le=2**20)
    """Parts in which each process goes through its share of the batch, to save memory. The step stays the same."""

    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Autocast type; parameters and losses stay float32. fp16 uses a gradient scaler and needs a GPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is the GPU where there is one."""

    seed: int = Field(0, ge=0, lt=2**64)
    """Of weights, views, image order, combinations and stochastic depth."""

    save_every: int = Field(0, ge=0, le=10**9)
    """Write last.pt every that many steps; 0: once an epoch."""

    keep_every: Epochs = 0
    """Keep a copy of the checkpoint every that many epochs; 0: none but last.pt."""

    log_every: Every = 10
    """Steps between two lines of metrics.jsonl."""


class TeacherOptimConfig(Section):
    """Optimiser of a student that follows a teacher (DINO and its kin), and its schedules, which are functions of the
    step."""

    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """AdamW for ViTs; SGD (momentum 0.9) or LARS for convnets."""

    base_lr: LearningRate = 0.0005
    """Learning rate after warm-up, per 256 images: the run uses base_lr * batch_size / 256."""

    min_lr: float = Field(1e-6, ge=0, le=1e6)
    """Learning rate at the end of the cosine. Not scaled by the batch size."""

    warmup_epochs: Epochs = 10
    """Linear warm-up of the learning rate from 0, epochs."""

    weight_decay: Weight = 0.04
    """Weight decay at the start; biases and 1-D parameters have none."""

    weight_decay_end: Weight = 0.4
    """Weight decay at the end of its cosine."""

    clip_grad: float = Field(3.0, ge=0, le=1e6)
    """Largest gradient norm, of each parameter tensor unless the method says otherwise; 0: no clipping."""

    freeze_last_layer: Epochs = 1
    """Epochs in which the prototypes do not move."""


class RunConfig(Section, ABC):
    """What every method's configuration has. Its `optim` section names the `optimizer`."""

    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    selection: SelectionConfig = SelectionConfig()
    rescue: RescueConfig = RescueConfig()

    @abstractmethod
    def view_slots(self) -> tuple[ViewSlot, ...]:
        """What the loader samples for an image."""

    @abstractmethod
    def combination_slots(self) -> Slots:
        """Which combinations of those views `select()` compares."""

    @property
    @abstractmethod
    def peak_lr(self) -> float:
        """The learning rate after warm-up, scaled by the batch size."""

    def objective_bytes(self, images: int) -> int:
        """Bytes that the loss needs at once for so many images, at least; 0 where they are few."""
        return 0

    def notes(self) -> list[str]:
        """What whoever starts the run should know of its values; said when it starts, and by --dry-run."""
        if self.rescue.enabled and self.rescue.k != 0 and self.train.accumulate > 1 and not self.rescue.stop_gradient:
            return [
                f"train.accumulate = {self.train.accumulate}: Rescue acts in the last part, with gradient through the "
                "strong views alone (as rescue.stop_gradient)"
            ]
        return []

    @model_validator(mode="after")
    def _batch_divides(self) -> "RunConfig":
        if self.train.batch_size % self.train.accumulate:
            raise ValueError(
                f"train.batch_size = {self.train.batch_size} does not divide into train.accumulate = "
                f"{self.train.accumulate} equal parts"
            )
        return self

    @model_validator(mode="after")
    def _enough_to_rescue(self) -> "RunConfig":
        rescue, train = self.rescue, self.train
        if rescue.enabled and rescue.k is not None and rescue.k > train.batch_size:
            raise ValueError(
                f"rescue.k = {rescue.k}, but a step has only train.batch_size = {train.batch_size} images. The paper "
                f"takes a 64th of them, here {max(1, train.batch_size // 64)}"
            )
        return self
