"""Rescue in a trainer's step: how many images, their strong views, and what the log says of them."""

import math
from typing import Protocol

import torch
from torch import Tensor

from hvp.common.engine.batch_norm import has_batch_norm, running_statistics_kept
from hvp.common.engine.distributed import World, share_of_batch
from hvp.common.errors import UserError
from hvp.common.networks import Features
from hvp.common.rescue import Rescued, rescue
from hvp.common.sections import RescueConfig, RunConfig
from hvp.common.views import ViewBatch, normalize
from hvp.common.views.strong import StrongTransform, StrongViews

IMAGES_FOR_ONE = 64
"""Images of a batch for each that is rescued, the paper's rule of thumb."""


class RescuedNetwork(Protocol):
    """The network that learns, without what makes it parallel."""

    def encode(self, x: Tensor) -> Features:
        """What it makes of views [n, 3, H, W] of one resolution."""


class Rescuer:
    """Rescue in a trainer's step:

        if rescuer.enabled:
            loss = loss + rescuer.loss(features, part)

    Args:
        config: says how many images, and what to do with them.
        network: the one that is trained; its strong views go through it as they are, in training mode. Batch norm then
            takes the statistics of the strong views, but its running statistics remain those of common views.
        strong: makes the strong views; None where `config` does not rescue.
        world: the processes, each of which rescues as many of its own images.
        device: of the network.

    Raises:
        UserError: rescue.k does not divide among processes and parts, or is 1 where batch norm needs 2.
    """

    def __init__(
        self, config: RunConfig, network: RescuedNetwork, strong: StrongViews | None, world: World, device: torch.device
    ) -> None:
        self.config: RescueConfig = config.rescue
        self.k = images_to_rescue(config, world)
        self.network, self.device = network, device
        self._strong = strong
        self._last: Rescued | None = None
        if self.k * world.size == 1 and isinstance(network, torch.nn.Module) and has_batch_norm(network):
            raise UserError(
                "rescue.k = 1, but batch norm needs at least 2 strong views at a time. Raise rescue.k to "
                f"{2 * config.train.accumulate}, or use --no-rescue"
            )

    @property
    def enabled(self) -> bool:
        """Whether there is anything to add to the loss."""
        return self.k > 0

    def loss(self, features: Features, part: ViewBatch) -> Tensor:
        """The Rescue loss of a part of the batch, weighted, to be added to the method's own; called under autocast.

        Args:
            features: of both views that are trained on, each [2 B, .], view after view, with gradient.
            part: where they come from.

        Returns:
            Scalar float32.

        Raises:
            BadImage: an image cannot be read again.
        """
        assert self._strong is not None
        strong = self._strong
        indices = part.index.tolist()

        def views(chosen: Tensor) -> Tensor:
            pixels = strong([(part.epoch, indices[b]) for b in chosen.tolist()])
            return normalize(pixels.to(self.device))

        def encode(x: Tensor) -> Tensor:
            with running_statistics_kept(self.network):  # type: ignore[arg-type]
                return self._compared(self.network.encode(x))

        z_a, z_b = self._compared(features).chunk(2)
        config = self.config
        self._last = rescue(
            z_a, z_b, views, encode, self.k, stop_gradient=config.stop_gradient, direction=config.direction
        )
        return config.s * self._last.loss

    def statistics(self) -> dict[str, float]:
        """For the log, of the step's last part: mean cosine of the rescued images' common views, and of the first of
        them and the strong view. The latter, or its negative, is the loss before its weight."""
        if self._last is None:
            return {}
        return {
            "easy_similarity": self._last.similarity.mean().item(),
            "strong_similarity": self._last.strong_similarity.mean().item(),
        }

    def _compared(self, features: Features) -> Tensor:
        return features.projection if self.config.feature == "projection" else features.backbone


def images_to_rescue(config: RunConfig, world: World) -> int:
    """Images that one process rescues in one part of its batch; 0 where the run does not rescue.

    Raises:
        UserError: `rescue.k` does not divide.
    """
    rescue, accumulate = config.rescue, config.train.accumulate
    parts = world.size * accumulate
    if not rescue.enabled:
        return 0
    if rescue.k is None:
        return math.ceil(share_of_batch(config.train.batch_size, accumulate, world) / IMAGES_FOR_ONE)
    if rescue.k % parts:
        raise UserError(
            f"rescue.k = {rescue.k} does not divide among {world.size} processes that go through their share in "
            f"train.accumulate = {accumulate} parts. Set a multiple of {parts}, for example "
            f"{max(1, round(rescue.k / parts)) * parts}"
        )
    return rescue.k // parts


def strong_transform(config: RunConfig) -> StrongTransform:
    """The distribution of strong views: the crop of the method's first view, with RandAugment and Cutout before it."""
    rescue = config.rescue
    return StrongTransform(config.view_slots()[0].transform, num_ops=rescue.num_ops, cutout=rescue.cutout)
