"""Rescue in a training run: the number of images, their strong views, and statistics for the log."""

import math
from typing import Protocol

import torch
from torch import Tensor

from hvp.common.config.sections import RescueConfig, RunConfig
from hvp.common.errors import UserError
from hvp.common.networks import Features
from hvp.common.rescue import Rescued, rescue
from hvp.common.training.batch_norm import has_batch_norm, running_statistics_kept
from hvp.common.training.collectives import gathered
from hvp.common.training.distributed import World
from hvp.common.views import ViewBatch, normalize
from hvp.common.views.strong import StrongTransform, StrongViews

IMAGES_FOR_ONE = 64
"""Images of a batch per rescued image, the paper's rule of thumb."""


class RescuedNetwork(Protocol):
    """The network that learns, not wrapped for data parallelism."""

    def encode(self, x: Tensor) -> Features:
        """Return the features of views [n, 3, H, W] of one resolution."""


class Rescuer:
    """Rescue loss of a training step; `Step.rescue()` is built on it.

    The easiest images are chosen among those of all processes and parts of the batch. Every process makes and encodes
    an equal share of the strong views, no matter which process the images belong to. With gradient accumulation this
    happens in the last part. The graphs of the earlier parts are gone by then, so only the strong views have gradient,
    as with `rescue.stop_gradient`.

    Args:
        config: number of images, weight and direction of the loss.
        network: the network that learns, in training mode. Batch norm normalises strong views by their own statistics,
            but its running statistics remain those of common views.
        strong: maker of strong views; None if the run does not rescue.
        world: the processes.
        device: device of the network.

    Raises:
        UserError: rescue.k is 1 where batch norm needs 2.
    """

    def __init__(
        self, config: RunConfig, network: RescuedNetwork, strong: StrongViews | None, world: World, device: torch.device
    ) -> None:
        self.config: RescueConfig = config.rescue
        self.k = images_to_rescue(config)
        self.network, self.world, self.device = network, world, device
        self._num_parts = config.train.accumulate
        self._strong = strong
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # z_a, z_b and image index of the step's parts so far
        self._last: Rescued | None = None
        if self.k == world.size == 1 and isinstance(network, torch.nn.Module) and has_batch_norm(network):
            raise UserError(
                "rescue.k = 1, but batch norm needs at least 2 strong views at a time. Raise rescue.k to 2, or use "
                "--no-rescue"
            )

    @property
    def enabled(self) -> bool:
        """Whether the run rescues."""
        return self.k > 0

    def loss(self, features: Features, part: ViewBatch) -> Tensor:
        """Return the weighted Rescue loss of a part of the batch; called under autocast.

        The mean over the parts is the step's loss: the last part has all of it, the others 0.

        Args:
            features: of both views that are trained on, each [2 B, .], view after view, with gradient.
            part: their images.

        Returns:
            Scalar float32.

        Raises:
            BadImage: an image cannot be read again.
        """
        z_a, z_b = self._compared(features).chunk(2)
        index = part.index
        if self._num_parts > 1:
            self._parts.append((z_a.detach(), z_b.detach(), index))
            if len(self._parts) < self._num_parts:
                return torch.zeros((), device=self.device)
            z_a, z_b, index = (torch.cat(tensors) for tensors in zip(*self._parts, strict=True))
            self._parts.clear()
        config = self.config
        self._last = rescue(
            z_a,
            z_b,
            lambda chosen: self._strong_views(chosen, index, part.epoch),
            self._encode,
            self.k,
            stop_gradient=config.stop_gradient,
            direction=config.direction,
            world=self.world,
        )
        return config.s * self._num_parts * self._last.loss

    def statistics(self) -> dict[str, float]:
        """Return columns for the log: mean cosine of the rescued images' common views, and of the first and the strong.

        The second one, or its negative, is the loss before its weight; its mean over the processes is that over all
        images.
        """
        if self._last is None:
            return {}
        loss = self._last.loss.item()
        return {
            "easy_similarity": self._last.similarity.mean().item(),
            "strong_similarity": loss if self.config.direction == "push" else -loss,
        }

    def _strong_views(self, chosen: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Make normalised strong views [n, 3, H, W] of chosen images of all processes; `index` is this process's."""
        assert self._strong is not None
        all_index = gathered(index) if self.world.size > 1 else index
        pixels = self._strong([(epoch, image) for image in all_index[chosen.cpu()].tolist()])
        return normalize(pixels.to(self.device))

    def _encode(self, x: Tensor) -> Tensor:
        with running_statistics_kept(self.network):  # type: ignore[arg-type]
            return self._compared(self.network.encode(x))

    def _compared(self, features: Features) -> Tensor:
        return features.projection if self.config.feature == "projection" else features.backbone


def images_to_rescue(config: RunConfig) -> int:
    """Return the number of images that a step rescues, over all processes and parts; 0 if the run does not rescue."""
    rescue = config.rescue
    if not rescue.enabled:
        return 0
    return math.ceil(config.train.batch_size / IMAGES_FOR_ONE) if rescue.k is None else rescue.k


def strong_transform(config: RunConfig) -> StrongTransform:
    """Return the transform of strong views: RandAugment and Cutout, then the crop of the method's first view."""
    rescue = config.rescue
    return StrongTransform(config.view_slots()[0].transform, num_ops=rescue.num_ops, cutout=rescue.cutout)
