"""The configuration of SimSiam. Defaults are those of facebookresearch/simsiam, unless said otherwise."""

from typing import Literal

from pydantic import Field

from hvp.common.config import Fraction, Range, Section
from hvp.common.hardviews import Slots
from hvp.common.sections import RunConfig, SelectionConfig
from hvp.common.views import ViewSlot, ViewTransform


class ModelConfig(Section):
    """Encoder, projector and predictor."""

    arch: Literal["resnet50", "resnet18_cifar", "convnet_micro"] = "resnet50"
    """Encoder. `resnet18_cifar` has CIFAR's stem; `convnet_micro` is ours, for images of 32 pixels on two cores."""

    zero_init_residual: bool = True
    """Start every residual branch at zero."""

    dim: int = Field(2048, ge=2)
    """Width D of the projection."""

    pred_dim: int = Field(512, ge=1)
    """Width of the predictor's hidden layer."""

    projector_layers: Literal[2, 3] = 3
    """Linear layers of the projector. The paper takes 2 for CIFAR's ResNet-18 (appendix D)."""

    projector_bias: bool = True
    """The projector's last linear layer has a bias that is never trained. HVP's released code has none; batch norm
    takes it away again, so that it matters for the names in a checkpoint alone."""


class OptimConfig(Section):
    """Optimiser and its schedule: a cosine to 0 in steps of epochs, without warm-up."""

    optimizer: Literal["sgd"] = "sgd"
    """SGD, with momentum 0.9."""

    base_lr: float = Field(0.05, gt=0)
    """Learning rate of the first epoch, per 256 images: the run uses base_lr * batch_size / 256."""

    weight_decay: float = Field(0.0001, ge=0)
    """Of everything that is trained, batch norm and biases too."""

    fix_pred_lr: bool = False
    """The predictor keeps the learning rate of the first epoch. Upstream: off by default, on in its README."""


class ViewsConfig(Section):
    """The distribution of views, one for all of them."""

    crop_size: int = Field(224, ge=8)
    """Height and width of a view, pixels."""

    crop_scale: Range = (0.2, 1.0)
    """Area of a view, as a fraction of the image's, (min, max)."""

    flip: Fraction = 0.5
    """Probability of a horizontal flip."""

    jitter: Fraction = 0.8
    """Probability of colour jitter."""

    brightness: Fraction = 0.4
    """Jitter's brightness factor is drawn from 1 +- this."""

    contrast: Fraction = 0.4
    """Jitter's contrast factor is drawn from 1 +- this."""

    saturation: Fraction = 0.4
    """Jitter's saturation factor is drawn from 1 +- this."""

    hue: float = Field(0.1, ge=0, le=0.5)
    """Jitter's hue shift is drawn from +- this, as a fraction of the circle."""

    grayscale: Fraction = 0.2
    """Probability of grey."""

    blur: Fraction = 0.5
    """Probability of blur (sigma 0.1 to 2 pixels)."""


class SimSiamSelection(SelectionConfig):
    """Which of the sampled views are trained on (HVP)."""

    candidates: int = Field(4, ge=2)
    """Views sampled of every image, of which a pair is kept. HVP: 4."""


class SimSiamConfig(RunConfig):
    """hvp pretrain simsiam"""

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    views: ViewsConfig = ViewsConfig()
    selection: SimSiamSelection = SimSiamSelection()

    def view_slots(self) -> tuple[ViewSlot, ...]:
        """What the loader samples for an image: views of one distribution, of which a pair is kept."""
        views = self.views
        view = ViewTransform(
            size=views.crop_size,
            scale=views.crop_scale,
            interpolation="bilinear",
            flip=views.flip,
            jitter=views.jitter,
            brightness=views.brightness,
            contrast=views.contrast,
            saturation=views.saturation,
            hue=views.hue,
            grayscale=views.grayscale,
            blur=views.blur,
        )
        hard = self.selection.hard_views == "hvp"
        return (ViewSlot("view", view, candidates=self.selection.candidates if hard else 2, kept=2),)

    def combination_slots(self) -> Slots:
        """Which pairs of those views `select()` compares: all of them."""
        (slot,) = self.view_slots()
        return Slots.from_counts((slot.candidates,), (slot.kept,))

    @property
    def peak_lr(self) -> float:
        """Learning rate of the first epoch."""
        return self.optim.base_lr * self.train.batch_size / 256  # linear scaling rule
