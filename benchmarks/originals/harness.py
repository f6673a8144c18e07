"""Settings of a comparison of an original with our trainer, and stand-ins for parts of the originals.

# B images, V candidate views
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hvp.benchmarks.originals.on_cpu import Substitutes
from hvp.common.config.resolving import resolve
from hvp.common.config.sections import RunConfig
from hvp.common.networks.resnet import CONVNETS
from hvp.common.training.loading import Masks, build_strong_views, open_training_data
from hvp.common.views import ViewBatch, normalize

SHARED_VALUES = {
    "data.path": "shapes",
    "data.workers": 0,
    "data.shapes.size": 40,
    "train.epochs": 2,
    "train.precision": "fp32",
    "train.device": "cpu",
    "train.seed": 3,
    "train.log_every": 1,
}
"""Configuration values of every comparison, by dotted key."""


def comparison_config(config_class: type[Any], values: Mapping[str, Any]) -> Any:
    """Return the configuration of a comparison: the shared values, then others; by dotted key."""
    return resolve(config_class, [("comparison", {**SHARED_VALUES, **values})]).config


def normalized_views(batch: ViewBatch) -> list[Tensor]:
    """Return the candidates of a batch one by one, V tensors [B, 3, H, W], in the memory layout of our trainers."""
    return [view for pixels in batch.pixels for view in normalize(pixels)]


def views_and_index(batch: ViewBatch) -> list[Any]:
    """Return a batch as most of the original loaders do: its views, and the images' indices in place of labels."""
    return [normalized_views(batch), batch.index]


@dataclass(frozen=True)
class Batches:
    """Conversion of our loader's batches for an original."""

    convert: Callable[[ViewBatch], Any] = views_and_index
    """convert(batch): the batch in the form that the original's loader returns."""

    masks: Callable[[Any], Masks] | None = None
    """masks(config): the masks that our loader draws besides views."""

    endless: bool = False
    """The original's loader does not stop after an epoch."""


@dataclass(frozen=True)
class Checkpoints:
    """Correspondence between the tensors of an original's checkpoint and those of ours."""

    parts: Mapping[str, str] = field(default_factory=lambda: {"model": "state_dict"})
    """Names of the parts of the original's checkpoint, by the names of ours."""

    rename: Callable[[str], str] = lambda key: key
    """rename(key): the original's name of a tensor, from its key in a state dict of ours."""

    read: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """read(checkpoint): the original's checkpoint, divided into `parts`."""


@dataclass(frozen=True)
class Harness:
    """Settings of a comparison of one original with our trainer."""

    values: Mapping[str, Any]
    """Configuration values of both, besides SHARED_VALUES; by dotted key."""

    substitutes: Substitutes
    batches: Batches = Batches()
    checkpoints: Checkpoints = Checkpoints()

    words: Mapping[str, str] = field(default_factory=dict)
    """Words of the original's command line to replace."""

    needs: tuple[str, ...] = ()
    """Packages of `Patch.needs` that a comparison needs, too; the others have stand-ins."""

    notes: tuple[str, ...] = ()
    """Caveats to print with the comparison."""


def small_encoder(
    _: object, *, num_classes: int, zero_init_residual: bool = False, pretrained: bool = False
) -> nn.Module:
    """Return our `convnet_micro` with a last layer, for originals that look up torchvision's encoders by name.

    Args:
        num_classes: width of the last layer.
        zero_init_residual, pretrained: accepted as torchvision does; they change nothing.
    """
    encoder = CONVNETS["convnet_micro"]()
    encoder.fc = nn.Linear(encoder.embed_dim, num_classes)
    return encoder


def vit_of_32_pixels(vit: Callable[..., nn.Module], **named: Any) -> nn.Module:
    """Return DINO's or iBOT's network for images of 32 pixels, a size for which they have no flag."""
    return vit(img_size=[32], **named)


class OurImages:
    """Stand-in for a `Rescuable`, over the images of our trainer. A comparison does not read the original's images.

    Args:
        config: configuration of our trainer.
        length: number of images in the original's dataset.
    """

    def __init__(self, config: RunConfig, length: int) -> None:
        self.length = length
        self.strong = build_strong_views(config, open_training_data(config), 1)

    def __len__(self) -> int:
        return self.length

    def strong_views(self, epoch: int, index: Tensor) -> Tensor:
        """Make strong views as `Rescuable.strong_views()` does."""
        return normalize(self.strong([(epoch, number) for number in index.tolist()]))
