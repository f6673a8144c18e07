"""Start of training: our trainer in one process or several, or a patched original."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer

from hvp.cli.memory import memory_advice
from hvp.cli.output import progress_console
from hvp.common.config.resolving import Resolved
from hvp.common.errors import SharedError, UserError
from hvp.common.training.distributed import environment_world
from hvp.common.training.footprint import check_fits
from hvp.common.training.launching import launch
from hvp.common.training.loading import build_loader, open_training_data
from hvp.methods import get_method


def train(method: str, config: Any, out: Path, devices: int | None, **options: bool) -> None:
    """Train in this process, which may be one of several, or start `devices` processes that run the same command.

    Args:
        method: name of the method.
        config: its configuration.
        out: folder of the run.
        devices: processes to start here; None for this one alone, or for those that a launcher started.
        options: passed to the method's trainer.

    Raises:
        UserError: an error the user can fix.
        Stopped: a signal stopped the run.
        typer.Exit: a started process failed.
    """
    world = environment_world()
    if devices is not None and devices > 1 and world.size == 1:
        if code := launch(devices, ["-m", "hvp.cli.main", *sys.argv[1:]]):
            raise typer.Exit(code)
        return
    with reported_once():
        if devices is not None and devices != world.size:
            raise UserError(
                f"--devices {devices}, but the launcher started {world.size} processes. Leave out --devices"
            )
        try:
            check_fits(config, get_method(method).build_modules, world)
        except UserError:
            # A batch larger than the dataset is the likelier error, so report that one first.
            build_loader(config, open_training_data(config), torch.device("cpu"), world)
            raise
    with memory_advice(config):
        last = get_method(method).train(config, out, console=progress_console(), **options)  # type: ignore[arg-type]
    if world.leader:
        print(f"wrote {last}")


def train_original(
    method: str, resolved: Resolved, upstream: Path, out: Path, devices: int | None, *, dry_run: bool
) -> None:
    """Start the patched original, or print the command that would.

    Raises:
        UserError: an error the user can fix.
        typer.Exit: the original failed.
    """
    from hvp.patches import get_adapter
    from hvp.patches.job import plan
    from hvp.patches.patching import load_patch

    with reported_once():
        if environment_world().size > 1:
            raise UserError(
                "--engine upstream starts the original's processes itself. Start it without a launcher, with --devices"
            )
        if resolved.config.data.path is None and not dry_run:
            raise UserError("no images: give --data DIR")
        job = plan(get_adapter(method), load_patch(method), resolved, upstream, out, devices or 1)
    for note in job.notes:
        print(f"note: {note}", file=sys.stderr)
    if dry_run:
        print(job.shell)
        if not job.copy.exists():
            words = ["hvp", "patch", "apply", method, "--upstream", str(upstream), "--out", str(job.copy)]
            print(f"\nThe patched copy does not exist yet. A run writes it, as does\n  {shlex.join(words)}")
        print("\nValues that the original has no flag for:")
        for value in sorted(job.without_flag, key=lambda value: not value.differs):
            print(f"  {value}")
        return
    job.write_copy()
    for value in job.without_flag:
        if value.differs:
            print(f"note: {value}", file=sys.stderr)
    if code := job.run():
        raise typer.Exit(code)


@contextmanager
def reported_once() -> Iterator[None]:
    """Report an error that every process hits before initialisation once, from rank 0."""
    try:
        yield
    except UserError as error:
        world = environment_world()
        if world.size == 1:
            raise
        raise SharedError(str(error), world.leader) from error
