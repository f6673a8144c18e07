"""Configuration sections that every method has."""

from abc import ABC, abstractmethod
from typing import Literal

from pydantic import Field, model_validator

from hvp.common.config.resolving import Epochs, Every, Fraction, LearningRate, Section, Weight
from hvp.common.data import ShapesOptions
from hvp.common.hardviews import Slots
from hvp.common.views import ViewSlot


class DataConfig(Section):
    """Source of the images, and how to read them."""

    path: str | None = Field(None, max_length=4096)
    """Folder of images, or `shapes` for the embedded dataset. Pretraining needs no labels."""

    shapes: ShapesOptions = ShapesOptions()
    """Options of the embedded dataset."""

    loader: Literal["fast", "pil"] = "fast"
    """View pipeline: `fast` (OpenCV) or `pil` (Pillow, as in the upstreams)."""

    workers: int | None = Field(None, ge=0, le=256)
    """Loader processes; 0 loads in the training process itself; null chooses by the number of cores."""

    on_bad_image: Literal["error", "skip"] = "error"
    """Action for an image that does not decode: `error` stops the run; `skip` takes the next image instead, and counts
    and lists the bad one."""

    timeout: int = Field(300, ge=0, le=604_800)
    """Seconds that a run waits for its loader without a new image before it saves and stops; 0: wait for ever."""


class SelectionConfig(Section):
    """Selection of the views to train on (HVP)."""

    hard_views: Literal["none", "hvp"] = "hvp"
    """`hvp` samples extra views and selects among them; `none` is the upstream's vanilla step."""

    policy: Literal["hardest", "easiest", "random"] = "hardest"
    """`hardest` is HVP; `easiest` is its appendix G.2 (expected to collapse); `random` is a control at the same
    cost."""

    search: Literal["sampled", "exact"] = "sampled"
    """`sampled` compares random combinations (the paper); `exact` finds the best of all combinations."""

    comparisons: int = Field(128, ge=1, le=100_000)
    """Random combinations compared for each image. HVP paper: 128 in appendix I, 64 for the timings of appendix J."""

    per_image: bool = False
    """Draw separate combinations for every image. HVP's released code shares one list over the batch."""

    mode: Literal["train", "eval"] = "train"
    """Mode of the networks while they score views. `train` (HVP's released code) keeps stochastic depth and batch
    statistics on."""

    every: Every = 1
    """Select on every n-th step only; the steps in between train on the first candidates. HVP paper, Table 15."""

    start: Fraction = 0.0
    """Fraction of the steps to train before selection begins. The papers: 0."""


class RescueConfig(Section):
    """Strong views for the images whose two views are most alike (Rescue).

    The paper leaves some choices open. The defaults follow its text; each choice has a switch.
    """

    enabled: bool = False
    """Add the Rescue loss."""

    k: int | None = Field(None, ge=0, le=2**20)
    """Images per step that get a strong view, the easiest over all processes and parts; 0: none; null:
    batch_size / 64, the paper's rule, rounded up."""

    s: Weight = 1.0
    """Weight of the Rescue loss. Paper: 0.05 (MoCo v3), 0.75 (SimCLR), 1 (DINOv2)."""

    feature: Literal["projection", "backbone"] = "projection"
    """Feature to compare and pull: the projection head's output z = g(f(x)), or the backbone's output f(x)."""

    stop_gradient: bool = False
    """Pull the strong view only; the common view gets no gradient. The paper's Equation 1 has no stop-gradient."""

    direction: Literal["pull", "push"] = "pull"
    """`pull` the strong view towards the common one (the paper's section 3); `push` uses the sign printed in
    Equation 1."""

    num_ops: int = Field(2, ge=0, le=14)
    """RandAugment operations per strong view, out of FixMatch's 14, each with a random magnitude."""

    cutout: Fraction = 0.5
    """Side of Cutout's grey square, as a fraction of the image's shorter side; 0: none. FixMatch: 0.5."""


class TrainConfig(Section):
    """Length, batches, precision and checkpoints of a run."""

    epochs: int = Field(100, ge=1, le=1_000_000)
    """Passes over the training images."""

    batch_size: int = Field(512, ge=1, le=2**20)
    """Images per optimiser step, over all processes and accumulated parts."""

    accumulate: int = Field(1, ge=1, le=2**20)
    """Parts into which each process splits its share of the batch, to save memory. An optimiser step still sees the
    whole batch."""

    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Autocast type; parameters and losses stay float32. fp16 uses a gradient scaler and needs a GPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. `auto` takes the GPU if there is one."""

    seed: int = Field(0, ge=0, lt=2**64)
    """Random seed of weights, views, image order, combinations and stochastic depth."""

    save_every: int = Field(0, ge=0, le=10**9)
    """Steps between two writes of last.pt; 0: once per epoch."""

    keep_every: Epochs = 0
    """Epochs between two kept copies of the checkpoint; 0: keep last.pt alone."""

    log_every: Every = 10
    """Steps between two lines of metrics.jsonl."""


class TeacherOptimConfig(Section):
    """Optimiser of a student with a teacher (DINO, iBOT, DINOv2), and its schedules, which are functions of the
    step."""

    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """Optimiser: AdamW for ViTs; SGD (momentum 0.9) or LARS for convnets."""

    base_lr: LearningRate = 0.0005
    """Learning rate after warm-up, per 256 images: the run uses base_lr * batch_size / 256."""

    min_lr: float = Field(1e-6, ge=0, le=1e6)
    """Learning rate at the end of the cosine schedule. Not scaled by the batch size."""

    warmup_epochs: Epochs = 10
    """Linear warm-up of the learning rate from 0, epochs."""

    weight_decay: Weight = 0.04
    """Weight decay at the start; biases and 1-D parameters have none."""

    weight_decay_end: Weight = 0.4
    """Weight decay at the end of its cosine schedule."""

    clip_grad: float = Field(3.0, ge=0, le=1e6)
    """Largest gradient norm, for each parameter tensor unless the method says otherwise; 0: no clipping."""

    freeze_last_layer: Epochs = 1
    """Epochs at the start in which the prototypes are not updated."""


class RunConfig(Section, ABC):
    """Sections and methods that every method's configuration has. Its `optim` section names the `optimizer`."""

    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    selection: SelectionConfig = SelectionConfig()
    rescue: RescueConfig = RescueConfig()

    @abstractmethod
    def view_slots(self) -> tuple[ViewSlot, ...]:
        """Views that the loader samples for an image."""

    @abstractmethod
    def combination_slots(self) -> Slots:
        """Combinations of those views that `select()` compares."""

    @property
    @abstractmethod
    def peak_lr(self) -> float:
        """Learning rate after warm-up, scaled by the batch size."""

    def objective_bytes(self, images: int) -> int:
        """Return a lower bound of the memory the loss needs for this many images, bytes; 0 if it is small."""
        return 0

    def notes(self) -> list[str]:
        """Return notes on the configuration's values, printed when a run starts and by --dry-run."""
        if self.rescue.enabled and self.rescue.k != 0 and self.train.accumulate > 1 and not self.rescue.stop_gradient:
            return [
                f"train.accumulate = {self.train.accumulate}: Rescue acts in the last part, with gradient through the "
                "strong views alone (as with rescue.stop_gradient)"
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
