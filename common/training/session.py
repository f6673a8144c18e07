"""What every trainer does around its loop: processes, device, seed, data, the run's folder."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from rich.console import Console
from torch import Tensor, nn

from hvp.common.config.sections import RunConfig
from hvp.common.data import ImageSource, open_dataset
from hvp.common.errors import UserError
from hvp.common.training.distributed import World, available_cores, joined, share_of_batch, threads_beside_loader
from hvp.common.training.precision import Precision, pick_device
from hvp.common.training.rescuing import RescuedNetwork, Rescuer, images_to_rescue, strong_transform
from hvp.common.training.run import Run, Stateful, available_workers, claimed, seeded
from hvp.common.training.selecting import ViewSelector
from hvp.common.training.sharding import Whole
from hvp.common.views import MultiViewLoader, steps_per_epoch
from hvp.common.views.loader import Key
from hvp.common.views.strong import StrongViews

Masks = Callable[[Sequence[Key]], Tensor]


class RunOptions(TypedDict, total=False):
    """How a trainer treats the run's folder, and who is told. Every trainer takes these."""

    resume: bool
    """Go on from the folder's last checkpoint."""

    overwrite: bool
    """Delete an earlier run in the folder first."""

    force: bool
    """Resume although the configuration differs."""

    data_moved: bool
    """Resume with the same images in another place."""

    console: Console | None
    """Where progress goes; stderr if not given."""

    on_row: Callable[[Mapping[str, Any]], None] | None
    """Told every row of the log; what it raises ends the run."""

    temporary: bool
    """The folder goes when the run ends, so a signal ends it without a checkpoint."""


@dataclass
class Session:
    """One process's part in a run, before and while it trains."""

    config: RunConfig
    out: Path
    options: RunOptions
    world: World
    device: torch.device
    precision: Precision
    loader: MultiViewLoader
    strong: StrongViews | None
    """Makes the strong views of a run that rescues."""

    def rescuer(self, network: RescuedNetwork) -> Rescuer:
        """What adds the Rescue loss; `network` is the one that is trained, as it was before `data_parallel()`.

        Raises:
            UserError: `rescue.k` does not suit the network.
        """
        return Rescuer(self.config, network, self.strong, self.world, self.device)

    @contextmanager
    def run(self, method: str, parts: Mapping[str, Stateful]) -> Iterator[Run]:
        """Claims the folder, restores what is resumed, and is the run.

        Args:
            method: its name, for the checkpoint.
            parts: what changes during training, by its name in the checkpoint. The precision is added.
        """
        options = self.options
        resume, overwrite = options.get("resume", False), options.get("overwrite", False)
        with (
            claimed(self.out, self.world, resume=resume, overwrite=overwrite) as claim,
            Run(
                method,
                self.config,
                self.out,
                claim,
                self.loader,
                {**parts, "precision": self.precision},
                self.device,
                options.get("console") or Console(stderr=True, markup=False, emoji=False),
                self.world,
                resume=resume,
                force=options.get("force", False),
                data_moved=options.get("data_moved", False),
                on_row=options.get("on_row"),
                temporary=options.get("temporary", False),
            ) as run,
        ):
            for note in (*self.about(run, parts), *self.config.notes()):
                run.log.note(note)
            yield run

    def about(self, run: Run, parts: Mapping[str, Stateful]) -> Iterator[str]:
        """The first lines of a run."""
        train, size = self.config.train, self.world.size
        place = self.device.type
        if self.device.type == "cuda":
            place += f" ({torch.cuda.get_device_name(self.device)})"
        modules = [part.part if isinstance(part, Whole) else part for part in parts.values()]
        parameters = [p for module in modules if isinstance(module, nn.Module) for p in module.parameters()]
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        yield f"output:     {self.out}"
        yield f"device:     {place}, {train.precision}, {size} process{'' if size == 1 else 'es'}"
        yield f"parameters: {trained / 1e6:.2f} M trained of {sum(p.numel() for p in parameters) / 1e6:.2f} M"
        yield f"images:     {self.loader.source.name}"
        yield (
            f"steps:      {run.total_steps}: {train.epochs} epochs of {run.steps_per_epoch}, "
            f"{train.batch_size} images each"
        )


@contextmanager
def session(
    config: RunConfig, out: Path, *, masks: Masks | None = None, **options: Unpack[RunOptions]
) -> Iterator[Session]:
    """Joins the run's processes and prepares this one: device, precision, seeded random numbers, the loader.

    Networks are to be built inside `with session.world.agreeing():`, so that what is wrong in one process ends all.

    Args:
        config: what to do.
        out: the run's folder.
        masks: as for `MultiViewLoader`.
        options: as in RunOptions.

    Raises:
        UserError: something that the caller can mend, before the first step where it can be known by then.
    """
    with joined(config.train.device) as world, ExitStack() as held:
        if not world.leader:
            logging.getLogger("hvp").setLevel(logging.ERROR)  # warnings are the same in every process: one gives them
        with world.agreeing():
            device = pick_device(config.train.device)
            precision = Precision(config.train.precision, device)
            held.enter_context(_cores_for_loader(device, world))
            held.enter_context(seeded(config.train.seed, device))
            source = open_training_data(config)
            loader = held.enter_context(closing(build_loader(config, source, device, world, masks)))
            strong = None
            if num_strong := images_to_rescue(config):
                share = -(-num_strong // world.size)
                strong = held.enter_context(closing(build_strong_views(config, source, share, world)))
        yield Session(config, out, options, world, device, precision, loader, strong)


@contextmanager
def _cores_for_loader(device: torch.device, world: World) -> Iterator[None]:
    """Has PyTorch leave some of the cores to the loader's workers, unless OMP_NUM_THREADS says otherwise."""
    before = torch.get_num_threads()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(before, threads_beside_loader(available_cores() // world.local_size)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def open_training_data(config: RunConfig) -> ImageSource:
    """The images to pretrain on.

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
    """The multi-view loader of a configuration, for this process's share of every batch."""
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
    """What makes strong views, `count` at a time, on this process's share of the cores."""
    threads = min(count, max(1, available_cores() // world.local_size))
    return StrongViews(source, strong_transform(config), seed=config.train.seed, threads=threads)
