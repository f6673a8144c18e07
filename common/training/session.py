"""Everything around a trainer's loop: processes, device, seed, data, the run's folder."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypedDict, TypeVar, Unpack, cast

import torch
from rich.console import Console
from torch import nn

from hvp.common.config.sections import RunConfig
from hvp.common.training.distributed import World, available_cores, joined, threads_beside_loader
from hvp.common.training.folder import claimed
from hvp.common.training.loading import Masks, build_loader, build_strong_views, open_training_data
from hvp.common.training.precision import Precision, pick_device
from hvp.common.training.rescuing import RescuedNetwork, Rescuer, images_to_rescue
from hvp.common.training.resume import Stateful
from hvp.common.training.run import Run
from hvp.common.training.sharding import Whole
from hvp.common.views import MultiViewLoader
from hvp.common.views.strong import StrongViews

ConfigT = TypeVar("ConfigT", bound=RunConfig)
ConfigT_contra = TypeVar("ConfigT_contra", bound=RunConfig, contravariant=True)
PartsT_co = TypeVar("PartsT_co", covariant=True)


class NamedParts(Protocol):
    """A named tuple of networks, losses with buffers, and the optimiser, under their names in a checkpoint."""

    def _asdict(self) -> dict[str, Any]: ...


class Build(Protocol[ConfigT_contra, PartsT_co]):
    """A trainer's function that makes what training changes, with fresh weights, equal in all processes.

    Returns:
        `NamedParts`.
    """

    def __call__(self, config: ConfigT_contra, world: World, device: torch.device) -> PartsT_co: ...


class RunOptions(TypedDict, total=False):
    """Options of every trainer: treatment of the run's folder, and who hears of its progress."""

    resume: bool
    """Continue from the folder's last checkpoint."""

    overwrite: bool
    """Delete an earlier run in the folder first."""

    force: bool
    """Resume although the configuration differs."""

    data_moved: bool
    """Resume with the same images in another place."""

    console: Console | None
    """Destination of progress messages; stderr if left out."""

    on_row: Callable[[Mapping[str, Any]], None] | None
    """Called with every row of the log; an exception from it stops the run."""

    temporary: bool
    """The folder will be deleted, so a signal stops the run without a checkpoint."""


@dataclass
class Session(Generic[ConfigT]):
    """One process's part in a run, before and while it trains."""

    config: ConfigT
    out: Path
    options: RunOptions
    world: World
    device: torch.device
    precision: Precision
    loader: MultiViewLoader
    strong: StrongViews | None
    """Maker of strong views, in a run that rescues."""

    def build(self, build: Build[ConfigT, PartsT_co]) -> PartsT_co:
        """Call a trainer's `build()`; an error in one process stops every process.

        Raises:
            UserError: the configuration does not suit the data or the processes.
        """
        with self.world.agreeing():
            return build(self.config, self.world, self.device)

    @contextmanager
    def run(self, method: str, parts: NamedParts | Mapping[str, Stateful], *, trained: nn.Module) -> Iterator[Run]:
        """Claim the folder, restore a resumed run, and yield the run.

        Args:
            method: name of the method, for the checkpoint.
            parts: contents of a checkpoint, by name. The precision is added.
            trained: the network that learns.

        Raises:
            UserError: the folder cannot be used, the checkpoint does not fit, or `rescue.k` does not suit the network.
        """
        options = self.options
        resume, overwrite = options.get("resume", False), options.get("overwrite", False)
        named: Mapping[str, Stateful] = parts if isinstance(parts, Mapping) else parts._asdict()
        with self.world.agreeing():
            rescuer = Rescuer(self.config, cast(RescuedNetwork, trained), self.strong, self.world, self.device)
        with (
            claimed(self.out, self.world, resume=resume, overwrite=overwrite) as claim,
            Run(
                method,
                self.config,
                self.out,
                claim,
                self.loader,
                named,
                trained,
                self.precision,
                rescuer,
                options.get("console") or Console(stderr=True, markup=False, emoji=False),
                self.world,
                resume=resume,
                force=options.get("force", False),
                data_moved=options.get("data_moved", False),
                on_row=options.get("on_row"),
                temporary=options.get("temporary", False),
            ) as run,
        ):
            for note in (*self._header(run, named), *self.config.notes()):
                run.note(note)
            yield run

    def _header(self, run: Run, parts: Mapping[str, Stateful]) -> Iterator[str]:
        """Yield the first lines that a run prints."""
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
    config: ConfigT, out: Path, *, masks: Masks | None = None, **options: Unpack[RunOptions]
) -> Iterator[Session[ConfigT]]:
    """Join the run's processes and prepare this one: device, precision, seeded random numbers, the loader.

    Args:
        config: the resolved configuration.
        out: the run's folder.
        masks: as for `MultiViewLoader`.
        options: as in RunOptions.

    Raises:
        UserError: an error that the user can fix, before the first step where possible.
    """
    with joined(config.train.device) as world, ExitStack() as held:
        if not world.leader:
            logging.getLogger("hvp").setLevel(logging.ERROR)  # every process has the same warnings
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
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators, and restore the caller's state afterwards."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _cores_for_loader(device: torch.device, world: World) -> Iterator[None]:
    """Leave some of the cores to the loader's workers, unless OMP_NUM_THREADS says otherwise."""
    before = torch.get_num_threads()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(before, threads_beside_loader(available_cores() // world.local_size)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
