"""A run made from an upstream trainer's checkpoint."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from hvp.common.config.resolving import flatten
from hvp.common.config.sections import RunConfig
from hvp.common.convert.layouts import Layout
from hvp.common.convert.optimizer_state import plain
from hvp.common.convert.report import Converted, write
from hvp.common.convert.training_checkpoints import from_upstream
from hvp.common.errors import UserError
from hvp.common.evaluation.checkpoints import read_content
from hvp.common.training.archive import save_sealed
from hvp.common.training.checkpoint import FORMAT, VERSION
from hvp.common.training.distributed import World
from hvp.common.training.folder import LAST, claimed, describe_run, versions
from hvp.common.training.loading import open_training_data
from hvp.common.training.resume import describe_images
from hvp.common.views import steps_per_epoch

RENAMED_ARGUMENTS = {"lr": "base_lr"}
"""Upstream arguments that our configurations name differently."""


def write_run(path: Path, method: str, config: RunConfig, layout: Layout, out: Path, *, overwrite: bool) -> Converted:
    """Write the folder of a run from an upstream trainer's checkpoint; `hvp resume` continues it.

    Args:
        path: the upstream's checkpoint.
        method, config: method and configuration of the run. Its images, `data.path`, set the number of steps per epoch.
        layout: layout for that method and configuration.
        out: folder of the run.
        overwrite: delete an earlier run in it first.

    Raises:
        UserError: as for `from_upstream()`; or more epochs are finished than the run has, there are no images, or the
            folder is not free.
    """
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out}: is not empty. Give another --out, or delete the run in it with --overwrite")
    if out.resolve() in path.resolve().parents:
        raise UserError(f"{path}: lies in {out}, which the new run would replace. Give another --out")
    read = read_content(path)
    converted = from_upstream(read, layout, str(path), fp16=config.train.precision == "fp16")
    parts = dict(converted.content)
    epoch = parts.pop("epoch")
    if epoch > config.train.epochs:
        raise UserError(
            f"{path}: {epoch} epochs are finished, but train.epochs = {config.train.epochs}. Set at least as many"
        )
    source = open_training_data(config)
    steps = steps_per_epoch(len(source), config.train.batch_size)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "method": method,
        "config": config.model_dump(mode="json"),
        "step": epoch * steps,
        "epoch": epoch,
        "steps_per_epoch": steps,
        "log": {"loss_sum": 0.0, "loss_count": 0},
        "processes": [],
        "data": describe_images(source),
        "versions": versions(),
        **parts,
    }
    about = {**converted.about, "method": method, "step": epoch * steps, "config": content["config"]}
    notes = [*converted.notes, *differences(read.get("args"), config)]
    done = replace(converted, content=content, about=about, notes=notes)
    with claimed(out, World(), resume=False, overwrite=overwrite):
        describe_run(out, method, config)
        write(done, path, out / LAST, save_sealed)
    return done


def differences(args: object, config: RunConfig) -> list[str]:
    """List arguments in an upstream's checkpoint that differ from the configuration's values of the same name."""
    if not isinstance(args, Namespace):
        return []
    given = {RENAMED_ARGUMENTS.get(name, name): value for name, value in vars(args).items()}
    notes = []
    for key, value in flatten(config.model_dump(mode="json")).items():
        name = key.rpartition(".")[2]
        if name in given and plain(given[name]) != plain(value):
            notes.append(f"the upstream trained with {name} = {given[name]}, the run continues with {key} = {value}")
    return notes
