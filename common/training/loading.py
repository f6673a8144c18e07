"""The training images of a configuration, and the loaders of their views."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvp.common.config.sections import RunConfig
from hvp.common.data import ImageSource, open_dataset
from hvp.common.errors import UserError
from hvp.common.training.distributed import World, available_cores, available_workers, share_of_batch
from hvp.common.training.rescuing import strong_transform
from hvp.common.training.selecting import ViewSelector
from hvp.common.views import MultiViewLoader, steps_per_epoch
from hvp.common.views.loader import Key
from hvp.common.views.strong import StrongViews

Masks = Callable[[Sequence[Key]], Tensor]


def open_training_data(config: RunConfig) -> ImageSource:
    """Open the images to pretrain on.

    Raises:
        UserError: `data.path` is not given, or holds no images.
    """
    if config.data.path is None:
        raise UserError("no images to train on: give --data DIR, or --data shapes for the embedded dataset")
    return open_dataset(config.data.path, "train", shapes=config.data.shapes)


def build_loader(
    config: RunConfig,
    source: ImageSource,
    device: torch.device,
    world: World = World(),
    masks: Masks | None = None,
) -> MultiViewLoader:
    """Make the multi-view loader of a configuration, for this process's share of every batch."""
    total_steps = config.train.epochs * steps_per_epoch(len(source), config.train.batch_size)
    return MultiViewLoader(
        source,
        config.view_slots(),
        batch_size=share_of_batch(config.train.batch_size, config.train.accumulate, world),
        accumulate=config.train.accumulate,
        seed=config.train.seed,
        workers=available_workers(config.data.workers, device, world),
        pipeline=config.data.loader,
        on_bad_image=config.data.on_bad_image,
        rank=world.rank,
        world_size=world.size,
        pin_memory=device.type == "cuda",
        selects=ViewSelector(config, total_steps).acts_on,
        masks=masks,
        timeout=config.data.timeout,
    )


def build_strong_views(config: RunConfig, source: ImageSource, count: int, world: World = World()) -> StrongViews:
    """Make the maker of strong views, `count` at a time, on this process's share of the cores."""
    threads = min(count, max(1, available_cores() // world.local_size))
    return StrongViews(source, strong_transform(config), seed=config.train.seed, threads=threads)
