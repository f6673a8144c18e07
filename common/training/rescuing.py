"""Rescue in a trainer's step: how many images, their strong views, and what the log says of them."""

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
"""Images of a batch for each that is rescued, the paper's rule of thumb."""


class RescuedNetwork(Protocol):
    """The network that learns, without what makes it parallel."""

    def encode(self, x: Tensor) -> Features:
        """What it makes of views [n, 3, H, W] of one resolution."""


class Rescuer:
    """Rescue in a trainer's step:

        if rescuer.enabled:
            loss = loss + rescuer.loss(features, part)

    The easiest images are chosen among those of all processes and parts of the batch. Every process makes and encodes
    as many strong views, whoever the images belong to. With parts, all of this happens in the last one. The graphs of
    the earlier ones are gone by then, so that the strong views alone have gradient, as with `rescue.stop_gradient`.

    Args:
        config: says how many images, and what to do with them.
        network: the one that is trained; its strong views go through it as they are, in training mode. Batch norm then
            takes the statistics of the strong views, but its running statistics remain those of common views.
        strong: makes the strong views; None where `config` does not rescue.
        world: the processes.
        device: of the network.

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
        """Whether there is anything to add to the loss."""
        return self.k > 0

    def loss(self, features: Features, part: ViewBatch) -> Tensor:
        """Rescue loss of a part of the batch; called under autocast. The parts' mean is the step's Rescue loss,
        weighted: all of it comes with the last part.

        Args:
            features: of both views that are trained on, each [2 B, .], view after view, with gradient.
            part: where they come from.

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
        """For the log, of the step: mean cosine of the rescued images' common views, and of the first of them and the
        strong view, whose mean over the processes is that over all images. The latter, or its negative, is the loss
        before its weight."""
        if self._last is None:
            return {}
        loss = self._last.loss.item()
        return {
            "easy_similarity": self._last.similarity.mean().item(),
            "strong_similarity": loss if self.config.direction == "push" else -loss,
        }

    def _strong_views(self, chosen: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Normalised strong views [n, 3, H, W] of rows of all processes' images; `index` is this process's."""
        assert self._strong is not None
        everyones = gathered(index) if self.world.size > 1 else index
        pixels = self._strong([(epoch, image) for image in everyones[chosen.cpu()].tolist()])
        return normalize(pixels.to(self.device))

    def _encode(self, x: Tensor) -> Tensor:
        with running_statistics_kept(self.network):  # type: ignore[arg-type]
            return self._compared(self.network.encode(x))

    def _compared(self, features: Features) -> Tensor:
        return features.projection if self.config.feature == "projection" else features.backbone


def images_to_rescue(config: RunConfig) -> int:
    """Images that a step rescues, over all processes and parts; 0 where the run does not rescue."""
    rescue = config.rescue
    if not rescue.enabled:
        return 0
    return math.ceil(config.train.batch_size / IMAGES_FOR_ONE) if rescue.k is None else rescue.k


def strong_transform(config: RunConfig) -> StrongTransform:
    """The distribution of strong views: the crop of the method's first view, with RandAugment and Cutout before it."""
    rescue = config.rescue
    return StrongTransform(config.view_slots()[0].transform, num_ops=rescue.num_ops, cutout=rescue.cutout)
